"""The report's page of a task of language: loss against bytes with its controls, by domain, and the experts kept."""

from __future__ import annotations

import fake_results
import numpy as np
import pandas as pd
import pytest

from mcsmoe.report import language, page

VARIANTS = ("full", "gram", "msmoe", "4-bit")


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Summary and metrics of a language task: gram loses .1 (twice that on code), msmoe .2, rounding .01."""
    rows = fake_results.summary(("Language",), VARIANTS, (4,), (0, 1))
    rows = rows.assign(protocol="language", metric="nats", value=4.0, ci_low=3.9, ci_high=4.1)
    rows.loc[rows["variant"] == "4-bit", "experts"] = fake_results.EXPERTS
    rows["packed_bytes"] = np.where(rows["variant"] == "4-bit", 0.4, 2.0) * rows["parameters"]
    rows["packed_bytes"] = rows["packed_bytes"].astype(np.int64)
    lost = {"full": 0.0, "gram": 0.1, "msmoe": 0.2, "4-bit": 0.01}
    made = []
    for row in rows.to_dict("records"):
        keys = {name: row[name] for name in ("task", "variant", "experts", "seed", "stage", "protocol", "n")}
        for metric, factor in (
            ("nats_lost", 1.0),
            ("nats_lost/code", 2.0),
            ("nats_lost/prose", 0.0),
            ("nats_lost/worst", 2.0),
            ("layer_error/model.layers.0.mlp", 0.3),
            ("layer_error/model.layers.1.mlp", 0.03),
        ):
            value = lost[row["variant"]] * factor
            bounds = {"value": value, "ci_low": value - 0.01, "ci_high": value + 0.01}
            made.append({**keys, "split": "validation", "metric": metric, **bounds})
        if row["variant"] == "gram":
            for layer, value in ((0, 0.02), (1, 0.004)):
                bounds = {"value": value, "ci_low": np.nan, "ci_high": np.nan, "n": 0}
                made.append(
                    {**keys, "split": "validation", "metric": f"expected_error/model.layers.{layer}.mlp", **bounds}
                )
    return rows, pd.DataFrame(made)


def test_losses_are_those_of_the_metrics_and_controls_are_known_by_their_bytes() -> None:
    rows, metrics = tables()
    found = dict(language.lost(rows, metrics))
    assert list(found) == ["", "code", "prose", "worst"]
    assert "full" not in set(found[""]["variant"])
    assert set(found[""].loc[found[""]["control"], "variant"]) == {"4-bit"}
    assert found["code"].set_index("variant")["value"].to_dict() == pytest.approx(
        {"gram": 0.2, "msmoe": 0.4, "4-bit": 0.02}
    )
    figure = language.against_bytes(found[""])
    (axes,) = figure.axes
    dashed = axes.lines[0]
    assert dashed.get_ydata().tolist() == pytest.approx([0.01])
    assert axes.get_yscale() == "symlog"
    table = language.domain_table(rows, metrics)
    assert [row["variant"] for row in table] == ["gram", "msmoe", "4-bit"]
    assert table[0]["domains"]["code"] == "+0.2000 [+0.1900, +0.2100]"


def test_errors_of_layers_are_those_of_the_metrics() -> None:
    rows, metrics = tables()
    found = dict(language.by_layer(rows, metrics))
    table = found[4]
    assert list(table.columns) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(table.index) == ["gram", "msmoe"]  # the full model loses nothing, and is not shown
    assert table.loc["msmoe"].tolist() == pytest.approx([0.06, 0.006])
    figure = language.layer_errors(table)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0.003", "0.006", "0.03", "0.06"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["layer 0", "layer 1"]


def test_what_was_expected_of_layers_stands_beside_what_was_measured() -> None:
    rows, metrics = tables()
    table = language.expected(rows, metrics)
    assert table["variant"].tolist() == ["gram", "gram"]  # others say nothing beforehand
    assert table["expected"].tolist() == pytest.approx([0.02, 0.004])
    assert table["measured"].tolist() == pytest.approx([0.03, 0.003])
    points, diagonal = language.expected_errors(table).axes[0].lines
    assert points.get_xdata().tolist() == pytest.approx([0.02, 0.004])
    assert points.get_ydata().tolist() == pytest.approx([0.03, 0.003])
    assert diagonal.get_xdata().tolist() == diagonal.get_ydata().tolist()


def test_the_page_shows_losses_by_domain_and_kept_experts() -> None:
    rows, metrics = tables()
    groups = [
        (
            {"task": "Language", "variant": name, "experts": 4, "seed": 0, "stage": "merged"},
            fake_results.groups(4, number),
        )
        for number, name in enumerate(("gram", "msmoe"))
    ]
    every = fake_results.groups(8, 0).assign(dominant=True)
    groups.append(({"task": "Language", "variant": "4-bit", "experts": 8, "seed": 0, "stage": "merged"}, every))
    assert [(experts, len(some)) for experts, _, some in language.same_number(groups)] == [(4, 2)]
    inputs = page.ReportInputs(rows, metrics, fake_results.cost(rows), groups=groups)
    text = page.render(inputs)
    assert "Lost by domain" in text
    assert "Experts kept, 4 on average" in text
    assert "fewer bits, every expert" in text
    assert text.count("loss and size") == 4
    assert "error by layer, 4 experts on average" in text
    assert "Measured over expected, median: 1.12." in text
    figure = language.kept(groups[:2])
    dark = figure.axes[0].images[0].get_array()
    assert dark.sum(axis=1).tolist() == [int(table["dominant"].sum()) for _, table in groups[:2]]
