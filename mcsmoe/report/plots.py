"""Figures from the tables: each takes data frames and returns a matplotlib Figure, drawn for a phone's width.

Figures are small (4.8 inches) so that a narrow screen shrinks them little. A variant has one colour everywhere, from a
palette that colour-blind readers can tell apart (Okabe and Ito 2008); the number of experts is written, not coloured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mcsmoe.report.drawing import (
    FULL,
    INK,
    WIDTH,
    colours,
    contrast,
    label_of,
    layer_names,
    legend_below,
    new_axes,
    rows_of,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GROUPS = ("#88ccee", "#ddcc77", "#cc6677", "#44aa99", "#aa7fc0", "#999933", "#dd8a5b", "#8aa0d8", "#b8c48f", "#c9a0b4")
_AXIS_POINTS = 240.0  # width of the trade-off's axes between its outermost marks, in points
_LINES = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)))


# -- scores ------------------------------------------------------------------------------------------------------
@styled
def tradeoff(summary: pd.DataFrame, title: str = "") -> Figure:
    """Score against bytes on disk, with 95 % intervals; the number in a mark is the experts kept.

    Args:
        summary: rows of table ``summary`` of one task. The full model is the dashed line, its interval the band.
    """
    from matplotlib.transforms import ScaledTranslation

    colour = colours(summary["variant"])
    figure, axes = new_axes(WIDTH, 3.5 + 0.2 * math.ceil(len(colour) / 4))
    for row in rows_of(summary[summary["variant"] == FULL]):
        axes.axhspan(row["ci_low"], row["ci_high"], color=INK, alpha=0.09, linewidth=0)
        axes.axhline(row["value"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    shifts = _side_by_side(summary["bytes_on_disk"].to_numpy(dtype=float))
    handles: dict[str, Any] = {}
    for order, (row, shift) in enumerate(zip(rows_of(summary), shifts, strict=True)):
        moved = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
        at, mark = row["bytes_on_disk"] / 1e6, "D" if row["variant"] == FULL else "o"
        bars = axes.errorbar(
            [at], [row["value"]], [[row["value"] - row["ci_low"]], [row["ci_high"] - row["value"]]], fmt=mark, markersize=11,
            color=colour[row["variant"]], elinewidth=1.3, capsize=2, markeredgecolor="none", transform=moved,
            zorder=3 + order, clip_on=False,
        )  # fmt: skip
        for artist in (bars[0], *bars[1], *bars[2]):
            artist.set_in_layout(False)
        handles.setdefault(row["variant"], bars)
        if row["variant"] != FULL:
            axes.text(
                at, row["value"], str(row["experts"]), transform=moved, ha="center", va="center_baseline", fontsize=7.5,
                color=contrast(colour[row["variant"]]), zorder=3.5 + order, fontweight="bold", in_layout=False,
            )  # fmt: skip
    sizes = summary["bytes_on_disk"].to_numpy(dtype=float) / 1e6
    low, high = _limits(sizes, shifts)
    axes.set_xlim(max(0.0, low), high)
    metric = str(summary["metric"].iloc[0])
    # By hand: matplotlib does not scale to marks that were shifted.
    bottom, top = float(summary["ci_low"].min()), float(summary["ci_high"].max())
    room = 0.06 * max(top - bottom, 0.01)
    # A share ends at 1; nats a token do not.
    axes.set_ylim(max(0.0, bottom - room), min(1.0 + room / 2, top + room) if top <= 1 else top + room)
    axes.set(xlabel="checkpoint on disk (MB)", ylabel=f"{metric} (95 % interval)", title=title)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    legend_below(figure, list(handles.values()), list(handles), 4)
    return figure


def _limits(sizes: np.ndarray, shifts: np.ndarray) -> tuple[float, float]:
    """Ends of an axis on which marks at ``sizes``, moved by ``shifts`` points, all stand.

    A shift is worth the more megabytes the longer the axis is, so both are found together.
    """
    extent = max(float(np.ptp(sizes)), 1e-3 * float(sizes.max()))
    low, high = float(sizes.min()), float(sizes.min()) + extent
    for _ in range(60):
        shown = sizes + shifts * (high - low) / (1.16 * _AXIS_POINTS)
        low, high = float(shown.min()) - 0.09 * (high - low), float(shown.max()) + 0.07 * (high - low)
    return low, high


def _side_by_side(sizes: np.ndarray) -> np.ndarray:
    """Smallest shifts (points, in squares) that put marks of about one size next to each other, not over each other."""
    from scipy.optimize import isotonic_regression

    places = _AXIS_POINTS * sizes / max(float(np.ptp(sizes)), 1e-3 * float(sizes.max()))
    order = np.argsort(places, kind="stable")
    room = min(12.0, 0.6 * _AXIS_POINTS / len(sizes)) * np.arange(len(sizes))
    shifts = np.zeros(len(sizes))
    # Places at least `room` apart: the increasing sequence nearest to what is left when the room is taken away.
    shifts[order] = isotonic_regression(places[order] - room).x + room - places[order]
    return shifts


# -- heat maps ---------------------------------------------------------------------------------------------------
def _heat_axes(rows: int, columns: int, wide: float = 0.34) -> tuple[Figure, Any]:
    height = rows * min(wide, 0.30 if rows > 8 else 0.34) + 1.25
    return new_axes(WIDTH, height)


def _matrix_ticks(axes: Axes, names: Sequence[str], columns: int) -> None:
    step = math.ceil(columns / 16)
    axes.set_xticks(range(0, columns, step), [str(number) for number in range(0, columns, step)])
    axes.set_yticks(range(len(names)), list(names))
    axes.tick_params(length=0)
    axes.set_xlabel("expert")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_cells(axes: Axes, texts: Sequence[Sequence[str]], ink: Any, bold: np.ndarray | None = None) -> None:
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            heavy = bold is not None and bool(bold[i, j])
            axes.text(
                j, i, text, ha="center", va="center_baseline", fontsize=8, color=ink(i, j),
                fontweight="bold" if heavy else "normal",
            )  # fmt: skip


@styled
def usage(routing: pd.DataFrame, title: str = "") -> Figure:
    """Share of the calibration tokens that each expert computed, per layer, in per cent of the layer's tokens.

    Args:
        routing: table ``routing`` of one model.
    """
    table = routing.pivot(index="layer", columns="expert", values="frequency")
    table = table.reindex(list(dict.fromkeys(routing["layer"])))
    names, share = layer_names(list(table.index)), 100 * table.to_numpy()
    figure, axes = _heat_axes(*share.shape)
    image = axes.imshow(share, cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
    _matrix_ticks(axes, [names[layer] for layer in table.index], share.shape[1])
    if share.shape[1] <= 12:
        _write_cells(
            axes, [[f"{value:.0f}" for value in line] for line in share],
            lambda i, j: contrast(image.cmap(image.norm(share[i, j]))),
        )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(f"% of tokens (even: {100 / share.shape[1]:.3g})")
    bar.outline.set_visible(False)
    axes.set_title(title)
    return figure


@styled
def grouping(groups: pd.DataFrame, title: str = "") -> Figure:
    """Which experts of a layer are merged with which: one colour and number per group, leaders framed.

    Args:
        groups: table ``groups`` of one variant and number of experts.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    order = list(dict.fromkeys(groups["layer"]))
    number = groups.pivot(index="layer", columns="expert", values="group").reindex(order).to_numpy()
    leads = groups.pivot(index="layer", columns="expert", values="dominant").reindex(order).to_numpy().astype(bool)
    names = layer_names(order)
    palette = np.array([to_rgb(colour) for colour in _GROUPS])
    figure, axes = _heat_axes(*number.shape)
    axes.imshow(palette[number % len(palette)], aspect="auto", interpolation="nearest")
    kept = [len(set(line)) for line in number]
    _matrix_ticks(axes, [names[layer] for layer in order], number.shape[1])
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(order)), [str(count) for count in kept])
    right.tick_params(length=0, colors=INK, labelsize=9.5)
    right.spines["right"].set_visible(False)
    right.set_ylabel("experts kept", color=INK, fontsize=9.5)
    if number.shape[1] <= 16:
        _write_cells(axes, number.astype(str).tolist(), lambda i, j: "#000000", leads)
    frames = [Rectangle((j - 0.45, i - 0.42), 0.9, 0.84) for i, j in zip(*np.nonzero(leads), strict=True)]
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor="#000000", linewidth=1.3))
    axes.set_title(title)
    return figure


