"""Scores of texts, of all documents together and of each domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mcsmoe.evaluate.confidence import Interval, interval

if TYPE_CHECKING:
    import pandas as pd

BY_DOMAIN = ("nats", "nats_lost")
"""Metrics that are told of each domain too."""

WORST = "worst"
"""Stands in the place of a domain for the one that lost most to the reference."""


def scores(
    metrics: Sequence[str], documents: pd.DataFrame, resamples: int, seed: int
) -> Iterator[tuple[str, Interval]]:
    """(name, score with its interval over documents) of each metric, and as ``METRIC/DOMAIN`` of each domain.

    Of several domains also ``nats_lost/worst``: the score, with its own interval, of the domain that lost most.

    Args:
        documents: table ``documents``.
        resamples, seed: of the bootstrap.
    """
    for metric in metrics:
        yield metric, interval(metric, documents, resamples=resamples, seed=seed)
    domains = {str(name): part for name, part in documents.groupby("group", sort=True)}
    for metric in (metric for metric in metrics if metric in BY_DOMAIN):
        found = {name: interval(metric, part, resamples=resamples, seed=seed) for name, part in domains.items()}
        yield from ((f"{metric}/{name}", one) for name, one in found.items())
        if metric == "nats_lost" and len(found) > 1:
            yield f"{metric}/{WORST}", max(found.values(), key=lambda one: one.value)
