"""REPAIR (Jordan et al., arXiv 2211.08403) for a group of experts: average, then undo the collapse of the variance.

An average of experts that agree only in part has pre-activations with less spread than its members'. REPAIR gives each
hidden neuron back the mean and the standard deviation that its members have on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsmoe.align import Alignment, align_by_tokens, align_by_weight
from mcsmoe.grouping.weighting import shares
from mcsmoe.merge.base import Merged, MergeInputs, grouping_members, weighted_average
from mcsmoe.merge.git_rebasin import group_reference
from mcsmoe.types import ExpertWeights, Grouping


def repair(inputs: MergeInputs) -> Merged:
    """Align to the group's dominant expert by hidden activations, take the mean, rescale (``rescaled``).

    Reads ``tokens`` and ``activation``; a group compares and rescales on all tokens of its members. A group with fewer
    than two tokens is aligned by weights and not rescaled.
    """
    tokens, activation = inputs.require_tokens("REPAIR")
    grouping, layer, table = inputs.grouping, inputs.layer, inputs.grouping.expert_to_group
    reference_E = group_reference(grouping)
    found = align_by_tokens(inputs.weights, tokens, activation, reference_E, table, inputs.workers, layer)
    found = _by_weight_where_silent(inputs, tokens, reference_E, found)
    share_E = shares(grouping, torch.ones(grouping.num_experts))
    merged = weighted_average(inputs.weights, grouping, share_E, layer, found.permutation_EF)
    merged = rescaled(merged, inputs.weights, found.permutation_EF, grouping, share_E, tokens)
    return Merged(merged, table.clone(), share_E, grouping.dominant.clone())


def _by_weight_where_silent(
    inputs: MergeInputs, tokens: Sequence[Tensor], reference_E: Tensor, found: Alignment
) -> Alignment:
    table = inputs.grouping.expert_to_group
    count_E = torch.tensor([len(listed) for listed in tokens])
    count_G = torch.zeros(inputs.grouping.num_groups, dtype=torch.int64).index_add_(0, table, count_E)
    silent_E = (count_G < 2)[table]
    experts_E = torch.arange(len(table))
    own_E = torch.where(silent_E, reference_E, experts_E)
    if torch.equal(own_E, experts_E):
        return found
    other = align_by_weight(inputs.weights, own_E, workers=inputs.workers, layer=inputs.layer)
    order_EF = torch.where(silent_E[:, None], other.permutation_EF, found.permutation_EF)
    return Alignment(order_EF, found.reference_E, torch.where(silent_E, other.gain_E, found.gain_E))


@torch.no_grad()
def rescaled(
    merged: ExpertWeights,
    members: ExpertWeights,
    permutation_EF: Tensor,
    grouping: Grouping,
    share_E: Tensor,
    tokens: Sequence[Tensor],
) -> ExpertWeights:
    """The merged experts with the pre-activation statistics of their members, on the tokens of the group.

    Target of a neuron are the share-weighted averages of its members' means and of their standard deviations. The scale
    goes into the neuron's input row, the shift into its input bias, so the architecture stays as it is. A projection
    without biases has nowhere to put a shift: its standard deviation is restored, its mean is scaled with it.
    Projections of a gated expert are treated one by one. Groups of one stay bit by bit what they are.

    Args:
        merged: G stacked experts.
        members: the E experts they are made of.
        permutation_EF: order of the members' neurons in which they were merged.
        grouping: which expert is in which group.
        share_E: each expert's part in its group.
        tokens: for each expert the inputs [T_e, D] routed to it.
    """
    made = merged.map(lambda _, tensor: tensor.clone())
    for group, experts in enumerate(grouping_members(grouping)):
        inputs_TD = torch.cat([tokens[expert] for expert in experts.tolist()])
        if len(experts) == 1 or len(inputs_TD) < 2:
            continue
        target: dict[str, tuple[Tensor, Tensor]] = {}
        for expert in experts.tolist():
            part = float(share_E[expert])
            for name, (mean_F, std_F) in _moments(members, expert, inputs_TD).items():
                before = target.get(name, (torch.zeros_like(mean_F), torch.zeros_like(std_F)))
                order_F = permutation_EF[expert]
                target[name] = (before[0] + part * mean_F[order_F], before[1] + part * std_F[order_F])
        for name, (mean_F, std_F) in _moments(merged, group, inputs_TD).items():
            wanted_mean_F, wanted_std_F = target[name]
            # Rounding leaves a constant neuron some spread; dividing by that would blow it up.
            constant_F = std_F <= 1e-6 * (mean_F.abs() + std_F)
            scale_F = torch.where(constant_F, 1.0, wanted_std_F / torch.where(constant_F, 1.0, std_F))
            matrix_FD = made.tensors[name][group]
            matrix_FD.copy_(matrix_FD.double() * scale_F[:, None])
            bias = made.tensors.get(f"{name}_bias")
            if bias is not None:
                bias[group] = (wanted_mean_F + scale_F * (bias[group].double() - mean_F)).to(bias.dtype)
    return made


def _moments(weights: ExpertWeights, expert: int, inputs_TD: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By input projection, float64 mean and standard deviation [F] of the pre-activations."""
    made = {}
    for name, outputs_TF in weights.preactivations(expert, inputs_TD).items():
        std_F, mean_F = torch.std_mean(outputs_TF.double(), dim=0)
        made[name] = (mean_F, std_F)
    return made
