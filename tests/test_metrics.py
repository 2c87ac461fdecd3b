"""Metrics against values computed by hand, and their sums against scikit-learn's formulas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from mcsmoe.evaluate import metrics


def table(rows: list[tuple[str, str, bool]], groups: list[str] | None = None) -> pd.DataFrame:
    """Rows are (reference, prediction, correct)."""
    return pd.DataFrame(
        {
            "idx": [str(number) for number in range(len(rows))],
            "reference": [row[0] for row in rows],
            "prediction": [row[1] for row in rows],
            "correct": [row[2] for row in rows],
            "score": [float(row[2]) for row in rows],
            "group": groups or [""] * len(rows),
        }
    )


def binary(pairs: str, groups: list[str] | None = None) -> pd.DataFrame:
    """``"yn nn"``: truth then answer of each row; y is positive, anything but y and n is unparsed."""
    return table([(pair[0], pair[1], pair[0] == pair[1]) for pair in pairs.split()], groups)


def test_accuracy_and_f1_by_hand() -> None:
    rows = binary("yy yy yn ny nn nn")  # 2 true positives, 1 false negative, 1 false positive
    found = metrics.score(["accuracy", "f1", "macro_f1"], rows, positive="y")
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["macro_f1"] == pytest.approx((4 / 6 + 4 / 6) / 2)


def test_unparsed_answers_are_the_wrong_class() -> None:
    silent = metrics.score(["accuracy", "f1"], binary("yy y? n? nn"), positive="y")
    wrong = metrics.score(["accuracy", "f1"], binary("yy yn ny nn"), positive="y")
    assert silent == wrong == {"accuracy": 0.5, "f1": 0.5}


def test_macro_f1_of_three_classes_by_hand() -> None:
    rows = table([("a", "a", True), ("a", "b", False), ("b", "b", True), ("c", "b", False), ("c", "??", False)])
    # a: 1 of 1 found, 1 missed -> 2/3. b: 1 right, 2 taken wrongly -> 2/4. c: nothing -> 0.
    assert metrics.score(["macro_f1"], rows)["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_f1_where_no_row_is_positive_is_zero() -> None:
    assert metrics.score(["f1"], binary("nn nn"), positive="y") == {"f1": 0.0}


def test_multirc_by_hand() -> None:
    # Question p: truth y y n, answered y n n -> precision 1, recall 1/2, not all right.
    # Question q: truth n n, answered y n     -> precision 0, recall 1 (nothing to find), not all right.
    # Question r: truth y n, answered y n     -> precision 1, recall 1, all right.
    # Question s: truth y, answered n         -> precision 1 (nothing claimed), recall 0.
    rows = binary("yy yn nn ny nn yy nn yn", ["p", "p", "p", "q", "q", "r", "r", "s"])
    found = metrics.score(["f1a", "f1m", "exact_match"], rows, positive="y")
    assert found["f1a"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    precision, recall = (1 + 0 + 1 + 1) / 4, (0.5 + 1 + 1 + 0) / 4
    assert found["f1m"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["exact_match"] == pytest.approx(1 / 4)
    for name in found:
        assert metrics.units(name, rows, "y").ids.tolist() == ["p", "q", "r", "s"]


def test_questions_need_not_be_together() -> None:
    rows = binary("yy yn nn ny nn yy nn yn", ["p", "p", "p", "q", "q", "r", "r", "s"])
    shuffled = rows.sample(frac=1, random_state=1).reset_index(drop=True)
    names = ["f1a", "f1m", "exact_match"]
    assert metrics.score(names, shuffled, "y") == metrics.score(names, rows, "y")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's, pajamas!", "cats pajamas"),
        ("A an the", ""),
        ("Anthem\tof a nation", "anthem of nation"),
        ("U.S.A.", "usa"),
        ("semi-final", "semifinal"),
        ("Beyoncé", "beyoncé"),
        ("the-a", "thea"),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert metrics.normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "references", "match", "overlap"),
    [
        ("the Norman Conquest", ["Norman conquest", "1066"], 1.0, 1.0),
        ("Norman conquest of England", ["Norman conquest", "England"], 0.0, 2 * 2 / (4 + 2)),
        ("in 1066", ["1066", "year 1066 in England"], 0.0, 2 / 3),
        ("dog dog cat", ["dog cat cat"], 0.0, 2 / 3),  # words count as often as both have them: dog, cat
        ("blue", ["red"], 0.0, 0.0),
        ("", ["red"], 0.0, 0.0),
        ("the", ["a"], 1.0, 0.0),
    ],
)
def test_answers_in_words_take_the_best_reference(
    answer: str, references: list[str], match: float, overlap: float
) -> None:
    assert metrics.exact_match(answer, references) == match
    assert metrics.token_f1(answer, references) == pytest.approx(overlap)


@pytest.mark.parametrize(
    ("answer", "reference", "plain", "closed"),
    [
        ("yes", "Yes.", 1.0, 1.0),
        ("yes it is", "yes", 0.5, 0.0),
        ("no", "no way", 2 / 3, 0.0),
        ("no way out", "no way", 0.8, 0.8),
        ("yes", "no", 0.0, 0.0),
    ],
)
def test_hotpot_takes_yes_and_no_whole(answer: str, reference: str, plain: float, closed: float) -> None:
    assert metrics.token_f1(answer, [reference]) == pytest.approx(plain)
    assert metrics.token_f1(answer, [reference], closed=True) == pytest.approx(closed)
    rows = table([(reference, answer, False), ("x", "x", True)])
    found = metrics.score(["token_f1", "hotpot_f1"], rows)
    assert found == {"token_f1": pytest.approx((plain + 1) / 2), "hotpot_f1": pytest.approx((closed + 1) / 2)}


def test_references_survive_the_cell() -> None:
    references = ["one", "two | three", "4"]
    cell = metrics.join_references(references)
    assert metrics.split_references(cell) == ["one", "two three", "4"]
    rows = table([(cell, "the two three", True)])
    assert metrics.score(["token_f1"], rows)["token_f1"] == 1.0


def test_sums_over_any_resample_equal_the_metric_of_the_resampled_rows() -> None:
    drawn = np.random.default_rng(0)
    pairs = " ".join("".join(drawn.choice(["y", "n"], 2)) for _ in range(40))
    groups = [f"q{number // 4}" for number in range(40)]
    for metric in ("accuracy", "f1", "macro_f1", "f1a", "f1m", "exact_match", "token_f1"):
        rows = binary(pairs, groups if metric in ("f1a", "f1m", "exact_match") else None)
        units = metrics.units(metric, rows, "y")
        assert units.value() == pytest.approx(metrics.score([metric], rows, "y")[metric])
        taken = drawn.integers(0, units.n, units.n)
        by_sums = float(units.combine(units.statistics_US[taken].sum(axis=0)))
        key = "group" if units.n == 10 else "idx"
        parts = [rows[rows[key] == units.ids[one]].assign(group=f"copy{copy}") for copy, one in enumerate(taken)]
        resampled = pd.concat(parts, ignore_index=True)
        if key == "idx":
            resampled["group"] = ""
        assert by_sums == pytest.approx(metrics.score([metric], resampled, "y")[metric]), metric


def test_positive_answer() -> None:
    assert metrics.positive_answer([["wrong", "right"]] * 3) == "right"
    assert metrics.positive_answer([["a", "b"], ["c", "d"]]) == ""
    assert metrics.positive_answer([["a", "b", "c"]]) == ""
    assert metrics.positive_answer([[], []]) == ""
    assert metrics.positive_answer([]) == ""


@pytest.mark.parametrize(
    ("metric", "rows", "positive", "words"),
    [
        ("bleu", binary("yy"), "y", "metric 'bleu' is unknown"),
        ("f1", binary("yy"), "", "needs the positive answer"),
        ("f1m", binary("yy"), "y", "column group.*'0'"),
        ("accuracy", binary("yy").iloc[:0], "", "split is empty"),
    ],
)
def test_bad_input_is_named(metric: str, rows: pd.DataFrame, positive: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metrics.score([metric], rows, positive)


def test_importing_is_cheap() -> None:
    code = (
        "import sys, mcsmoe.evaluate.confidence, mcsmoe.evaluate.metrics, mcsmoe.evaluate.protocols\n"
        "print([n for n in ('torch', 'transformers', 'sklearn', 'scipy', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
