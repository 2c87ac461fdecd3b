"""Merge the experts of every layer by its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcsmoe.align import apply_permutation
from mcsmoe.calibration.evidence import Evidence
from mcsmoe.console import progress
from mcsmoe.grouping import from_labels
from mcsmoe.merge import METHODS
from mcsmoe.merge.base import Merged, MergeInputs
from mcsmoe.methods import MERGES, require_known
from mcsmoe.transform.align import TO_LEADER, Aligner, AlignmentSettings, align_layer, reorder
from mcsmoe.transform.layers import Layers, SparseLayer
from mcsmoe.types import Grouping, LayerId

if TYPE_CHECKING:
    import pandas as pd


def groupings_of(groups: pd.DataFrame, layers: Sequence[LayerId]) -> dict[LayerId, Grouping]:
    """The groupings in table ``groups``.

    Raises:
        ValueError: a layer of the model is missing, or its rows are no grouping; names it.
    """
    found: dict[LayerId, Grouping] = {}
    foreign = sorted(set(groups["layer"]) - set(layers))
    if foreign:
        raise ValueError(f"layer {foreign[0]!r} of the groups is not in the model, which has {list(layers)}")
    for layer in layers:
        rows = groups[groups["layer"] == layer].sort_values("expert")
        if rows["expert"].tolist() != list(range(len(rows))) or not len(rows):
            raise ValueError(f"layer {layer!r}: the groups name experts {rows['expert'].tolist()}, not each one once")
        found[layer] = from_labels(rows["group"].tolist(), rows["dominant"].tolist(), layer)
    return found


@dataclass(frozen=True)
class MergeSettings:
    """How the experts of each group become one."""

    merge: str = "frequency"
    alignment: str = "none"
    """Only an alignment to the leader of each group is for merging; others are done before there are groups."""
    seed: int = 0
    threads: int = 1

    def check(self, evidence: Evidence) -> None:
        """Refuse, before anything is read, a merge that is not known or that needs what was not collected.

        Raises:
            ValueError: names the merge and what it needs.
        """
        require_known("merge", self.merge, tuple(MERGES))
        AlignmentSettings(self.alignment, self.threads).check(evidence.routing)
        needs = MERGES[self.merge].needs
        if "fisher" in needs and not evidence.tensors:
            raise ValueError(f"merge is {self.merge!r}, which needs Fisher information; collect gradients first")
        # A layer that no token reached has no saliency, and that is right.
        measured = [
            bool(one.saliency_tokens_E.any()) for one in evidence.routing.layers.values() if one.computed_E.any()
        ]
        if "saliency" in needs and not all(measured):
            raise ValueError(
                f"merge is {self.merge!r}, which needs the saliency of experts, and these statistics have none; "
                "collect them with it"
            )


def merge_layers(
    layers: Layers,
    groupings: Mapping[LayerId, Grouping],
    settings: MergeSettings,
    evidence: Evidence,
    align: Aligner | None = None,
) -> None:
    """Merge the experts of every layer by its groups; layers without groups to merge stay as they are.

    Args:
        align: how the experts of a layer are aligned before; None: they are already, or not at all.

    Raises:
        ValueError: a merge that needs what was not collected, or evidence of another model; names it.
    """
    settings.check(evidence)
    for name, grouping in groupings.items():
        experts = layers.structure(name).num_experts
        if grouping.num_experts != experts:
            raise ValueError(
                f"layer {name!r}: the groups are of {grouping.num_experts} experts, the layer has {experts}"
            )
        evidence.layer(name).check_against(name, experts)

    def merge(layer: SparseLayer) -> None:
        grouping = groupings[layer.id]
        if grouping.num_groups == grouping.num_experts:
            return
        if align is not None:
            align(layer)
        merge_layer(layer, grouping, settings, evidence)

    layers.change(merge, progress(list(groupings), "merge"))


def merge_layer(layer: SparseLayer, grouping: Grouping, settings: MergeSettings, evidence: Evidence) -> None:
    """Merge the experts of one layer in place, aligned to the leaders of their groups first where that is asked for."""
    merged = merge_experts(layer, grouping, settings, evidence)
    if merged.dropped_E is None:
        layer.write_experts(merged.weights, merged.expert_to_group)
    else:
        layer.drop_experts(merged.weights, merged.expert_to_group, merged.dropped_E)


def merge_experts(layer: SparseLayer, grouping: Grouping, settings: MergeSettings, evidence: Evidence) -> Merged:
    """What ``merge_layer`` would install; of the layer itself only the order of neurons may change."""
    weights, statistics, needs = layer.view_experts(), evidence.layer(layer.id), MERGES[settings.merge].needs
    evidence.check_against(layer.id, weights)
    fisher = evidence.per_weight("fisher", layer.id, weights) if "fisher" in needs else None
    if settings.alignment.endswith(TO_LEADER):
        reference_E = grouping.dominant[grouping.expert_to_group]
        how = settings.alignment.removesuffix(TO_LEADER)
        found = align_layer(weights, reference_E, how, statistics, layer.activation, settings.threads, layer.id)
        reorder(layer, weights, found.permutation_EF)
        fisher = None if fisher is None else apply_permutation(fisher, found.permutation_EF, layer.id)
    return METHODS[settings.merge](
        MergeInputs(
            layer=layer.id,
            weights=weights,
            grouping=grouping,
            frequency_E=statistics.frequency_E,
            fisher=fisher,
            statistics=statistics,
            tokens=statistics.tokens(layer.id),
            gates=statistics.gates(layer.id),
            activation=layer.activation,
            router=layer.read_router(),
            saliency_E=statistics.saliency_E if "saliency" in needs else None,
            expert_sets=layer.expert_sets,
            seed=settings.seed,
            workers=settings.threads,
        )
    )
