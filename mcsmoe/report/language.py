"""Figures for tasks of language: what is lost against what is stored, by domain, and which experts each method keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mcsmoe.artefacts.names import EXPECTED_ERROR, LAYER_ERROR
from mcsmoe.report.drawing import FULL, INK, WIDTH, colours, layer_names, legend_below, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOST = "nats_lost"
BY_LAYER = f"{LAYER_ERROR}/"
EXPECTED = f"{EXPECTED_ERROR}/"
_LEAST_ERROR = 1e-5  # of a layer; smaller ones are drawn there
_KEY = ["variant", "experts", "seed"]


def is_language(rows: pd.DataFrame) -> bool:
    """Whether the rows of one task, of table ``summary`` or ``metrics``, are of predicted texts."""
    return bool((rows["protocol"] == "language").all())


def lost(rows: pd.DataFrame, metrics: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(domain, or empty for all documents; table) of what each method lost, in the order that the metrics name domains.

    The table has ``variant``, ``experts``, ``seed``, ``value``, ``ci_low``, ``ci_high``, ``packed_bytes`` and ``control``,
    whether a method keeps every expert and rounds their weights.

    Args:
        rows: table ``summary`` of one task.
        metrics: table ``metrics`` of the same.
    """
    final = metrics.merge(rows[[*_KEY, "stage", "packed_bytes", "parameters"]], on=[*_KEY, "stage"])
    whole = rows.loc[rows["variant"] == FULL, "experts"]
    rounded = final["packed_bytes"] < 1.99 * final["parameters"]
    final["control"] = rounded & final["experts"].isin(whole)
    names = [name for name in dict.fromkeys(final["metric"]) if name.partition("/")[0] == LOST]
    for name in names:
        part = final[(final["metric"] == name) & (final["variant"] != FULL)]
        if len(part):
            yield name.partition("/")[2], part.drop(columns=["metric", "parameters"])


@styled
def against_bytes(table: pd.DataFrame, title: str = "") -> Figure:
    """Nats a token lost to the full model against bytes, means over seeds with the widest of their intervals.

    The rounded controls are joined by a line: what is above it at its size is beaten by fewer bits alone.

    Args:
        table: as ``lost`` gives it.
    """
    colour = colours(table["variant"])
    named = sorted(set(table.loc[~table["control"], "variant"]))
    figure, axes = new_axes(WIDTH, 3.6 + 0.2 * math.ceil((len(named) + 1) / 3))
    mean = (
        table.groupby(["variant", "experts", "control"], sort=False)
        .agg(value=("value", "mean"), low=("ci_low", "min"), high=("ci_high", "max"), size=("packed_bytes", "mean"))
        .reset_index()
    )
    handles: dict[str, Any] = {}
    line = mean[mean["control"]].sort_values("size")
    if len(line):
        (handles["fewer bits, every expert"],) = axes.plot(
            line["size"] / 1e6, line["value"], color=INK, linestyle=(0, (4, 3)), marker="s", markersize=4, linewidth=1.1
        )
    for variant in named:
        part = mean[(mean["variant"] == variant) & ~mean["control"]].sort_values("size")
        errors = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(min=0)
        handles[variant] = axes.errorbar(
            part["size"] / 1e6, part["value"], errors, color=colour[variant], marker="o", markersize=4, linewidth=1.1,
            elinewidth=1.0, capsize=2,
        )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.7)
    # Methods differ by powers of ten; near nothing the scale is even.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set(
        xlabel="weights at 16 bits, rounded ones at theirs (MB)",
        ylabel="nats a token lost (95 % interval)",
        title=title,
    )
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    legend_below(figure, list(handles.values()), list(handles), 3)
    return figure


@styled
def kept(groups: Sequence[tuple[Mapping[str, Any], pd.DataFrame]], title: str = "") -> Figure:
    """Which experts each method keeps: a row a method, a column an expert, layer beside layer.

    Args:
        groups: (labels with ``variant``; table ``groups``) of methods with one number of experts and one seed.
    """
    layers = list(dict.fromkeys(groups[0][1]["layer"]))
    rows = []
    for _, table in groups:
        leads = [table[table["layer"] == layer].sort_values("expert")["dominant"].to_numpy(bool) for layer in layers]
        rows.append(np.concatenate(leads))
    width = len(rows[0])
    figure, axes = new_axes(WIDTH, 0.2 * len(rows) + 1.1)
    axes.imshow(np.stack(rows), cmap="Greys", vmin=0, vmax=1.4, aspect="auto", interpolation="nearest")
    ends = np.cumsum([len(groups[0][1][groups[0][1]["layer"] == layer]) for layer in layers])
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color="#0072b2", linewidth=1.2)
    names = layer_names(layers)
    starts = np.concatenate([[0], ends[:-1]])
    axes.set_xticks((starts + ends - 1) / 2, [names[layer] for layer in layers])
    axes.set_yticks(range(len(rows)), [str(labels["variant"]) for labels, _ in groups])
    axes.set_xlim(-0.5, width - 0.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title)
    return figure


