"""Averages with one coefficient per expert: by frequency (M-SMoE, equation 2), and its controls."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.merge.base import Merged, MergeInputs, shares, weighted_average
from mcsmoe.types import LayerId


def average(inputs: MergeInputs, importance_E: Tensor) -> Merged:
    """Average each group with weights proportional to ``importance_E``; evenly where a group's are all zero."""
    share_E = shares(inputs.grouping, importance_E)
    merged = weighted_average(inputs.weights, inputs.grouping, share_E, inputs.layer)
    return Merged(merged, inputs.grouping.expert_to_group.clone(), share_E, inputs.grouping.dominant.clone())


def frequency(inputs: MergeInputs) -> Merged:
    """W_g = sum(a_e W_e) / sum(a_e), a the share of tokens an expert gets (equation 2)."""
    return average(inputs, inputs.frequency_E)


def uniform(inputs: MergeInputs) -> Merged:
    """The plain mean of each group."""
    return average(inputs, torch.ones_like(inputs.frequency_E))


def reversed_frequency(inputs: MergeInputs) -> Merged:
    """Control: the less used, the more weight, a = 1 - frequency (ablation of the merging weights in the paper)."""
    return average(inputs, 1.0 - inputs.frequency_E)


def random(inputs: MergeInputs) -> Merged:
    """Control: weights drawn evenly from [0, 1) by ``inputs.seed`` and the layer's name."""
    return average(inputs, random_importance(inputs.weights.num_experts, inputs.seed, inputs.layer))


def random_importance(experts: int, seed: int, layer: LayerId) -> Tensor:
    """[E] float64 in [0, 1), the same for the same seed and layer whatever else was drawn before."""
    # hash() would differ between processes.
    key = int.from_bytes(f"{seed} {layer}".encode(), "little") % (2**61 - 1)
    return torch.rand(experts, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
