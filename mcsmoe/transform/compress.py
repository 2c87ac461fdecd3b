"""Split the experts of a model into low-rank factors and a dense residual, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mcsmoe import align
from mcsmoe.adapters.base import Adapter
from mcsmoe.compress.lowrank import decompose, decompose_whitened
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId, LowRankFactors, Role


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
