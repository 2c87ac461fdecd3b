"""A random gated layer with biases, whose last expert is never used, and what the tests of similarities need of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mcsmoe.adapters.switch import SwitchAdapter
from mcsmoe.similarity.base import SimilarityInputs
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import ExpertWeights, Role, RoutedBatch, RouterWeights

EXPERTS, WIDTH, HIDDEN, UNUSED = 6, 5, 7, 5
LAYER = "layer.0"
ROLES = {
    "gate": Role.INPUT,
    "up": Role.INPUT,
    "down": Role.OUTPUT,
    "gate_bias": Role.INPUT_BIAS,
    "up_bias": Role.INPUT_BIAS,
    "down_bias": Role.OUTPUT_BIAS,
}
SIZES = {
    Role.INPUT: (HIDDEN, WIDTH),
    Role.OUTPUT: (WIDTH, HIDDEN),
    Role.INPUT_BIAS: (HIDDEN,),
    Role.OUTPUT_BIAS: (WIDTH,),
}
TOKEN_BASES = ("mse", "feature-correlation.lsa", "feature-correlation.max", "expert-output", "expert-output.distance")


def activation(outputs: Mapping[str, Tensor]) -> Tensor:
    return functional.silu(outputs["gate"]) * outputs["up"]


def stacked(seed: int, experts: int = EXPERTS, scale: float = 1.0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: scale * torch.randn(experts, *SIZES[role], generator=generator) for name, role in ROLES.items()}
    return ExpertWeights(tensors, dict(ROLES))


def batch(tokens: int = 160, seed: int = 0, choices: int = 2, experts: int = EXPERTS) -> RoutedBatch:
    """Random routing in which the last expert is never wanted."""
    generator = torch.Generator().manual_seed(seed)
    inputs_TD = torch.randn(tokens, WIDTH, generator=generator)
    logits_TE = torch.randn(tokens, experts, generator=generator) + 0.5
    masked_TE = logits_TE.clone()
    masked_TE[:, -1] = -torch.inf
    weights_TK, chosen_TK = masked_TE.softmax(dim=-1).topk(choices, dim=-1)
    return RoutedBatch(inputs_TD, logits_TE, chosen_TK, chosen_TK, weights_TK, torch.ones(tokens, dtype=torch.bool))


def statistics_of(*batches: RoutedBatch, reservoir: int = 1000) -> LayerStatistics:
    made = RoutingStatistics(reservoir=reservoir)
    for one in batches:
        made.update({LAYER: one})
    return made.layers[LAYER]


def everything(routed: RoutedBatch | None = None, seed: int = 1, **changes: Any) -> SimilarityInputs:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "statistics": statistics_of(batch() if routed is None else routed),
        "weights": stacked(seed),
        "router": RouterWeights(torch.randn(EXPERTS, WIDTH, generator=generator)),
        "gradients": stacked(seed + 1),
        "activation": activation,
        "layer": LAYER,
    }
    return SimilarityInputs(**(values | changes))


def own(routed: RoutedBatch, expert: int) -> Tensor:
    return routed.inputs_TD[(routed.chosen_TK == expert).any(dim=1)].double()


def run_hidden(weights: ExpertWeights, expert: int, inputs_TD: Tensor) -> Tensor:
    return activation(
        {
            name: inputs_TD @ weights.tensors[name][expert].double().T
            + weights.tensors[f"{name}_bias"][expert].double()
            for name in ("gate", "up")
        }
    )


def run(weights: ExpertWeights, expert: int, inputs_TD: Tensor) -> Tensor:
    down_DF, bias_D = weights.tensors["down"][expert].double(), weights.tensors["down_bias"][expert].double()
    return run_hidden(weights, expert, inputs_TD) @ down_DF.T + bias_D


def correlations(weights: ExpertWeights, routed: RoutedBatch, i: int, j: int) -> Tensor:
    inputs_TD = torch.cat([own(routed, i), own(routed, j)])
    both = torch.cat([run_hidden(weights, i, inputs_TD), run_hidden(weights, j, inputs_TD)], dim=1)
    return torch.corrcoef(both.T)[:HIDDEN, HIDDEN:]


def given_of(
    made: nn.Module, inputs: dict[str, Tensor], reservoir: int, all_valid: bool = False, training: bool = False
) -> dict[str, SimilarityInputs]:
    adapter, statistics = SwitchAdapter(), RoutingStatistics(reservoir=reservoir)
    made.train(training)
    with torch.no_grad(), adapter.capture(made) as captured:
        made(**inputs)
        batches = captured.batches
        if all_valid:
            batches = {
                layer: RoutedBatch(**{**vars(one), "valid_T": torch.ones_like(one.valid_T)})
                for layer, one in batches.items()
            }
        statistics.update(batches)
    return {
        layer: SimilarityInputs(
            statistics=statistics.layers[layer],
            weights=adapter.read_experts(made, layer),
            router=adapter.read_router(made, layer),
            activation=adapter.activation(made, layer),
            layer=layer,
        )
        for layer in adapter.layers(made)
    }