def domain_table(rows: pd.DataFrame, metrics: pd.DataFrame) -> list[dict[str, Any]]:
    """By method and number of experts, nats lost in each domain as text with its interval, means over seeds."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for domain, table in lost(rows, metrics):
        for _, part in table.groupby(["variant", "experts"], sort=False):
            variant, experts = str(part["variant"].iloc[0]), int(part["experts"].iloc[0])
            row = found.setdefault((variant, experts), {"variant": variant, "experts": experts, "domains": {}})
            low, high = float(part["ci_low"].min()), float(part["ci_high"].max())
            text = f"{part['value'].mean():+.4f} [{low:+.4f}, {high:+.4f}]"
            row["domains"][domain or "all"] = text.replace("-", "−")
    return list(found.values())


def same_number(groups: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> Iterator[tuple[int, int, list[Any]]]:
    """(experts, seed, tables ``groups``) of methods that keep some and have the same number and seed."""
    found: dict[tuple[int, int], list[Any]] = {}
    for labels, table in groups:
        if not table["dominant"].all():
            found.setdefault((int(labels["experts"]), int(labels["seed"])), []).append((labels, table))
    for (experts, seed), some in found.items():
        yield experts, seed, some


def by_layer(rows: pd.DataFrame, metrics: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """(experts; table) of the squared error of each layer, a row a method, a column a layer, means over seeds.

    Args:
        rows: table ``summary`` of one task.
        metrics: table ``metrics`` of the same.
    """
    final = metrics.merge(rows[[*_KEY, "stage"]], on=[*_KEY, "stage"])
    final = final[final["metric"].str.startswith(BY_LAYER) & (final["variant"] != FULL)]
    for _, part in final.groupby("experts", sort=False):
        table = part.pivot_table("value", "variant", "metric", sort=False)
        yield int(part["experts"].iloc[0]), table.rename(columns=lambda name: name.removeprefix(BY_LAYER))


def expected(rows: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """What calibration let expect of each layer, and what was measured: ``variant``, ``experts``, ``layer``, both errors.

    Args:
        rows: table ``summary`` of one task.
        metrics: table ``metrics`` of the same; means over seeds are taken.
    """
    final = metrics.merge(rows[[*_KEY, "stage"]], on=[*_KEY, "stage"])
    parts = []
    for name, prefix in (("expected", EXPECTED), ("measured", BY_LAYER)):
        part = final[final["metric"].str.startswith(prefix)].rename(columns={"value": name})
        part = part.assign(layer=part["metric"].str.removeprefix(prefix))
        parts.append(part.groupby(["variant", "experts", "layer"], sort=False, as_index=False)[name].mean())
    return parts[0].merge(parts[1], on=["variant", "experts", "layer"])


@styled
def expected_errors(table: pd.DataFrame, title: str = "") -> Figure:
    """The error of each layer as calibration let expect it, and as it was measured; equal ones lie on the line.

    Args:
        table: as ``expected`` gives it.
    """
    colour = colours(table["variant"])
    figure, axes = new_axes(WIDTH, 3.8 + 0.2 * math.ceil((len(colour) + 1) / 3))
    handles: dict[str, Any] = {}
    for variant, part in table.groupby("variant", sort=False):
        (handles[str(variant)],) = axes.plot(
            *(part[name].clip(lower=_LEAST_ERROR) for name in ("expected", "measured")),
            "o",
            color=colour[str(variant)],
            markersize=4,
            alpha=0.85,
        )
    shown = table[["expected", "measured"]].clip(lower=_LEAST_ERROR).to_numpy()
    least, most = float(shown.min()) / 1.2, float(shown.max()) * 1.2
    axes.plot([least, most], [least, most], color=INK, linewidth=0.8)
    ticks = [
        digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5) if least <= digit * 10.0**power <= most
    ]
    for scale, place in ((axes.set_xscale, axes.set_xticks), (axes.set_yscale, axes.set_yticks)):
        scale("log")
        place(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(least, most), ylim=(least, most))
    axes.set(xlabel="expected from calibration", ylabel="measured on the validation texts", title=title)
    axes.grid()
    axes.set_axisbelow(True)
    legend_below(figure, list(handles.values()), list(handles), 3)
    return figure


@styled
def layer_errors(table: pd.DataFrame, title: str = "") -> Figure:
    """Which layers lose: the error of each, written in its cell, on a logarithmic scale of grey.

    Args:
        table: as ``by_layer`` gives it.
    """
    value = table.to_numpy(float)
    least = max(value[value > 0].min(initial=1.0), 1e-6)
    figure, axes = new_axes(WIDTH, 0.2 * len(table) + 1.1)
    shade = np.log10(np.maximum(value, least))
    low, high = float(shade.min()), float(shade.max())
    axes.imshow(
        shade, cmap="Greys", vmin=low, vmax=high + 0.6 * (high - low) + 1e-9, aspect="auto", interpolation="nearest"
    )
    for row, column in np.ndindex(value.shape):
        dark = shade[row, column] > (low + high) / 2 + 0.3 * (high - low)
        text = f"{value[row, column]:.2g}" if value[row, column] >= 1e-4 else "0"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    names = layer_names(list(table.columns))
    axes.set_xticks(range(value.shape[1]), [names[layer] for layer in table.columns])
    axes.set_yticks(range(len(table)), [str(variant) for variant in table.index])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title)
    return figure
