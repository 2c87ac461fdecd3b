"""REAP: prune the experts that add least to the layer's output (arXiv 2510.13999)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsmoe.grouping.kept import keep_highest
from mcsmoe.merge.base import Merged, MergeInputs
from mcsmoe.merge.prune import keep
from mcsmoe.types import ExpertActivation, ExpertWeights


@torch.no_grad()
def saliency(
    weights: ExpertWeights, tokens: Sequence[Tensor], gates: Sequence[Tensor], activation: ExpertActivation
) -> Tensor:
    """[E] float64: mean over an expert's tokens of gate times the norm of its output; zero for one without tokens.

    Args:
        weights: the E stacked experts.
        tokens: for each expert the inputs [T_e, D] routed to it.
        gates: for each expert the combine weights [T_e] of those tokens.
        activation: from the outputs of the input projections to the hidden activation.
    """
    made_E = torch.zeros(weights.num_experts, dtype=torch.float64)
    for expert, (inputs_TD, gate_T) in enumerate(zip(tokens, gates, strict=True)):
        if len(inputs_TD) == 0:
            continue
        norm_T = weights.output(expert, weights.hidden(expert, inputs_TD, activation)).double().norm(dim=1)
        made_E[expert] = (norm_T * gate_T.to(norm_T)).mean().cpu()
    return made_E


def reap(inputs: MergeInputs) -> Merged:
    """Keep the most salient experts, as many as there are groups; the router never chooses another.

    Reads ``saliency_E``, or else ``tokens``, ``gates`` and ``activation``.

    Raises:
        ValueError: neither is given.
    """
    criterion_E = inputs.saliency_E
    if criterion_E is None:
        tokens, activation = inputs.require_tokens("REAP")
        if inputs.gates is None:
            raise ValueError(f"layer {inputs.layer!r}: REAP needs the combine weights of the tokens in the reservoir")
        criterion_E = saliency(inputs.weights, tokens, inputs.gates, activation)
    return keep(inputs, keep_highest(inputs.grouping, criterion_E, inputs.expert_sets), drop=True)
