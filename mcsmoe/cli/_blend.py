"""``--domains``: how much each domain counts in what a command decides, given or found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from mcsmoe.calibration.folder import FolderLayers
from mcsmoe.cli._domains import given_weights
from mcsmoe.criteria.quadratic import Limits
from mcsmoe.methods import MAX_MIN
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.transform.domains import mixed
from mcsmoe.types import LayerId

DOMAINS = "domains.json"
"""How ``max-min`` weighs the domains, and the error predicted for each."""

MIXED_BY = "gram"
"""What predicts the error of a merge for ``max-min``: that of leaving out as many experts."""


def max_min_weights(
    by_domain: Callable[[LayerId], Mapping[str, LayerStatistics]],
    counts: Mapping[LayerId, int],
    criterion: str,
    limits: Mapping[LayerId, Limits],
    weights: Mapping[str, float] | None,
    seed: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights by which the worst domain suffers least, and what was found, as a JSON page by name."""
    given, found = mixed(by_domain, counts, criterion, limits, weights, seed)
    page = {"weights": found.weights, "errors": found.errors, "given": vars(given)}
    return found.weights, {DOMAINS: page}


def check_weights(arguments: argparse.Namespace) -> None:
    """Raise ValueError, before any pass, where ``--domains`` does not fit the files of ``--calibration``."""
    if arguments.calibration is not None:
        given_weights(arguments.domains, [one.name for one in arguments.calibration])


def weighed(
    found: RoutingStatistics, counts: Mapping[LayerId, int], arguments: argparse.Namespace
) -> tuple[RoutingStatistics, dict[str, Any]]:
    """Statistics of a folder with its domains weighed as ``--domains`` says, and pages on how that was found.

    Raises:
        ValueError: the statistics are of one mixture alone, or weights that do not fit their domains; names the option.
    """
    if arguments.domains is None:
        return found, {}
    layers: Any = found.layers
    if not isinstance(layers, FolderLayers):
        raise ValueError(
            f"--domains weighs domains, of which {arguments.statistics} says nothing: give --calibration FILE for each, or a "
            "folder of mcsmoe collect"
        )
    weights = given_weights(arguments.domains, list(layers.by_domain(next(iter(layers)))))
    pages: dict[str, Any] = {}
    if arguments.domains == MAX_MIN:
        weights, pages = max_min_weights(layers.by_domain, counts, MIXED_BY, {}, layers.weights, arguments.seed)
    weighed_layers: Any = FolderLayers(layers.folder, layers.files, weights)
    found.layers = weighed_layers
    return found, pages
