"""Weights rounded to few bits: the control that every smaller model is held against.

Groups of 32 weights of a row share a scale and a zero, each of 16 bits, so that ``bits`` a weight take ``bits + 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.compress.bits import GROUP
from mcsmoe.types import ExpertWeights, Role


def rounded(weight: Tensor, bits: int) -> Tensor:
    """``weight`` with the last axis in groups, each rounded to ``2**bits`` even steps from its smallest to its largest.

    Args:
        weight: [..., n]; a last group may be shorter.
        bits: 1 to 16.

    Returns:
        The same shape and type; no value moves by more than half a step.

    Raises:
        ValueError: bits out of range.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits is {bits}; weights are rounded to 1 to 16 bits")
    parts = []
    for part in weight.float().split(GROUP, dim=-1):
        low, high = part.amin(dim=-1, keepdim=True), part.amax(dim=-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        steps = torch.where(step > 0, ((part - low) / step.clamp(min=torch.finfo(torch.float32).tiny)).round(), 0.0)
        parts.append(low + steps * step)
    return torch.cat(parts, dim=-1).to(weight.dtype)


def rounded_experts(weights: ExpertWeights, bits: int) -> ExpertWeights:
    """Every matrix of the experts rounded along its input; biases stay."""
    matrices = weights.names(Role.INPUT, Role.OUTPUT)
    return weights.map(lambda name, tensor: rounded(tensor, bits) if name in matrices else tensor)
