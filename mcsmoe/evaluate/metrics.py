"""Scores of the tasks, and what each unit contributes to them.

Every metric here is a function of sums over independent units (the example; the question where a metric is defined by
question). A bootstrap then needs no more than weighted sums, and resamples what was really drawn independently.

Conventions: the column ``correct`` decides. An answer that could not be parsed is wrong, and in an F1 it counts as
the opposite of the right class, so that silence is never worth more than a guess.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
SEPARATOR = " | "  # between the references in one cell of table ``predictions``
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LARGEST_EXPONENT = 700.0  # of what a float holds
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


@dataclass(frozen=True)
class Units:
    """A metric as a function of sums over independent units.

    Attributes:
        ids: the U units: ``idx`` of the example, or the question.
        statistics_US: each unit's contribution to S sums.
        combine: (..., S) sums -> (...) values of the metric; of a score of answers in [0, 1].
        binary: each unit contributes 0 or 1 and the metric is their mean, so an exact test of proportions applies.
    """

    ids: NDArray[np.str_]
    statistics_US: Array
    combine: Callable[[Array], Array]
    binary: bool = False

    @property
    def n(self) -> int:
        return len(self.ids)

    def value(self) -> float:
        return float(self.combine(self.statistics_US.sum(axis=0)))


# -- answers in words ----------------------------------------------------------------------------------------------
def normalise_answer(text: str) -> str:
    """Answer as SQuAD and HotpotQA compare it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalised answer is one of the normalised references, else 0."""
    answer = normalise_answer(prediction)
    return float(any(answer == normalise_answer(reference) for reference in references))


def _overlap(prediction: str, reference: str) -> float:
    answer, truth = prediction.split(), reference.split()
    common = sum((Counter(answer) & Counter(truth)).values())
    # Without a common word it is 0, also where nothing is left of both ("the" against "a"), as in the scripts of SQuAD 1.1
    # and HotpotQA; it is SQuAD 2.0's script, whose questions may have no answer, that calls two empty ones equal.
    return 2 * common / (len(answer) + len(truth)) if common else 0.0


def token_f1(prediction: str, references: Sequence[str], closed: bool = False) -> float:
    """Best F1 of the answer's words against a reference, words counted as often as they occur.

    Args:
        closed: HotpotQA's rule: where the answer or the reference is yes, no or noanswer, only equality counts.
    """
    answer, best = normalise_answer(prediction), 0.0
    for reference in map(normalise_answer, references):
        if closed and (answer in _CLOSED_ANSWERS or reference in _CLOSED_ANSWERS):
            best = max(best, float(answer == reference))
        else:
            best = max(best, _overlap(answer, reference))
    return best


def join_references(references: Sequence[str]) -> str:
    """References in one cell, such that ``split_references`` finds them again (a separator inside one is dropped)."""
    return SEPARATOR.join(" ".join(str(one).split(SEPARATOR)) for one in references)


def split_references(cell: str) -> list[str]:
    return cell.split(SEPARATOR)


# -- one unit = one example ----------------------------------------------------------------------------------------
def _mean(sums: Array) -> Array:
    return _ratio(sums[..., 0], sums[..., 1])


def _ratio(above: Array, below: Array) -> Array:
    """Quotient, 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=np.asarray(below) > 0)


def _means(ids: Sequence[str], values: Array, binary: bool) -> Units:
    statistics = np.column_stack([values, np.ones(len(values))])
    return Units(np.asarray(ids, dtype=str), statistics, _mean, binary)


def _correct(predictions: pd.DataFrame) -> NDArray[np.bool_]:
    return predictions["correct"].to_numpy(dtype=bool)


def _accuracy(predictions: pd.DataFrame, positive: str) -> Units:
    return _means(predictions["idx"].tolist(), _correct(predictions).astype(np.float64), binary=True)


def _words(score: Callable[[str, Sequence[str]], float]) -> Callable[[pd.DataFrame, str], Units]:
    def units_of(predictions: pd.DataFrame, positive: str) -> Units:
        pairs = zip(predictions["prediction"], predictions["reference"], strict=True)
        values = np.array([score(answer, split_references(cell)) for answer, cell in pairs], dtype=np.float64)
        return _means(predictions["idx"].tolist(), values, binary=False)

    return units_of


