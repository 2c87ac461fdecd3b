"""Between models and arithmetic: reads layers through an adapter, applies a numerical module, and writes them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mcsmoe import align
from mcsmoe.adapters.base import Adapter
from mcsmoe.calibrate import expert_tensors, load_statistics, load_tensors
from mcsmoe.compress.lowrank import decompose, decompose_whitened
from mcsmoe.grouping import from_labels
from mcsmoe.merge import METHODS, MergeInputs, shares
from mcsmoe.merge.average import random_importance
from mcsmoe.routing import LayerStatistics, RoutingStatistics
from mcsmoe.similarity import SimilarityInputs, similarity
from mcsmoe.types import ExpertActivation, ExpertWeights, Grouping, LayerId, LowRankFactors, Role

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Evidence:
    """What calibration found out about a model: routing statistics, gradients, and how its neurons were moved since."""

    routing: RoutingStatistics
    tensors: Mapping[str, Tensor]
    permutations: Mapping[LayerId, Tensor]

    @staticmethod
    def read(routing: Path, gradients: Path | None = None, permutation: Path | None = None) -> Evidence:
        """Read the files that the stages before have written."""
        moved: dict[LayerId, Tensor] = {}
        if permutation is not None:
            from mcsmoe.tables import read_table

            for layer, rows in read_table(permutation, "permutation").groupby("layer", sort=False):
                moved[str(layer)] = torch.tensor(rows.sort_values("expert")["permutation"].tolist())
        found = {} if gradients is None else load_tensors(gradients)
        return Evidence(load_statistics(routing), found, moved)

    def layer(self, layer: LayerId) -> LayerStatistics:
        """Statistics of one layer.

        Raises:
            ValueError: they are of another model; names the layer.
        """
        if layer not in self.routing.layers:
            raise ValueError(f"layer {layer!r}: no routing statistics; they have {sorted(self.routing.layers)}")
        return self.routing.layers[layer]

    def per_weight(self, kind: str, layer: LayerId, like: ExpertWeights) -> ExpertWeights | None:
        """Gradients (``gradient``) or Fisher information (``fisher``), in the neuron order of ``like``."""
        if not self.tensors:
            return None
        found = expert_tensors(dict(self.tensors), kind, layer, like)
        return align.apply_permutation(found, self.permutations[layer], layer) if layer in self.permutations else found


# -- alignment ---------------------------------------------------------------------------------------------------
def align_layer(
    weights: ExpertWeights,
    reference_E: Tensor,
    how: str,
    statistics: LayerStatistics | None,
    activation: ExpertActivation,
    workers: int = 1,
    layer: LayerId = "",
    pool_E: Tensor | None = None,
) -> align.Alignment:
    """Align experts ``weight`` (whole neurons), ``weight-input`` (without the output projection) or by ``activation``.

    Raises:
        ValueError: activations are to be compared but there are no statistics; names the layer.
    """
    if how != "activation":
        return align.align_by_weight(weights, reference_E, how == "weight", workers, layer)
    if statistics is None:
        raise ValueError(f"layer {layer!r}: alignment by activation needs routing statistics; give --routing")
    return align.align_by_tokens(weights, statistics.tokens(layer), activation, reference_E, pool_E, workers, layer)


# -- grouping ----------------------------------------------------------------------------------------------------
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
    return statistics.saliency_E if merge == "reap" else statistics.frequency_E


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


# -- merging -----------------------------------------------------------------------------------------------------
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
    fisher = evidence.per_weight("fisher", layer, weights) if method == "fisher" else None
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
            saliency_E=statistics.saliency_E if method == "reap" else None,
            seed=seed,
            workers=workers,
        )
    )
    adapter.write_experts(model, layer, merged.weights, merged.expert_to_group)
    if merged.dropped_E is not None:
        adapter.mask_router(model, layer, merged.dropped_E)


# -- compression -------------------------------------------------------------------------------------------------
@torch.no_grad()
def split_experts(
    model: nn.Module,
    adapter: Adapter,
    rank: int,
    statistics: RoutingStatistics | None = None,
    layers: Iterable[LayerId] | None = None,
) -> None:
    """Replace every expert matrix by low-rank factors and a dense residual, in place.

    With ``statistics`` the decomposition is activation-aware: inputs of an output projection are the hidden activations
    of the group's calibration tokens.
    """
    for layer in adapter.layers(model) if layers is None else layers:
        weights, table = adapter.read_experts(model, layer), adapter.expert_to_group(model, layer)
        grams = {}
        if statistics is not None:
            grams = input_grams(weights, table, statistics.layers[layer], adapter.activation(model, layer))
        factors: dict[str, LowRankFactors] = {}
        for name in weights.names(Role.INPUT, Role.OUTPUT):
            matrix, where = weights.tensors[name], f"layer {layer!r}, {name}"
            if name in grams:
                factors[name] = decompose_whitened(matrix, grams[name], rank, where)
            else:
                factors[name] = decompose(matrix, rank, where)
        biases = {name: weights.tensors[name] for name in weights.names(Role.INPUT_BIAS, Role.OUTPUT_BIAS)}
        adapter.write_compressed(model, layer, factors, biases, table)


def input_grams(
    weights: ExpertWeights, table: Tensor, statistics: LayerStatistics, activation: ExpertActivation
) -> dict[str, Tensor]:
    """By matrix [G, i, i]: the Gram matrix of what it receives, over each group's calibration tokens."""
    groups, tokens = weights.num_experts, statistics.tokens()
    inputs: dict[str, list[Tensor]] = {name: [] for name in weights.names(Role.INPUT, Role.OUTPUT)}
    for group in range(groups):
        routed_TD = torch.cat([tokens[expert] for expert in (table == group).nonzero()[:, 0].tolist()])
        hidden_TF = align.hidden(weights, group, routed_TD, activation)
        for name, role in weights.roles.items():
            if name in inputs:
                received = (routed_TD if role is Role.INPUT else hidden_TF).double()
                inputs[name].append(received.T @ received)
        if statistics.input_gram_EDD is not None:
            gram_DD = statistics.input_gram_EDD[table == group].sum(dim=0)
            for name in weights.names(Role.INPUT):
                inputs[name][-1] = gram_DD
    return {name: torch.stack(found) for name, found in inputs.items()}


