"""Intervals and paired tests against direct sums, closed forms and small simulations."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pandas as pd
import pytest

from mcsmoe.evaluate import confidence, metrics


def right(outcomes: np.ndarray | list[bool]) -> pd.DataFrame:
    """Predictions of class y or n that are right where ``outcomes`` says so; truth alternates."""
    truth = ["y" if number % 2 else "n" for number in range(len(outcomes))]
    other = {"y": "n", "n": "y"}
    return pd.DataFrame(
        {
            "idx": [f"e{number}" for number in range(len(outcomes))],
            "reference": truth,
            "prediction": [one if hit else other[one] for one, hit in zip(truth, outcomes, strict=True)],
            "correct": [bool(hit) for hit in outcomes],
            "score": [float(hit) for hit in outcomes],
            "group": "",
        }
    )


def by_sum(won: int, lost: int) -> float:
    """Two-sided exact p: total probability, under fair coins, of all outcomes no likelier than the one seen."""
    n = won + lost
    seen = comb(n, won)
    return sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= seen) / 2**n


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (0, 6), (3, 3), (9, 2), (30, 13)])
def test_mcnemar_is_the_direct_sum(won: int, lost: int) -> None:
    full = np.array([False] * won + [True] * lost + [True] * 50 + [False] * 7)
    other = np.array([True] * won + [False] * lost + [True] * 50 + [False] * 7)
    assert confidence.mcnemar(full, other) == pytest.approx(by_sum(won, lost))
    found = confidence.paired(right(full), right(other), "accuracy", resamples=1000)
    assert found.p_value == pytest.approx(by_sum(won, lost))
    assert found.test == "exact McNemar"
    assert found.difference == pytest.approx((won - lost) / len(full))
    assert found.low <= found.difference <= found.high
    assert found.n == len(full)


@pytest.mark.parametrize(
    ("won", "lost", "verdict"), [(0, 0, "within noise"), (4, 0, "within noise"), (9, 0, "better"), (1, 12, "worse")]
)
def test_verdict_in_words(won: int, lost: int, verdict: str) -> None:
    full = np.array([False] * won + [True] * lost + [True] * 20)
    other = np.array([True] * won + [False] * lost + [True] * 20)
    assert confidence.paired(right(full), right(other), "accuracy", resamples=500).verdict == verdict


def test_the_full_model_is_the_reference() -> None:
    found = confidence.reference(12)
    assert (found.verdict, found.difference, found.n) == ("reference", 0.0, 12)
    assert math.isnan(found.p_value)


def test_interval_agrees_with_the_binomial() -> None:
    from scipy.stats import binom

    outcomes = np.arange(200) < 150
    found = confidence.interval("accuracy", right(outcomes))
    assert (found.value, found.n, found.method) == (0.75, 200, "bootstrap")
    # A resample's hits are binomial(n, accuracy): the percentiles are known without drawing.
    low, high = binom.ppf([0.025, 0.975], 200, 0.75) / 200
    assert found.low == pytest.approx(low, abs=0.0051)
    assert found.high == pytest.approx(high, abs=0.0051)


def test_interval_agrees_with_resampling_rows() -> None:
    drawn = np.random.default_rng(5)
    rows = right(drawn.random(80) < 0.7)
    found = confidence.interval("f1", rows, positive="y", resamples=8000)
    values = []
    for _ in range(1500):
        sample = rows.iloc[drawn.integers(0, 80, 80)]
        values.append(metrics.units("f1", sample, "y").value())
    low, high = np.quantile(values, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_interval_agrees_with_scipy_for_a_mean() -> None:
    from scipy.stats import bootstrap

    drawn = np.random.default_rng(2)
    rows = right([True] * 60)
    rows["prediction"] = [" ".join(["w"] + ["x"] * int(extra)) for extra in drawn.integers(0, 5, 60)]
    rows["reference"] = "w"
    values = metrics.units("token_f1", rows).statistics_US[:, 0]
    wanted = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    found = confidence.interval("token_f1", rows)
    assert found.low == pytest.approx(wanted.low, abs=0.01)
    assert found.high == pytest.approx(wanted.high, abs=0.01)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        found = confidence.interval("accuracy", right(drawn.random(120) < 0.8), resamples=1000, seed=trial)
        covered += found.low <= 0.8 <= found.high
    # 95 % nominal; four standard errors of 300 trials and the percentile method's known shortfall.
    assert 0.89 <= covered / 300 <= 0.99


def test_the_question_is_what_is_resampled() -> None:
    # Ten questions of twenty answers each, all right or all wrong together: ten independent facts, not two hundred.
    hits = np.repeat(np.arange(10) < 6, 20)
    rows = right(hits).assign(group=[f"q{number // 20}" for number in range(200)])
    grouped = confidence.interval("f1a", rows, positive="y")
    alone = confidence.interval("f1", rows, positive="y")
    assert (grouped.n, alone.n) == (10, 200)
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_all_right_is_not_certainty() -> None:
    found = confidence.interval("accuracy", right([True] * 20))
    assert found.method == "exact"
    assert found.high == 1.0
    assert found.low**20 == pytest.approx(0.025)  # the accuracy at which 20 of 20 has probability 2.5 %
    none = confidence.interval("accuracy", right([False] * 20))
    assert (none.low, none.high) == (0.0, pytest.approx(1 - found.low))


def test_seed_decides() -> None:
    rows = right(np.arange(50) < 33)
    once = confidence.interval("f1", rows, "y", resamples=500, seed=3)
    assert once == confidence.interval("f1", rows, "y", resamples=500, seed=3)
    assert once != confidence.interval("f1", rows, "y", resamples=500, seed=4)


def test_paired_bootstrap_of_f1() -> None:
    drawn = np.random.default_rng(1)
    full = drawn.random(400) < 0.9
    found = confidence.paired(right(full), right(full & (drawn.random(400) < 0.9)), "f1", "y")
    assert found.test == "paired bootstrap"
    assert found.verdict == "worse"
    assert found.high < 0
    assert 0 < found.p_value < 0.01
    same = confidence.paired(right(full), right(full), "f1", "y")
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert same.verdict == "within noise"


def test_paired_bootstrap_rejects_seldom_where_nothing_differs() -> None:
    drawn = np.random.default_rng(7)
    rejected = 0
    for trial in range(200):
        hard = drawn.random(100)
        a, b = (hard + drawn.normal(0, 0.3, 100) < 0.7 for _ in range(2))
        found = confidence.paired(right(a), right(b), "f1", "y", resamples=500, seed=trial)
        rejected += found.verdict != "within noise"
    assert rejected / 200 <= 0.11  # 5 % nominal, four standard errors of 200 trials


def test_pairing_is_sharper_than_two_intervals() -> None:
    drawn = np.random.default_rng(3)
    full = drawn.random(300) < 0.7
    other = full.copy()
    other[np.flatnonzero(~full)[:12]] = True
    found = confidence.paired(right(full), right(other), "accuracy")
    one, two = confidence.interval("accuracy", right(full)), confidence.interval("accuracy", right(other))
    assert found.verdict == "better"
    assert one.high > two.low  # the intervals overlap, and would have said nothing


def test_order_does_not_matter() -> None:
    drawn = np.random.default_rng(4)
    full, other = right(drawn.random(60) < 0.8), right(drawn.random(60) < 0.7)
    shuffled = other.sample(frac=1, random_state=0)
    for metric in ("accuracy", "f1"):
        assert confidence.paired(full, other, metric, "y") == confidence.paired(full, shuffled, metric, "y")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: frame.iloc[1:], "1 only in the full model's and 0 only .* 'e0'"),
        (lambda frame: frame.assign(idx=[*frame["idx"][:-1], "zz"]), "not of the same examples"),
        (lambda frame: pd.concat([frame, frame.iloc[:1]]), "'e0' occurs twice"),
        (lambda frame: frame.assign(reference="maybe"), "'e0' has reference 'n' .* 'maybe'"),
        (lambda frame: frame.assign(group="g"), "'e0' has group"),
    ],
)
def test_other_examples_are_refused(change: object, words: str) -> None:
    full = right([True, False, True])
    with pytest.raises(ValueError, match=words):
        confidence.paired(full, change(full), "accuracy")  # type: ignore[operator]


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="level is 95"):
        confidence.interval("accuracy", right([True, False]), level=95)
    with pytest.raises(ValueError, match="5 bootstrap resamples"):
        confidence.interval("accuracy", right([True, False]), resamples=5)


def test_seeds_by_hand() -> None:
    found = confidence.over_seeds([0.5, 0.7, 0.9])
    assert found.mean == pytest.approx(0.7)
    assert found.standard_error == pytest.approx(0.2 / math.sqrt(3))
    assert found.n == 3
    assert math.isnan(confidence.over_seeds([0.5]).standard_error)
    with pytest.raises(ValueError, match="at least one"):
        confidence.over_seeds([])


def test_many_units_cost_little_memory_and_time() -> None:
    drawn = np.random.default_rng(0)
    values = np.column_stack([drawn.random(20_000), np.ones(20_000)])
    sums = confidence._resampled_sums(values, 400, 0)
    assert sums.shape == (400, 2)
    assert (sums[:, 1] == 20_000).all()
    means = sums[:, 0] / 20_000
    assert means.std() == pytest.approx(values[:, 0].std() / math.sqrt(20_000), rel=0.15)
