"""Groups around the experts that are kept, where experts are kept by a criterion."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.types import Grouping


def keep_highest(grouping: Grouping, criterion_E: Tensor, sets: int = 1) -> Grouping:
    """As many groups as ``grouping`` has, led by the experts with the highest criterion; ties go to the lower index.

    An expert that is not kept joins the best kept expert of the group it was in, else the best of all.

    Args:
        sets: consecutive experts form so many sets, among which the router chooses first; equally many are kept in
            each, if the number of groups allows it.
    """
    experts, groups = grouping.num_experts, grouping.num_groups
    order = torch.argsort(criterion_E, descending=True, stable=True)
    kept = order[:groups]
    if sets > 1 and groups % sets == 0:
        set_E = order // (experts // sets)
        kept = torch.cat([order[set_E == number][: groups // sets] for number in range(sets)])
    dominant = kept.sort().values
    rank_E = torch.empty(experts, dtype=torch.int64)
    rank_E[order] = torch.arange(experts)
    kept_E = torch.zeros(experts, dtype=torch.bool)
    kept_E[dominant] = True
    same_EE = grouping.expert_to_group[:, None] == grouping.expert_to_group[None, :]
    # A kept expert of the own group costs its rank, any other kept expert its rank after all of those.
    cost_EE = (rank_E[None, :] + experts * ~same_EE).masked_fill(~kept_E[None, :], 2 * experts)
    leader_E = torch.where(kept_E, torch.arange(experts), cost_EE.argmin(dim=1))
    return Grouping(torch.searchsorted(dominant, leader_E), dominant)