# -- tables ------------------------------------------------------------------------------------------------------
def _frame(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    import pandas as pd

    from mcsmoe.tables import SCHEMAS

    return pd.DataFrame(list(rows), columns=SCHEMAS[name].names)


def routing_frame(statistics: RoutingStatistics) -> pd.DataFrame:
    """Table ``routing``."""
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "tokens": int(found.computed_E[expert]),
            "frequency": float(found.frequency_E[expert]),
            "router_probability": float(found.probability_E[expert]),
            "dropped": int(found.dropped_E[expert]),
        }
        for layer, found in statistics.layers.items()
        for expert in range(len(found.computed_E))
    ]
    return _frame(rows, "routing")


def permutation_frame(alignments: Mapping[LayerId, align.Alignment]) -> pd.DataFrame:
    """Table ``permutation``."""
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "permutation": found.permutation_EF[expert].tolist(),
            "reference_expert": int(found.reference_E[expert]),
            "gain": float(found.gain_E[expert]),
        }
        for layer, found in alignments.items()
        for expert in range(len(found.reference_E))
    ]
    return _frame(rows, "permutation")


def similarity_frame(base: str, similarities: Mapping[LayerId, Tensor]) -> pd.DataFrame:
    """Table ``similarity``."""
    rows = [
        {"layer": layer, "base": base, "expert_i": i, "expert_j": j, "similarity": value}
        for layer, found_EE in similarities.items()
        for i, row in enumerate(found_EE.tolist())
        for j, value in enumerate(row)
    ]
    return _frame(rows, "similarity")


def groups_frame(groupings: Mapping[LayerId, Grouping], evidence: Evidence, merge: str, seed: int) -> pd.DataFrame:
    """Table ``groups``; weights are those that ``merge`` gives whole experts (frequency where it weighs elements)."""
    rows = []
    for layer, grouping in groupings.items():
        frequency_E = evidence.layer(layer).frequency_E
        leads_E = torch.zeros(grouping.num_experts, dtype=torch.bool)
        leads_E[grouping.dominant] = True
        weighed_E = frequency_E
        if merge in ("uniform", "git-rebasin", "repair", "zipit", "zipit-weight"):
            weighed_E = torch.ones_like(frequency_E)
        elif merge in ("prune", "drop", "reap"):
            weighed_E = leads_E.to(frequency_E)
        elif merge == "reversed":
            weighed_E = 1 - frequency_E
        elif merge == "random":
            weighed_E = random_importance(grouping.num_experts, seed, layer)
        share_E = shares(grouping, weighed_E)
        rows += [
            {
                "layer": layer,
                "expert": expert,
                "group": int(grouping.expert_to_group[expert]),
                "dominant": bool(leads_E[expert]),
                "weight": float(share_E[expert]),
            }
            for expert in range(grouping.num_experts)
        ]
    return _frame(rows, "groups")
