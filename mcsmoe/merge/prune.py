"""Pruning as a special case of merging: of each group only its dominant expert is left."""

from __future__ import annotations

import torch

from mcsmoe.align import require_finite
from mcsmoe.merge.base import Merged, MergeInputs
from mcsmoe.types import Grouping


def keep(inputs: MergeInputs, grouping: Grouping, drop: bool) -> Merged:
    """The dominant expert of each group of ``grouping``, bit by bit; the others' share is zero."""
    require_finite(inputs.weights, inputs.layer)
    kept = inputs.weights.select(grouping.dominant)
    share_E = torch.zeros(inputs.weights.num_experts, dtype=torch.float64)
    share_E[grouping.dominant] = 1.0
    table, dominant = grouping.expert_to_group.clone(), grouping.dominant.clone()
    return Merged(kept, table, share_E, dominant, share_E == 0.0 if drop else None)


def prune(inputs: MergeInputs) -> Merged:
    """Keep the dominant experts; tokens of a pruned expert go to the dominant expert of its group."""
    return keep(inputs, inputs.grouping, drop=False)


def drop(inputs: MergeInputs) -> Merged:
    """Keep the dominant experts; the router never chooses another, so tokens go to the best expert that is kept.

    A dropped expert keeps its entry in the redirect table (its group), which nothing can reach.
    """
    return keep(inputs, inputs.grouping, drop=True)
