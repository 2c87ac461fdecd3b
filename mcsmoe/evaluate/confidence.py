"""How far a score can be trusted: intervals, paired tests against the full model, and several seeds.

The bootstrap draws units with replacement. Units with equal contributions are interchangeable, so a resample is drawn
as multinomial counts over the distinct contributions: the same distribution, at a fraction of the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mcsmoe.evaluate.metrics import LESS_IS_BETTER, Array, Units, units

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 10_000
LEVEL = 0.95
SIGNIFICANCE = 0.05
_CELLS = 4_000_000  # counts held at a time
MCNEMAR = "exact McNemar"
BOOTSTRAP = "paired bootstrap"


@dataclass(frozen=True)
class Interval:
    """A score with its interval and the number of units it is over; ``method`` is ``bootstrap`` or ``exact``."""

    value: float
    low: float
    high: float
    n: int
    method: str = "bootstrap"


@dataclass(frozen=True)
class Comparison:
    """A score minus the full model's on the same examples; ``verdict`` says in words what ``p_value`` allows."""

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    verdict: str
    n: int


@dataclass(frozen=True)
class Seeds:
    """Scores over seeds. ``standard_error`` of the mean is NaN for one seed."""

    mean: float
    standard_error: float
    n: int


def reference(n: int) -> Comparison:
    """What stands in the full model's own row."""
    return Comparison(0.0, 0.0, 0.0, math.nan, "", "reference", n)


def _resampled_sums(statistics_US: Array, resamples: int, seed: int) -> Array:
    """[B, S] sums of each of B resamples of the U rows."""
    distinct_KS, counts_K = np.unique(statistics_US, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed)
    size = int(counts_K.sum())
    sums = np.empty((resamples, statistics_US.shape[1]))
    step = max(1, _CELLS // len(counts_K))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        sums[start:stop] = drawn.multinomial(size, counts_K / size, size=stop - start) @ distinct_KS
    return sums


def _percentiles(values: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"confidence level is {level}; it must lie between 0 and 1")
    if resamples < 100:
        raise ValueError(f"{resamples} bootstrap resamples are too few for an interval; take at least 100")


def interval(
    metric: str,
    predictions: pd.DataFrame,
    positive: str = "",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of ``metric`` over its units (Efron 1979).

    Where every unit of a 0/1 metric has the same outcome no resample can differ, and the bootstrap would claim
    certainty; the exact binomial interval of Clopper and Pearson (1934) stands in its place, and ``method`` says so.

    Args:
        metric, predictions, positive: as in ``mcsmoe.evaluate.metrics.units``.
        level: probability that the interval is meant to cover with.
        resamples: bootstrap draws.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: as ``units``; or a level or a number of resamples out of range.
    """
    _check(level, resamples)
    found = units(metric, predictions, positive)
    value = found.value()
    if found.binary and value in (0.0, 1.0):
        bound = ((1 - level) / 2) ** (1 / found.n)
        low, high = (bound, 1.0) if value == 1.0 else (0.0, 1 - bound)
        return Interval(value, low, high, found.n, "exact")
    low, high = _percentiles(found.combine(_resampled_sums(found.statistics_US, resamples, seed)), level)
    return Interval(value, low, high, found.n)


def aligned(full: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``other`` in the order of ``full``.

    Raises:
        ValueError: not the same examples, an ``idx`` twice, or another reference or group for one; names it.
    """
    for name, frame in (("full model's", full), ("compared", other)):
        twice = frame["idx"][frame["idx"].duplicated()]
        if len(twice):
            raise ValueError(f"idx {twice.iloc[0]!r} occurs twice in the {name} predictions; they cannot be paired")
    here, there = set(full["idx"]), set(other["idx"])
    if here != there:
        odd = sorted(here ^ there)
        raise ValueError(
            f"the predictions are not of the same examples: {len(here - there)} only in the full model's and "
            f"{len(there - here)} only in the compared ones, among them idx {odd[0]!r}; evaluate both on one split"
        )
    ordered = other.set_index("idx", drop=False).loc[full["idx"].tolist()].reset_index(drop=True)
    for column in (column for column in ("reference", "group") if column in full):
        differs = (ordered[column].to_numpy() != full[column].to_numpy()).nonzero()[0]
        if len(differs):
            row = int(differs[0])
            raise ValueError(
                f"idx {full['idx'].iloc[row]!r} has {column} {full[column].iloc[row]!r} in the full model's "
                f"predictions and {ordered[column].iloc[row]!r} in the compared ones; use one protocol and split for both"
            )
    return ordered


def mcnemar(full: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Two-sided exact p-value of McNemar's test: of the examples on which the two differ, each is as likely to win.

    Args:
        full, other: right or wrong, per example, in one order.
    """
    won, lost = int((other & ~full).sum()), int((full & ~other).sum())
    if won + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost, 0.5).pvalue)


def _both_tails(differences: Array) -> float:
    """Two-sided p-value of no difference from bootstrap differences; never 0, for B draws cannot show that."""
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))


def verdict(difference: float, p_value: float, less_is_better: bool = False) -> str:
    """In words, what a difference of two scores and its p-value allow one to say."""
    if p_value >= SIGNIFICANCE or difference == 0:
        return "within noise"
    return "better" if (difference < 0) == less_is_better else "worse"


def _pair(full: Units, other: Units) -> Array:
    # Both were made from the same examples in the same order, so the units are the same too.
    assert np.array_equal(full.ids, other.ids)
    return np.concatenate([full.statistics_US, other.statistics_US], axis=1)


def paired(
    full: pd.DataFrame,
    other: pd.DataFrame,
    metric: str,
    positive: str = "",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare ``other`` with the ``full`` model on the same examples.

    The interval of the difference is the percentile interval of paired resamples. The p-value is McNemar's, exact,
    for metrics that are right or wrong per unit, and from the paired bootstrap for the others. At 5 % the verdict
    is ``better``, ``worse`` or ``within noise``.

    Args:
        full, other: tables ``predictions`` or ``documents``, of the same examples in any order.
        metric, positive, level, resamples, seed: as in ``interval``.

    Raises:
        ValueError: as ``aligned`` and ``interval``.
    """
    _check(level, resamples)
    before = units(metric, full, positive)
    after = units(metric, aligned(full, other), positive)
    difference = after.value() - before.value()
    sums = _resampled_sums(_pair(before, after), resamples, seed)
    width = before.statistics_US.shape[1]
    differences = after.combine(sums[:, width:]) - before.combine(sums[:, :width])
    low, high = _percentiles(differences, level)
    if before.binary:
        test = MCNEMAR
        p_value = mcnemar(before.statistics_US[:, 0] > 0, after.statistics_US[:, 0] > 0)
    else:
        test, p_value = BOOTSTRAP, _both_tails(differences)
    said = verdict(difference, p_value, metric in LESS_IS_BETTER)
    return Comparison(difference, low, high, p_value, test, said, before.n)


def over_seeds(values: Sequence[float]) -> Seeds:
    """Mean over seeds and its standard error (sample deviation over the root of their number).

    Raises:
        ValueError: no value, or one that is not finite.
    """
    if not len(values) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"scores over seeds are {list(values)}; there must be at least one, all finite")
    scores = np.asarray(values, dtype=np.float64)
    error = float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan
    return Seeds(float(scores.mean()), error, len(scores))
