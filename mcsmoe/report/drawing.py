"""What the figures share: their style, a variant's colour, short names of layers, and a figure as part of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches
INK, FAINT = "#1b1f24", "#c9ced4"  # become the page's own colours in svg(), so that they also fit a dark page
FULL = "full"

_FIXED = {
    FULL: INK,
    "msmoe": "#0072b2",
    "mcsmoe": "#d55e00",
    "averaging": "#009e73",
    "pruning": "#cc79a7",
    "dropping": "#56b4e9",
    "zipit": "#e69f00",
    "git-rebasin": "#8c6d31",
    "hc-smoe": "#7b5bd6",
}
_SPARE = (
    *("#e69f00", "#56b4e9", "#8c6d31", "#7b5bd6", "#b0b23a", "#5f7c8a", "#a8323e", "#2f8f8f"),
    *("#c44e9b", "#4c6fdb", "#6b4f2a", "#e2758a", "#3d9b35", "#9aa0a6"),
)
_STYLE = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}


Drawing = TypeVar("Drawing", bound=Callable[..., Any])


def styled(draw: Drawing) -> Drawing:
    """Draw in the house style and leave matplotlib's settings as they were."""

    @wraps(draw)
    def inside(*arguments: Any, **options: Any) -> Any:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*arguments, **options)

    return inside  # type: ignore[return-value]


def colours(variants: Iterable[str]) -> dict[str, str]:
    """A colour per variant; the built-in ones keep theirs whatever else is shown."""
    names = sorted(set(variants))
    taken = {_FIXED[name] for name in names if name in _FIXED}
    free = [colour for colour in _SPARE if colour not in taken]
    others = [name for name in names if name not in _FIXED]
    spare = {name: (free or list(_SPARE))[i % len(free or _SPARE)] for i, name in enumerate(others)}
    return {name: _FIXED.get(name) or spare[name] for name in names}


def layer_names(layers: Sequence[str]) -> dict[str, str]:
    """Short names of module paths, ``encoder 1`` for ``encoder.block.1.layer.1.mlp``; the whole path if ambiguous."""
    short = {}
    for layer in layers:
        number = re.search(r"\.(\d+)(?:\.|$)", layer)
        place = next((part for part in ("encoder", "decoder") if part in layer.split(".")), "layer")
        short[layer] = f"{place} {number[1]}" if number else layer
    names = list(short.values())
    return {layer: name if names.count(name) == 1 else layer for layer, name in short.items()}


def new_axes(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure that no global state of matplotlib holds on to, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element to put in a page: same bytes for the same data, no ids shared between figures.

    Args:
        name: unique in the page; made the prefix of every id. Ink and grid take the page's colours.
    """
    import matplotlib as mpl

    prefix = re.sub(r"[^a-zA-Z0-9]+", "-", name)
    target = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    text = text.replace(INK, "currentColor").replace(FAINT, "var(--faint, #c9ced4)")
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    width = round(figure.get_figwidth() * 96)
    return re.sub(r"<svg[^>]*viewBox", f'<svg role="img" width="{width}" viewBox', text, count=1).strip()


def contrast(colour: Any) -> str:
    """Black or white, whichever is read better on ``colour``."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#ffffff"


def label_of(variant: str, experts: int) -> str:
    """A short name of a variant at a number of experts."""
    return variant if variant == FULL else f"{variant} {experts}e"


def legend_below(figure: Figure, handles: list[Any], labels: list[str], columns: int = 3) -> None:
    """One legend under the axes, in as many columns as its longest name leaves room for."""
    room = int(
        figure.get_figwidth() * 14 // (max(map(len, labels), default=1) + 5)
    )  # 14 letters to the inch, 5 a handle
    columns = min(columns, max(1, room))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, min(columns, len(labels))), handlelength=1.8
    )


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table by column name."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]