def _f1_of_counts(sums: Array) -> Array:
    """F1 from (..., 3) true positives, false positives, false negatives; 0 where the class occurs nowhere."""
    return _ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def _truth_and_answer(predictions: pd.DataFrame, positive: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows are positive, and which were answered so; a wrong answer is the opposite of the truth."""
    if not positive:
        raise ValueError("an F1 needs the positive answer; give positive=, the second of the task's choices")
    truth = (predictions["reference"] == positive).to_numpy(dtype=bool)
    return truth, truth == _correct(predictions)


def _counts(truth: NDArray[np.bool_], answer: NDArray[np.bool_]) -> Array:
    return np.column_stack([truth & answer, ~truth & answer, truth & ~answer]).astype(np.float64)


def _f1(predictions: pd.DataFrame, positive: str) -> Units:
    counts = _counts(*_truth_and_answer(predictions, positive))
    return Units(np.asarray(predictions["idx"].tolist(), dtype=str), counts, _f1_of_counts)


def _classes(predictions: pd.DataFrame) -> tuple[list[str], NDArray[np.str_], NDArray[np.str_]]:
    reference = np.asarray(predictions["reference"].tolist(), dtype=str)
    answer = np.where(_correct(predictions), reference, np.asarray(predictions["prediction"].tolist(), dtype=str))
    return sorted(set(reference.tolist())), reference, answer


def _macro_f1(predictions: pd.DataFrame, positive: str) -> Units:
    classes, reference, answer = _classes(predictions)
    counts = np.concatenate([_counts(reference == one, answer == one) for one in classes], axis=1)

    def combine(sums: Array) -> Array:
        return _f1_of_counts(sums.reshape(*sums.shape[:-1], len(classes), 3)).mean(axis=-1)

    return Units(np.asarray(predictions["idx"].tolist(), dtype=str), counts, combine)


# -- one unit = one question (MultiRC) -----------------------------------------------------------------------------
def _by_question(predictions: pd.DataFrame, columns: Array) -> tuple[NDArray[np.str_], Array]:
    """Sums of the rows' columns over each question, questions in order of their names."""
    groups = np.asarray(predictions["group"].tolist(), dtype=str)
    if (groups == "").any():
        raise ValueError(
            "a metric by question needs the column group; it is empty for "
            f"idx {predictions['idx'].tolist()[int((groups == '').argmax())]!r}"
        )
    questions, owner = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(questions), columns.shape[1]))
    np.add.at(sums, owner, columns)
    return questions, sums


def _f1a(predictions: pd.DataFrame, positive: str) -> Units:
    questions, sums = _by_question(predictions, _counts(*_truth_and_answer(predictions, positive)))
    return Units(questions, sums, _f1_of_counts)


def _f1m(predictions: pd.DataFrame, positive: str) -> Units:
    questions, sums = _by_question(predictions, _counts(*_truth_and_answer(predictions, positive)))
    hits, answered, true = sums[:, 0], sums[:, 0] + sums[:, 1], sums[:, 0] + sums[:, 2]
    precision = np.where(answered > 0, _ratio(hits, answered), 1.0)
    recall = np.where(true > 0, _ratio(hits, true), 1.0)

    def combine(totals: Array) -> Array:
        mean_precision, mean_recall = _ratio(totals[..., 0], totals[..., 2]), _ratio(totals[..., 1], totals[..., 2])
        return _ratio(2 * mean_precision * mean_recall, mean_precision + mean_recall)

    return Units(questions, np.column_stack([precision, recall, np.ones(len(questions))]), combine)


def _exact_match(predictions: pd.DataFrame, positive: str) -> Units:
    """Share of units with every answer right: the unit is the question where there are questions, else the example."""
    if not any(predictions["group"]):
        return _accuracy(predictions, positive)
    wrong = (~_correct(predictions)).astype(np.float64)[:, None]
    questions, sums = _by_question(predictions, wrong)
    return _means(questions.tolist(), (sums[:, 0] == 0).astype(np.float64), binary=True)


# -- one unit = one document ---------------------------------------------------------------------------------------
def _over_tokens(*columns: str) -> Callable[[pd.DataFrame, str], Units]:
    """The first column, less the others, by token."""

    def units_of(documents: pd.DataFrame, positive: str) -> Units:
        first, *others = (documents[column].to_numpy(np.float64) for column in columns)
        values = first - sum(others) if others else first
        statistics = np.column_stack([values, documents["tokens"].to_numpy(np.float64)])
        return Units(np.asarray(documents["idx"].tolist(), dtype=str), statistics, _mean)

    return units_of


def _perplexity(documents: pd.DataFrame, positive: str) -> Units:
    nats = _over_tokens("nats")(documents, positive)
    return Units(nats.ids, nats.statistics_US, lambda sums: np.exp(np.minimum(_mean(sums), _LARGEST_EXPONENT)))


