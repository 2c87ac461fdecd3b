"""REAP: prune the experts that add least to the layer's output (arXiv 2510.13999)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mcsmoe.align import hidden
from mcsmoe.merge.base import Merged, MergeInputs
from mcsmoe.merge.prune import keep
from mcsmoe.types import ExpertActivation, ExpertWeights, Grouping, Role


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
    (output,) = weights.names(Role.OUTPUT)
    bias_ED = weights.tensors.get(f"{output}_bias")
    for expert, (inputs_TD, gate_T) in enumerate(zip(tokens, gates, strict=True)):
        if len(inputs_TD) == 0:
            continue
        hidden_TF = hidden(weights, expert, inputs_TD, activation)
        bias_D = None if bias_ED is None else bias_ED[expert]
        norm_T = functional.linear(hidden_TF, weights.tensors[output][expert], bias_D).double().norm(dim=1)
        made_E[expert] = (norm_T * gate_T.to(norm_T)).mean().cpu()
    return made_E


def keep_highest(grouping: Grouping, criterion_E: Tensor) -> Grouping:
    """As many groups as ``grouping`` has, led by the experts with the highest criterion; ties go to the lower index.

    An expert that is not kept joins the best kept expert of the group it was in, else the best of all.
    """
    experts, groups = grouping.num_experts, grouping.num_groups
    order = torch.argsort(criterion_E, descending=True, stable=True)
    dominant = order[:groups].sort().values
    rank_E = torch.empty(experts, dtype=torch.int64)
    rank_E[order] = torch.arange(experts)
    kept_E = torch.zeros(experts, dtype=torch.bool)
    kept_E[dominant] = True
    same_EE = grouping.expert_to_group[:, None] == grouping.expert_to_group[None, :]
    # A kept expert of the own group costs its rank, any other kept expert its rank after all of those.
    cost_EE = (rank_E[None, :] + experts * ~same_EE).masked_fill(~kept_E[None, :], 2 * experts)
    leader_E = torch.where(kept_E, torch.arange(experts), cost_EE.argmin(dim=1))
    return Grouping(torch.searchsorted(dominant, leader_E), dominant)


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
    return keep(inputs, keep_highest(inputs.grouping, criterion_E), drop=True)
