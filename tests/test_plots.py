"""Figures show the numbers of their tables: marks, cells and lines are read back from the axes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import fake_results
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from mcsmoe.report import drawing, plots


@pytest.fixture
def summary() -> pd.DataFrame:
    return fake_results.summary(tasks=("sst2",))


def texts(axes: object) -> list[str]:
    return [text.get_text() for text in axes.texts]  # type: ignore[attr-defined]


def test_tradeoff_marks_are_the_scores_and_their_intervals(summary: pd.DataFrame) -> None:
    (axes,) = plots.tradeoff(summary, "sst2").axes
    containers = axes.containers
    assert len(containers) == len(summary)
    for bars, row in zip(containers, summary.to_dict("records"), strict=True):
        x, y = bars.lines[0].get_data()
        assert (x[0], y[0]) == pytest.approx((row["bytes_on_disk"] / 1e6, row["value"]))
        (segment,) = bars.lines[2][0].get_segments()
        assert segment[:, 1].tolist() == pytest.approx([row["ci_low"], row["ci_high"]])
        bottom, top = axes.get_ylim()
        assert bottom < row["ci_low"]
        assert top > row["ci_high"]
    assert texts(axes) == [str(experts) for experts in summary["experts"][1:]], "experts are written into the marks"
    (reference,) = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
    assert reference.get_ydata()[0] == summary["value"].iloc[0]
    assert "(MB)" in axes.get_xlabel()
    assert "accuracy" in axes.get_ylabel()


def test_marks_of_one_size_do_not_overlap(summary: pd.DataFrame) -> None:
    figure = plots.tradeoff(summary)
    figure.canvas.draw()
    (axes,) = figure.axes
    centres = [bars.lines[0].get_transform().transform(bars.lines[0].get_xydata())[0] for bars in axes.containers]
    points = np.array(centres) * 72 / figure.dpi
    width = 11  # of a mark, points
    for i in range(len(points)):
        apart = np.abs(points[i + 1 :] - points[i])
        assert (apart.max(axis=1) >= width - 1e-6).all()
        left, right = (axes.bbox.x0 * 72 / figure.dpi, axes.bbox.x1 * 72 / figure.dpi)
        assert left <= points[i, 0] <= right


def test_many_methods_with_long_names_stay_inside_the_figure() -> None:
    variants = ("full", "mcsmoe", *(f"similarity-by-feature-{number}" for number in range(14)))
    table = fake_results.summary(tasks=("sst2",), variants=variants, ratios=(8,))
    figure = plots.tradeoff(table)
    figure.canvas.draw()
    (axes,) = figure.axes
    at = [bars.lines[0].get_transform().transform(bars.lines[0].get_xydata())[0][0] for bars in axes.containers]
    assert axes.bbox.x0 <= min(at)
    assert max(at) <= axes.bbox.x1
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1
    assert len({bars.lines[0].get_color() for bars in axes.containers}) == len(variants)


def test_usage_shows_percentages_of_each_layer() -> None:
    routing = fake_results.routing(3)
    axes, bar = plots.usage(routing).axes
    share = axes.images[0].get_array()
    assert share.shape == (len(fake_results.LAYERS), fake_results.EXPERTS)
    np.testing.assert_allclose(share.sum(axis=1), 100)
    np.testing.assert_allclose(share.ravel(), 100 * routing["frequency"].to_numpy())
    assert texts(axes) == [f"{100 * value:.0f}" for value in routing["frequency"]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "encoder 1",
        "encoder 3",
        "decoder 1",
        "decoder 3",
    ]
    assert "even: 12.5" in bar.get_ylabel()


def test_grouping_colours_members_alike_and_frames_leaders() -> None:
    groups = fake_results.groups(3, 5)
    (axes,) = plots.grouping(groups).axes
    pixels = axes.images[0].get_array()
    order = list(dict.fromkeys(groups["layer"]))
    for row, layer in enumerate(order):
        part = groups[groups["layer"] == layer]
        for _, members in part.groupby("group"):
            assert len({tuple(pixels[row, expert]) for expert in members["expert"]}) == 1
        assert len({tuple(pixels[row, expert]) for expert in part["expert"]}) == part["group"].nunique()
    assert texts(axes) == [str(group) for group in groups["group"]]
    frames = axes.collections[0].get_paths()
    centres = {tuple(np.round(path.get_extents().get_points().mean(axis=0)).astype(int)) for path in frames}
    leads = groups[groups["dominant"]]
    assert centres == {
        (expert, order.index(layer)) for layer, expert in zip(leads["layer"], leads["expert"], strict=True)
    }
    (right,) = axes.child_axes
    kept = [str(groups[groups["layer"] == layer]["group"].nunique()) for layer in order]
    assert [label.get_text() for label in right.get_yticklabels()] == kept


def test_similarity_has_a_square_per_layer() -> None:
    table = fake_results.similarity(1)
    squares = [axes for axes in plots.similarity(table).axes if axes.images]
    assert len(squares) == len(fake_results.LAYERS)
    for axes, layer in zip(squares, fake_results.LAYERS, strict=True):
        shown = axes.images[0].get_array()
        np.testing.assert_allclose(shown.ravel(), table[table["layer"] == layer]["similarity"])
        np.testing.assert_allclose(np.diag(shown), 1.0)


def test_training_draws_the_smoothed_loss_and_what_was_kept() -> None:
    curve = fake_results.training_curve(100, 2.0, 0, kept=True)
    labels = {"variant": "mcsmoe", "experts": 4, "seed": 0}
    loss, kept = plots.training([(labels, curve)]).axes
    drawn = loss.lines[0].get_ydata()
    # An exponential mean by its definition: weights (1 - 1/w)^age, normalised.
    decay = 1 - 1 / 2
    weights = decay ** np.arange(60)[::-1]
    assert drawn[59] == pytest.approx(float(np.average(curve["task_loss"][:60], weights=weights)))
    np.testing.assert_allclose(kept.lines[0].get_ydata(), 100 * curve["kept_fraction"])
    assert loss.lines[0].get_color() == drawing.colours(["mcsmoe"])["mcsmoe"]
    (only,) = plots.training([(labels, fake_results.training_curve(30, 2.0, 0))]).axes
    assert len(only.lines) == 1, "no second axes where nothing is pruned"


def test_two_ratios_of_a_variant_differ_in_line_not_in_colour() -> None:
    curves = [({"variant": "msmoe", "experts": n, "seed": 0}, fake_results.training_curve(9, 1.0, n)) for n in (4, 2)]
    (axes,) = plots.training(curves).axes
    first, second = axes.lines
    assert first.get_color() == second.get_color()
    assert first.get_linestyle() != second.get_linestyle() or first._dash_pattern != second._dash_pattern


def test_costs_are_in_the_units_of_their_labels(summary: pd.DataFrame) -> None:
    cost = fake_results.cost(summary)
    axes = plots.costs(cost).axes
    wanted = {"on disk (MB)": "bytes_on_disk", "peak memory (MB)": "peak_memory_bytes", "one pass (GFLOP)": "flops"}
    units = {"bytes_on_disk": 1e6, "peak_memory_bytes": 1e6, "flops": 1e9, "latency_ms": 1.0}
    wanted["latency (ms)"] = "latency_ms"
    assert [each.get_xlabel() for each in axes] == list(wanted)
    for each in axes:
        name = wanted[each.get_xlabel()]
        widths = [bar.get_width() for bar in each.patches]
        assert widths == pytest.approx((cost[name] / units[name]).tolist())
    bottom, top = axes[0].get_ylim()
    assert bottom > top, "the first row is on top"


def test_time_spent_sums_jobs_and_puts_the_longest_on_top() -> None:
    (axes,) = plots.time_spent(fake_results.benchmarks()).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    widths = dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))
    assert widths["recover"] == pytest.approx(69.9)
    assert names[-1] == "finetune"


def test_colours_are_stable_and_distinct() -> None:
    names = ["full", "msmoe", "mcsmoe", "averaging", "pruning", "my-own", "another"]
    many = drawing.colours(names)
    assert len({to_hex(colour) for colour in many.values()}) == len(names)
    assert drawing.colours(["msmoe"])["msmoe"] == many["msmoe"]
    assert drawing.colours(reversed(names)) == many


def test_layer_names_are_short_but_never_the_same() -> None:
    names = drawing.layer_names(["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp", "model.layers.3.mlp"])
    assert list(names.values()) == ["encoder 1", "decoder 1", "layer 3"]
    clash = ["a.layers.3.mlp", "b.layers.3.mlp"]
    assert drawing.layer_names(clash) == {name: name for name in clash}


def test_svg_is_deterministic_and_fits_into_a_page() -> None:
    routing = fake_results.routing(0)
    first, second = (drawing.svg(plots.usage(routing, "Use & care"), "usage one") for _ in range(2))
    assert first == second
    other = drawing.svg(plots.usage(routing), "usage two")
    identifiers = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, other)]
    assert not identifiers[0] & identifiers[1], "ids of two figures in one page must differ"
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', first)) <= identifiers[0], "every reference has its target"
    assert "http" not in first
    assert "currentColor" in first
    ElementTree.fromstring(first)  # well formed
    assert "Use &amp; care" in first


def test_styles_do_not_leak() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.usage(fake_results.routing(0))
    assert dict(mpl.rcParams) == before
