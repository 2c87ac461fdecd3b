"""The workflow's table beside figures made elsewhere: what agrees, and what is said of the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import fake_results
import pytest

from mcsmoe.artefacts.tables import write_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import agreement


def measured(folder: Path, lost: float, half: float) -> None:
    table = fake_results.metrics(fake_results.summary(("Language",), ("full",), (8,), (0,))).iloc[:1]
    rows = table.assign(metric="nats_lost", value=lost, ci_low=lost - half, ci_high=lost + half)
    write_table(folder / "metrics.parquet", rows, "metrics")


@pytest.mark.parametrize(
    ("lost", "word"),
    [(0.10, "agrees"), (0.149, "agrees"), (0.151, "loses more"), (0.051, "agrees"), (0.049, "loses less")],
)
def test_two_agree_within_both_intervals_together(lost: float, word: str, tmp_path: Path) -> None:
    place = tmp_path / "Language" / "seed0"
    table = fake_results.metrics(fake_results.summary(("Language",), ("full",), (8,), (0,))).iloc[:1]
    write_table(place / "full_evaluation" / "metrics.parquet", table.assign(metric="nats", value=4.44), "metrics")
    measured(place / "f-gram" / "4e" / "merged_evaluation", lost, 0.03)
    figures = {"full": 4.4402, "kept": {"4": {"gram": [0.10, 0.04, 0.05, 0.01], "random": [2.0, 0.1, 0.5, 0.1]}}}
    *_, row, last = agreement.rows(tmp_path, figures)
    assert row.endswith(f"| {word} |")
    assert last.strip() == f"{int(word == 'agrees')} of 1 agree."


def test_what_is_run_is_what_has_a_figure(tmp_path: Path) -> None:
    given = agreement.configuration(
        tmp_path, tmp_path / "out", {"kept": {"8": {"gram": [], "msmoe": []}, "4": {"gram": []}}}
    )
    assert given["variants"] == ["full", "f-gram", "f-gram-refitted", "f-msmoe", "f-msmoe-refitted"]
    assert given["experts"] == [8, 4]
    assert given["methods"]["f-msmoe-refitted"]["refit"] is True