@styled
def similarity(table: pd.DataFrame, title: str = "") -> Figure:
    """Similarity of every pair of experts, one square per layer, on one scale from 0 to 1.

    Args:
        table: table ``similarity`` of one base.
    """
    order = list(dict.fromkeys(table["layer"]))
    names = layer_names(order)
    columns = min(4, len(order))
    rows = math.ceil(len(order) / columns)
    figure, grid = new_axes(WIDTH, 1.35 * rows * 4 / columns + 0.8, rows, columns, squeeze=False)
    image: Any = None
    for axes, layer in zip(grid.flat, order, strict=False):
        part = table[table["layer"] == layer].pivot(index="expert_i", columns="expert_j", values="similarity")
        image = axes.imshow(part.to_numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(names[layer], fontsize=8.5, fontweight="normal")
        axes.set(xticks=[], yticks=[])
    for axes in list(grid.flat)[len(order) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, location="bottom", fraction=0.05, aspect=40)
    bar.set_label("similarity of two experts")
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left", color=INK)
    return figure


# -- training ----------------------------------------------------------------------------------------------------
def smooth(values: np.ndarray, window: float) -> np.ndarray:
    """Exponential mean of a curve over about ``window`` steps, without the bias towards its start."""
    decay = 1 - 1 / max(1.0, window)
    total, weight, result = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        if not math.isnan(value):
            total, weight = decay * total + value, decay * weight + 1
        result[i] = total / weight if weight else math.nan
    return result


@styled
def training(curves: Sequence[tuple[Mapping[str, Any], pd.DataFrame]], title: str = "") -> Figure:
    """Loss per step of one stage, smoothed over a fiftieth of it; below it the share of residual rows kept, if pruned.

    Args:
        curves: (labels with ``variant``, ``experts``, ``seed``; table ``training``) of every run to compare.
    """
    pruned = any("kept_fraction" in frame and frame["kept_fraction"].notna().any() for _, frame in curves)
    options: dict[str, Any] = {"sharex": True, "squeeze": False}
    if pruned:
        options["gridspec_kw"] = {"height_ratios": [3, 1]}
    named = {(labels.get("variant"), labels.get("experts")) for labels, _ in curves}
    height = (4.0 if pruned else 3.1) + 0.2 * math.ceil(len(named) / 3)
    figure, grid = new_axes(WIDTH, height, 2 if pruned else 1, 1, **options)
    axes = grid[0, 0]
    colour = colours(str(labels.get("variant") or FULL) for labels, _ in curves)
    ratios = sorted({int(labels.get("experts") or 0) for labels, _ in curves}, reverse=True)
    handles: dict[str, Any] = {}
    for labels, frame in curves:
        variant, experts = str(labels.get("variant") or FULL), int(labels.get("experts") or 0)
        values = frame["task_loss"].where(frame["task_loss"].notna(), frame["loss"]).to_numpy(dtype=float)
        look = {"color": colour[variant], "linestyle": _LINES[ratios.index(experts) % len(_LINES)]}
        (line,) = axes.plot(frame["step"], smooth(values, len(values) / 50), linewidth=1.5, **look)
        handles.setdefault(label_of(variant, experts), line)
        if pruned:
            grid[1, 0].plot(frame["step"], 100 * frame["kept_fraction"], linewidth=1.5, **look)
    axes.set(ylabel="task loss (nats per token)", title=title)
    last = grid[-1, 0]
    last.set_xlabel("step")
    axes.set_ylim(0, 1.05 * max(float(np.nanmax(line.get_ydata())) for line in axes.lines))
    if pruned:
        last.set(ylabel="kept (%)", ylim=(0, 105))
    for each in grid.flat:
        each.grid(axis="y")
        each.margins(x=0.01)
    if list(handles) != [FULL]:
        legend_below(figure, list(handles.values()), list(handles))
    return figure


# -- sizes and times ---------------------------------------------------------------------------------------------
_COSTS = (
    ("bytes_on_disk", 1e6, "on disk (MB)"),
    ("peak_memory_bytes", 1e6, "peak memory (MB)"),
    ("flops", 1e9, "one pass (GFLOP)"),
    ("latency_ms", 1.0, "latency (ms)"),
)


@styled
def costs(cost: pd.DataFrame, title: str = "") -> Figure:
    """Bytes on disk, memory, FLOPs and latency of every checkpoint; the mark on latency is its interquartile range.

    Args:
        cost: rows of table ``cost`` of one task; seeds are averaged.
    """
    columns = [name for name, _, _ in _COSTS] + ["latency_spread_ms"]
    mean = cost.groupby(["variant", "experts"], sort=False)[columns].mean().reset_index()
    colour = colours(mean["variant"])
    places = np.arange(len(mean))
    figure, grid = new_axes(WIDTH, 2 * (0.21 * len(mean) + 0.62) + 0.35, 2, 2, sharey=True)
    for axes, (name, unit, label) in zip(grid.flat, _COSTS, strict=True):
        values = mean[name].to_numpy(dtype=float) / unit
        axes.barh(places, values, color=[colour[variant] for variant in mean["variant"]], height=0.72)
        if name == "latency_ms":
            axes.errorbar(
                values, places, xerr=mean["latency_spread_ms"] / 2, fmt="none", color=INK, elinewidth=1, capsize=1.5
            )
        ends = values + (mean["latency_spread_ms"].to_numpy(dtype=float) / 2 if name == "latency_ms" else 0.0)
        top = float(np.nanmax(ends))
        for place, value, end in zip(places, values, ends, strict=True):
            axes.text(end + top * 0.03, place, f"{value:.3g}", va="center", fontsize=7.5)
        axes.set_xlim(0, top * 1.3)
        axes.set_xlabel(label)
        axes.set_yticks(places, [label_of(v, e) for v, e in zip(mean["variant"], mean["experts"], strict=True)])
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.locator_params(axis="x", nbins=3)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    grid[0, 0].set_ylim(len(mean) - 0.4, -0.6)  # the first on top
    figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left", color=INK)
    return figure


@styled
def time_spent(benchmarks: pd.DataFrame, title: str = "") -> Figure:
    """Wall time of each rule, summed over its jobs.

    Args:
        benchmarks: columns ``rule`` and ``seconds``, one row per job.
    """
    total = benchmarks.groupby("rule")["seconds"].agg(["sum", "size"]).sort_values("sum")
    figure, axes = new_axes(WIDTH, 0.24 * len(total) + 0.9)
    axes.barh(total.index, total["sum"], color="#0072b2", height=0.72)
    top = float(total["sum"].max())
    for place, (seconds, jobs) in enumerate(zip(total["sum"], total["size"], strict=True)):
        text = f"{seconds:.3g} s" + (f", {jobs} jobs" if jobs > 1 else "")
        axes.text(seconds + top * 0.015, place, text, va="center", fontsize=8)
    axes.set(xlabel="wall time, summed over jobs (s)", title=title, xlim=(0, top * 1.32))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return figure
