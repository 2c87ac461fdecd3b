"""Merge the experts of a layer by its groups, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from mcsmoe import align
from mcsmoe.adapters.base import Adapter
from mcsmoe.calibration.evidence import Evidence
from mcsmoe.grouping import from_labels
from mcsmoe.merge import METHODS
from mcsmoe.merge.base import MergeInputs
from mcsmoe.methods import MERGES
from mcsmoe.transform.align import align_layer
from mcsmoe.types import Grouping, LayerId

if TYPE_CHECKING:
    import pandas as pd


def groupings_of(groups: pd.DataFrame, layers: Sequence[LayerId]) -> dict[LayerId, Grouping]:
    """The groupings in table ``groups``.

    Raises:
        ValueError: a layer of the model is missing, or its rows are no grouping; names it.
    """
    found: dict[LayerId, Grouping] = {}
    for layer in layers:
        rows = groups[groups["layer"] == layer].sort_values("expert")
        if rows["expert"].tolist() != list(range(len(rows))) or not len(rows):
            raise ValueError(f"layer {layer!r}: the groups name experts {rows['expert'].tolist()}, not each one once")
        found[layer] = from_labels(rows["group"].tolist(), rows["dominant"].tolist(), layer)
    return found


def merge_layer(
    model: nn.Module,
    adapter: Adapter,
    layer: LayerId,
    grouping: Grouping,
    method: str,
    evidence: Evidence,
    alignment: str = "none",
    seed: int = 0,
    workers: int = 1,
) -> None:
    """Merge the experts of one layer in place; ``alignment`` ``weight-dominant`` or ``activation-dominant`` aligns each
    group to its leader first."""
    weights, statistics = adapter.read_experts(model, layer), evidence.layer(layer)
    activation = adapter.activation(model, layer)
    needs = MERGES[method].needs
    fisher = evidence.per_weight("fisher", layer, weights) if "fisher" in needs else None
    if alignment.endswith("-dominant"):
        reference_E = grouping.dominant[grouping.expert_to_group]
        how = alignment.removesuffix("-dominant")
        found = align_layer(weights, reference_E, how, statistics, activation, workers, layer)
        weights = align.apply_permutation(weights, found.permutation_EF, layer)
        fisher = None if fisher is None else align.apply_permutation(fisher, found.permutation_EF, layer)
    merged = METHODS[method](
        MergeInputs(
            layer=layer,
            weights=weights,
            grouping=grouping,
            frequency_E=statistics.frequency_E,
            fisher=fisher,
            statistics=statistics,
            tokens=statistics.tokens(layer),
            gates=statistics.gates(layer),
            activation=activation,
            router=adapter.read_router(model, layer),
            saliency_E=statistics.saliency_E if "saliency" in needs else None,
            seed=seed,
            workers=workers,
        )
    )
    adapter.write_experts(model, layer, merged.weights, merged.expert_to_group)
    if merged.dropped_E is not None:
        adapter.mask_router(model, layer, merged.dropped_E)
