"""Averages with one coefficient per expert: by frequency (M-SMoE, equation 2), and its controls."""

from __future__ import annotations

from torch import Tensor

from mcsmoe.grouping.weighting import WEIGHTINGS, shares
from mcsmoe.merge.base import Merged, MergeInputs, weighted_average


def average(inputs: MergeInputs, importance_E: Tensor) -> Merged:
    """Average each group with weights proportional to ``importance_E``; evenly where a group's are all zero."""
    share_E = shares(inputs.grouping, importance_E)
    merged = weighted_average(inputs.weights, inputs.grouping, share_E, inputs.layer)
    return Merged(merged, inputs.grouping.expert_to_group.clone(), share_E, inputs.grouping.dominant.clone())


def _weighed(inputs: MergeInputs, weighting: str) -> Merged:
    return average(inputs, WEIGHTINGS[weighting](inputs.grouping, inputs.frequency_E, inputs.seed, inputs.layer))


def frequency(inputs: MergeInputs) -> Merged:
    """W_g = sum(a_e W_e) / sum(a_e), a the share of tokens an expert gets (equation 2)."""
    return _weighed(inputs, "frequency")


def uniform(inputs: MergeInputs) -> Merged:
    """The plain mean of each group."""
    return _weighed(inputs, "uniform")


def reversed_frequency(inputs: MergeInputs) -> Merged:
    """Control: the less used, the more weight, a = 1 - frequency (ablation of the merging weights in the paper)."""
    return _weighed(inputs, "reversed")


def random(inputs: MergeInputs) -> Merged:
    """Control: weights drawn evenly from [0, 1) by ``inputs.seed`` and the layer's name."""
    return _weighed(inputs, "random")
