"""Criterion and budget chosen by trial: what a model reduced by each loses on calibration rows that are held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from mcsmoe.cli._calibrated import Calibrated
from mcsmoe.cli.options import pass_options
from mcsmoe.console import log
from mcsmoe.methods import AUTO, TRIED_BUDGETS, TRIED_CRITERIA
from mcsmoe.transform.in_sequence import Nats, Shelf, trial
from mcsmoe.transform.reduce import Reduction
from mcsmoe.types import LayerId

CANDIDATES = "candidates.json"
"""What was tried, what each loses, and which was taken."""

Plan = Callable[[str, str], tuple[Reduction, Mapping[LayerId, int]]]
"""From a criterion and a budget to what is done to the layers and how many experts each keeps."""


@dataclass(frozen=True)
class Choice:
    """A criterion and a budget, the layers reduced by them, and the table of all that were tried."""

    criterion: str
    budget: str
    layers: Shelf
    table: list[dict[str, Any]]


@dataclass
class _Tried:
    criterion: str
    budget: str
    layers: Shelf
    nats: Nats
    folder: Path

    @property
    def words(self) -> str:
        return f"criterion {self.criterion}, budget {self.budget}"


def choose(calibrated: Calibrated, criterion: str, budget: str, plan: Plan, work: Path) -> Choice:
    """Try every criterion under one budget, then every budget with the best of them; what is not ``auto`` is given.

    Each trial is a whole reduction in sequence, refit included, and its layers are the result if it wins: so one trial is
    the price of one run. The rows that decide are those that a refit is not fitted to.

    Raises:
        ValueError: there is no text to measure on, or too little of it.
    """
    if not calibrated.has_rows:
        raise ValueError(
            f"--criterion {AUTO} and --budget {AUTO} measure on text: give --calibration FILE, not --statistics alone"
        )
    folder, texts, options = calibrated.source.folder, calibrated.texts(), pass_options(calibrated.arguments)
    _, full = trial(folder, texts, None, {}, options, work / "full")
    if len(full.nats_R) < 2:
        raise ValueError(
            f"--criterion {AUTO} and --budget {AUTO} are decided on every tenth calibration row, of which there are "
            f"{len(full.nats_R)}; give 20 rows or more (--samples)"
        )
    log.info("the whole model: %.4f nats a token on %d held-out rows", full.mean(), len(full.nats_R))
    tried: list[_Tried] = []

    def measure(one: str, other: str) -> _Tried:
        reduction, counts = plan(one, other)
        place = work / f"trial-{len(tried)}"
        layers, nats = trial(folder, texts, reduction, counts, options, place)
        tried.append(_Tried(one, other, layers, nats, place))
        log.info("%s: loses %.4f (+- %.4f) nats a token on held-out rows", tried[-1].words, *nats.difference(full))
        return tried[-1]

    def least(first: _Tried, second: _Tried) -> _Tried:
        kept, left = (second, first) if second.nats.mean() < first.nats.mean() else (first, second)
        rmtree(left.folder, ignore_errors=True)
        return kept

    first_budget = TRIED_BUDGETS[0] if budget == AUTO else budget
    best: _Tried | None = None
    for one in TRIED_CRITERIA if criterion == AUTO else (criterion,):
        found = measure(one, first_budget)
        best = found if best is None else least(best, found)
    assert best is not None
    for other in TRIED_BUDGETS[1:] if budget == AUTO else ():
        best = least(best, measure(best.criterion, other))
    table = [_row(one, best, full) for one in tried]
    for other_trial, row in zip(tried, table, strict=True):
        if other_trial is not best:
            more = (row["more_than_chosen"], row["more_half_width"])
            log.info("%s is taken; %s loses %.4f (+- %.4f) more", best.words, other_trial.words, *more)
    return Choice(best.criterion, best.budget, best.layers, table)


def _row(tried: _Tried, best: _Tried, full: Nats) -> dict[str, Any]:
    lost, half = tried.nats.difference(full)
    more, more_half = tried.nats.difference(best.nats)
    return {
        "criterion": tried.criterion,
        "budget": tried.budget,
        "lost": lost,
        "half_width": half,
        "more_than_chosen": more,
        "more_half_width": more_half,
        "chosen": tried is best,
    }
