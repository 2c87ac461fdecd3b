"""Git Re-Basin (Ainsworth et al., arXiv 2209.04836) for a group of experts: align by weights, then average evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.align import align_by_weight
from mcsmoe.grouping.weighting import shares
from mcsmoe.merge.base import Merged, MergeInputs, weighted_average
from mcsmoe.types import Grouping


def group_reference(grouping: Grouping) -> Tensor:
    """int64 [E]: each expert's reference is the dominant expert of its group."""
    return grouping.dominant[grouping.expert_to_group]


def git_rebasin(inputs: MergeInputs) -> Merged:
    """Align each expert to the dominant expert of its group by its weights, then take the mean of the group."""
    grouping, layer = inputs.grouping, inputs.layer
    found = align_by_weight(inputs.weights, group_reference(grouping), workers=inputs.workers, layer=layer)
    share_E = shares(grouping, torch.ones(grouping.num_experts))
    merged = weighted_average(inputs.weights, grouping, share_E, layer, found.permutation_EF)
    return Merged(merged, grouping.expert_to_group.clone(), share_E, grouping.dominant.clone())
