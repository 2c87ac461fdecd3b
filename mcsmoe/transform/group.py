"""Similarities of a layer's experts, and groupings as tables and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mcsmoe.adapters.base import Adapter
from mcsmoe.artefacts.tables import frame_of
from mcsmoe.calibration.evidence import Evidence
from mcsmoe.grouping.weighting import WEIGHTINGS, shares
from mcsmoe.methods import MERGES
from mcsmoe.similarity import similarity
from mcsmoe.similarity.base import SimilarityInputs
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.types import Grouping, LayerId

if TYPE_CHECKING:
    import pandas as pd


def layer_similarity(
    model: nn.Module, adapter: Adapter, layer: LayerId, base: str, evidence: Evidence, seed: int
) -> Tensor:
    """[E, E] similarity of a layer's experts."""
    weights = adapter.read_experts(model, layer)
    inputs = SimilarityInputs(
        statistics=evidence.layer(layer),
        weights=weights,
        router=adapter.read_router(model, layer),
        gradients=evidence.per_weight("gradient", layer, weights),
        activation=adapter.activation(model, layer),
        seed=seed,
        layer=layer,
    )
    return similarity(base, inputs)


def importance(statistics: LayerStatistics, merge: str) -> Tensor:
    """[E]: what the budget and the dominant experts are chosen by."""
    return statistics.saliency_E if MERGES[merge].importance == "saliency" else statistics.frequency_E


def similarity_frame(base: str, similarities: Mapping[LayerId, Tensor]) -> pd.DataFrame:
    """Table ``similarity``."""
    rows = [
        {"layer": layer, "base": base, "expert_i": i, "expert_j": j, "similarity": value}
        for layer, found_EE in similarities.items()
        for i, row in enumerate(found_EE.tolist())
        for j, value in enumerate(row)
    ]
    return frame_of(rows, "similarity")


def groups_frame(groupings: Mapping[LayerId, Grouping], evidence: Evidence, merge: str, seed: int) -> pd.DataFrame:
    """Table ``groups``; weights are those that ``merge`` gives whole experts (frequency where it weighs elements)."""
    weighed = WEIGHTINGS[MERGES[merge].weighting]
    rows = []
    for layer, grouping in groupings.items():
        weight_E = weighed(grouping, evidence.layer(layer).frequency_E, seed, layer)
        rows += grouping.rows(layer, shares(grouping, weight_E))
    return frame_of(rows, "groups")
