"""Scores of a language model by domain, from sums per document: intervals over documents, paired with a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

_CELLS = 4_000_000  # counts held at a time
ALL = "all"


@dataclass(frozen=True)
class Ratio:
    """A mean over tokens with its 95 % interval over documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DomainScore:
    """One domain: nats a token and, beside a reference, the paired difference, KL(reference, model) and agreement."""

    domain: str
    documents: int
    tokens: int
    nats: Ratio
    difference: Ratio | None = None
    divergence: Ratio | None = None
    agreement: Ratio | None = None


def ratio(
    sum_U: NDArray[np.float64], tokens_U: NDArray[np.int64] | NDArray[np.float64], resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Sum over tokens, with the percentile bootstrap over documents (Efron 1979).

    Args:
        sum_U: by document, a sum over its tokens.
        tokens_U: by document, their number, or what else the sum is to be divided by.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    units = len(sum_U)
    drawn = np.random.default_rng(seed)
    values = np.empty(resamples)
    step = max(1, _CELLS // max(1, units))
    both_U2 = np.stack([sum_U, tokens_U], axis=1).astype(np.float64)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        counts = drawn.multinomial(units, np.full(units, 1 / units), size=stop - start)
        sums_B2 = counts @ both_U2
        values[start:stop] = sums_B2[:, 0] / np.where(sums_B2[:, 1] > 0, sums_B2[:, 1], 1)
    low, high = np.quantile(values, [0.025, 0.975])
    return Ratio(float(sum_U.sum() / (tokens_U.sum() or 1)), float(low), float(high))


def by_domain(documents: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> list[DomainScore]:
    """Scores of each domain, the worst first, and of all documents together, as the last.

    A domain is the worse, the more nats a token it loses to the reference, or has where there is none.

    Args:
        documents: table ``language``.
        resamples, seed: as in ``ratio``.

    Raises:
        ValueError: there are no documents with a prediction.
    """
    scored = documents[documents["tokens"] > 0]
    if not len(scored):
        raise ValueError("no document has a token to predict; give longer texts")
    parts = [(str(name), part) for name, part in scored.groupby("domain", sort=True)]
    found = [_score(name, part, resamples, seed) for name, part in parts]
    found.sort(key=lambda one: -(one.nats if one.difference is None else one.difference).value)
    return found + ([_score(ALL, scored, resamples, seed)] if len(parts) > 1 else [])


def _score(name: str, part: pd.DataFrame, resamples: int, seed: int) -> DomainScore:
    tokens = part["tokens"].to_numpy(np.int64)

    def over(column: NDArray[np.float64]) -> Ratio | None:
        return None if np.isnan(column).any() else ratio(column, tokens, resamples, seed)

    nats, full = part["nats"].to_numpy(np.float64), part["reference_nats"].to_numpy(np.float64)
    return DomainScore(
        name,
        len(part),
        int(tokens.sum()),
        ratio(nats, tokens, resamples, seed),
        over(nats - full),
        over(part["divergence"].to_numpy(np.float64)),
        over(part["agreement"].to_numpy(np.float64)),
    )


def in_words(score: DomainScore) -> str:
    """One line for a reader."""
    nats = score.nats
    text = (
        f"{score.domain}: {nats.value:.4f} nats a token [{nats.low:.4f}, {nats.high:.4f}], perplexity "
        f"{math.exp(min(nats.value, 700)):.2f}, {score.documents} documents, {score.tokens} tokens"
    )
    if score.difference is not None and score.divergence is not None and score.agreement is not None:
        change = score.difference
        text += (
            f"; to the reference {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}], divergence "
            f"{score.divergence.value:.4f}, same likeliest token {score.agreement.value:.1%}"
        )
    return text