def _of_continued(column: str) -> Callable[[pd.DataFrame, str], Units]:
    """Mean over the documents that were continued."""

    def units_of(documents: pd.DataFrame, positive: str) -> Units:
        values = documents[column].to_numpy(np.float64)
        known = ~np.isnan(values)
        statistics = np.column_stack([np.where(known, values, 0.0), known.astype(np.float64)])
        return Units(np.asarray(documents["idx"].tolist(), dtype=str), statistics, _mean)

    return units_of


def _hotpot_f1(answer: str, references: Sequence[str]) -> float:
    return token_f1(answer, references, closed=True)


METRICS: dict[str, Callable[[pd.DataFrame, str], Units]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "f1a": _f1a,
    "f1m": _f1m,
    "exact_match": _exact_match,
    "token_f1": _words(token_f1),
    "hotpot_f1": _words(_hotpot_f1),
    "nats": _over_tokens("nats"),
    "nats_lost": _over_tokens("nats", "reference_nats"),
    "perplexity": _perplexity,
    "divergence": _over_tokens("divergence"),
    "agreement": _over_tokens("agreement"),
    "looping": _of_continued("looping"),
    "distinct_4grams": _of_continued("distinct_4grams"),
}
LESS_IS_BETTER = frozenset({"nats", "nats_lost", "perplexity", "divergence", "looping"})
"""Metrics of which a smaller value is the better one."""
_ANSWER_SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {"token_f1": token_f1, "hotpot_f1": _hotpot_f1}


def check_metric(metric: str) -> None:
    """Raises ValueError, with the known names, for an unknown metric."""
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; there are {', '.join(METRICS)}")


def answer_score(metric: str, prediction: str, references: Sequence[str], correct: bool) -> float:
    """One example's contribution to ``metric`` (column ``score``): word overlap for answers in words, else 0 or 1."""
    score = _ANSWER_SCORES.get(metric)
    return float(correct) if score is None else score(prediction, references)


def units(metric: str, predictions: pd.DataFrame, positive: str = "") -> Units:
    """``metric`` as sums over its units.

    Args:
        metric: a name of ``METRICS``. ``accuracy`` (share right), ``f1`` (of the positive class), ``macro_f1`` (mean
            F1 of the reference's classes), ``exact_match`` (share of units with every answer right), ``token_f1``
            (SQuAD's F1 of words, best over the references), ``hotpot_f1`` (the same with HotpotQA's rule for yes and
            no); MultiRC's ``f1a`` (F1 over all answers) and ``f1m`` (harmonic mean of the precision and the recall
            averaged over questions; Khashabi et al. 2018). Where the column ``group`` names questions, the unit of
            ``f1a``, ``f1m`` and ``exact_match`` is the question; else, and for the others, it is the example. Of texts:
            ``nats`` a token, ``nats_lost`` of them to the reference, ``perplexity``, ``divergence`` (KL from the
            reference), ``agreement`` of the likeliest token with the reference's, and of greedy continuations the share
            that is ``looping`` and of ``distinct_4grams``; the unit is the document.
        predictions: table ``predictions``, or ``documents`` for texts.
        positive: the answer that counts as positive in ``f1``, ``f1a`` and ``f1m``.

    Raises:
        ValueError: unknown metric, empty table, no positive answer, or a question's name missing; says which.
    """
    check_metric(metric)
    if predictions.empty:
        raise ValueError(f"there are no predictions to compute {metric!r} from; the split is empty")
    return METRICS[metric](predictions, positive)


def score(metrics: Sequence[str], predictions: pd.DataFrame, positive: str = "") -> dict[str, float]:
    """Value of each metric, in [0, 1]; see ``units`` for the names and the errors.

    The classification metrics are scikit-learn's; the sums that the intervals use are tested to agree with them.
    """
    return {metric: _by_library(metric, predictions, positive) for metric in metrics}


def _by_library(metric: str, predictions: pd.DataFrame, positive: str) -> float:
    summed = units(metric, predictions, positive)
    if metric not in ("f1", "f1a", "macro_f1"):
        return summed.value()
    from sklearn.metrics import f1_score

    if metric == "macro_f1":
        classes, reference, answer = _classes(predictions)
        return float(f1_score(reference, answer, labels=classes, average="macro", zero_division=0))
    truth, answered = _truth_and_answer(predictions, positive)
    return float(f1_score(truth, answered, zero_division=0))


def positive_answer(choices: Sequence[Sequence[str]]) -> str:
    """The positive class of a two-way task: the second choice, where every example has the same two; else empty."""
    first = list(choices[0]) if len(choices) else []
    if len(first) != 2 or any(list(one) != first for one in choices):
        return ""
    return str(first[1])
