"""Decide which experts are merged: similarities of each layer, groups over all of them, and both as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from mcsmoe.artefacts.tables import frame_of
from mcsmoe.calibration.evidence import Evidence
from mcsmoe.console import log, progress
from mcsmoe.grouping import check_choices, plan
from mcsmoe.grouping.kept import keep_highest
from mcsmoe.grouping.sets import divide, join
from mcsmoe.grouping.weighting import WEIGHTINGS, shares
from mcsmoe.methods import MERGES, SIMILARITIES, require_known
from mcsmoe.similarity import similarity
from mcsmoe.similarity.base import SimilarityInputs
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.align import Aligner
from mcsmoe.transform.layers import Layers, SparseLayer
from mcsmoe.types import Grouping, LayerId, chosen_layers

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class GroupSettings:
    """How the experts of a model are grouped."""

    experts: int
    """Groups that are left in a layer, on average."""
    similarity: str = "router-logits"
    grouping: str = "dominant"
    budget: str = "adaptive"
    linkage: str = "average"
    capacity: int | None = None
    merge: str = "frequency"
    """The merge method that the groups are for: it says what experts are chosen by and how they weigh."""
    seed: int = 0
    exclude_layers: Sequence[LayerId] = ()

    def check(self, layers: Layers) -> None:
        """Refuse what cannot be, before anything is read.

        Raises:
            ValueError: a name that is not known, a number of experts that a layer does not have, a layer that the model
                does not have or that is merged already; names the field or the layer, the value and the remedy.
        """
        require_known("similarity", self.similarity, tuple(SIMILARITIES))
        require_known("merge", self.merge, tuple(MERGES))
        check_choices(self.grouping, self.budget, self.capacity, self.linkage)
        for layer in chosen_layers(layers.ids, self.exclude_layers):
            found = layers.structure(layer)
            experts = found.num_experts
            if not 1 <= self.experts <= experts:
                raise ValueError(f"experts is {self.experts}; layer {layer!r} has {experts}, give 1 to {experts}")
            if found.expert_to_group.unique().numel() != experts:
                raise ValueError(f"layer {layer!r} is merged already; start from the model it came from")
            if MERGES[self.merge].drops:
                found.check_dropping(self.experts)


@dataclass(frozen=True)
class Groups:
    """What grouping found out about each layer."""

    similarity: dict[LayerId, Tensor]
    """[E, E] of each layer."""
    groupings: dict[LayerId, Grouping]


def group_layers(layers: Layers, settings: GroupSettings, evidence: Evidence, align: Aligner | None = None) -> Groups:
    """Group the experts of every layer by their similarity.

    Args:
        align: how the experts stand to each other before they are compared neuron by neuron; None: as they are.

    Raises:
        ValueError: settings that cannot be, or evidence of another model; names the field or the layer.
    """
    settings.check(layers)
    needs = SIMILARITIES[settings.similarity].needs
    found: dict[LayerId, Tensor] = {}
    for name in progress(layers.ids, "similarity"):
        if needs <= {"statistics"}:
            found[name] = layer_similarity(layers.structure(name), settings, evidence)
            continue
        with layers.open(name) as layer:
            if align is not None and needs & {"weights", "tokens"}:
                align(layer)
            found[name] = layer_similarity(layer, settings, evidence)
    importances = {layer: importance(evidence.layer(layer), settings.merge) for layer in layers.ids}
    sets = {layer: layers.structure(layer).expert_sets for layer in layers.ids}
    groupings = _planned(importances, found, settings)
    apart = {
        layer: count
        for layer, count in sets.items()
        if count > 1 and settings.experts % count == 0 and groupings[layer].num_groups == settings.experts
    }
    # Where every layer has the same number, groups within the sets that a router chooses among can become a stock model.
    if apart and settings.budget == "uniform":
        for name, count in apart.items():
            one_set = replace(settings, experts=settings.experts // count, exclude_layers=())
            parts, names = divide({name: importances[name]}, apart)
            planned = _planned(parts, divide({name: found[name]}, apart)[0], one_set)
            groupings[name] = join([planned[part] for part in names[name]])
    if MERGES[settings.merge].drops:
        groupings = {
            name: keep_highest(grouping, importances[name], sets[name]) if sets[name] > 1 else grouping
            for name, grouping in groupings.items()
        }
    for name, grouping in groupings.items():
        log.info("%s: %d experts in %d groups", name, grouping.num_experts, grouping.num_groups)
    return Groups(found, groupings)


def _planned(
    importances: Mapping[LayerId, Tensor], similarity: Mapping[LayerId, Tensor], settings: GroupSettings
) -> dict[LayerId, Grouping]:
    return plan(
        importances,
        similarity,
        settings.experts,
        method=settings.grouping,
        budget=settings.budget,
        capacity=settings.capacity,
        linkage=settings.linkage,
        seed=settings.seed,
        excluded=settings.exclude_layers,
    )


def layer_similarity(layer: SparseLayer, settings: GroupSettings, evidence: Evidence) -> Tensor:
    """[E, E] similarity of a layer's experts."""
    needs = SIMILARITIES[settings.similarity].needs
    evidence.layer(layer.id).check_against(layer.id, layer.num_experts)
    weights = layer.view_experts() if needs & {"weights", "tokens", "gradients"} else None
    if weights is not None:
        evidence.check_against(layer.id, weights)
    inputs = SimilarityInputs(
        statistics=evidence.layer(layer.id),
        weights=weights,
        router=layer.read_router() if "router" in needs else None,
        gradients=None if weights is None else evidence.per_weight("gradient", layer.id, weights),
        activation=layer.activation,
        seed=settings.seed,
        layer=layer.id,
    )
    return similarity(settings.similarity, inputs)


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


def groups_frame(groupings: Mapping[LayerId, Grouping], settings: GroupSettings, evidence: Evidence) -> pd.DataFrame:
    """Table ``groups``; weights are those that the merge gives whole experts (frequency where it weighs elements)."""
    weighed = WEIGHTINGS[MERGES[settings.merge].weighting]
    rows = []
    for layer, grouping in groupings.items():
        weight_E = weighed(grouping, evidence.layer(layer).frequency_E, settings.seed, layer)
        rows += grouping.rows(layer, shares(grouping, weight_E))
    return frame_of(rows, "groups")
