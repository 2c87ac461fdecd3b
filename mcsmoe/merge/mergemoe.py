"""MergeMoE (arXiv 2510.14436): input projections are averaged, the output projection is solved for.

For a group with shares a_e the merged expert is to give what its members give together, sum of a_e f_e(x), on the group's
tokens: least squares on the merged expert's hidden activations. A small ridge towards the averaged projection keeps the
solution where tokens are few; without one it collapses as soon as there are fewer tokens than hidden neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsmoe.grouping.weighting import shares
from mcsmoe.merge.base import Merged, grouping_members, weighted_average
from mcsmoe.similarity.tokens import hidden, output
from mcsmoe.types import ExpertActivation, ExpertWeights, Grouping, LayerId, Role

RIDGE = 1e-3
"""Over the mean diagonal of the Gram matrix of hidden activations."""


@torch.no_grad()
def merge(
    weights: ExpertWeights,
    grouping: Grouping,
    importance_E: Tensor,
    tokens: Sequence[Tensor],
    activation: ExpertActivation,
    layer: LayerId = "",
    ridge: float = RIDGE,
) -> Merged:
    """Merge each group with members' shares proportional to ``importance_E`` (how often each is used).

    Args:
        tokens: for each expert the inputs [T_e, D] routed to it; a group without any keeps the averaged projection.
    """
    share_E = shares(grouping, importance_E)
    merged = weighted_average(weights, grouping, share_E, layer)
    (name,) = weights.names(Role.OUTPUT)
    for group, members in enumerate(grouping_members(grouping)):
        inputs_TD = torch.cat([tokens[expert] for expert in members.tolist()])
        if len(members) == 1 or not len(inputs_TD):
            continue
        target_TD = inputs_TD.new_zeros(len(inputs_TD), weights.d_model, dtype=torch.float64)
        for expert in members.tolist():
            one = weights.select(torch.tensor([expert]))
            given_TD = output(one, hidden(one, inputs_TD[None], activation))[0]
            target_TD += float(share_E[expert]) * given_TD.double()
        made = merged.select(torch.tensor([group]))
        hidden_TF = hidden(made, inputs_TD[None], activation)[0].double()
        bias_GD = merged.tensors.get(f"{name}_bias")
        if bias_GD is not None:
            # The bias is averaged, as the members' outputs are: what is left is the projection's.
            target_TD -= bias_GD[group].double()
        gram_FF = hidden_TF.T @ hidden_TF
        mu = ridge * float(gram_FF.diagonal().mean())
        if not mu > 0:
            continue
        start_DF = merged.tensors[name][group].double()
        right_FD = hidden_TF.T @ target_TD + mu * start_DF.T
        system_FF = gram_FF + mu * torch.eye(len(gram_FF), dtype=torch.float64, device=gram_FF.device)
        solved_FD = torch.cholesky_solve(right_FD, torch.linalg.cholesky(system_FF))
        merged.tensors[name][group] = solved_FD.T.to(merged.tensors[name])
    return Merged(merged, grouping.expert_to_group.clone(), share_E, grouping.dominant.clone())
