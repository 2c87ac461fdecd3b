"""Where the experts of a sparse layer are, by structure alone."""

from __future__ import annotations

from torch import nn

from mcsmoe.adapters.fused_layout import is_stacked_experts
from mcsmoe.modules import RedirectedExperts

FIRST_EXPERT = "expert_0"
"""Name of the first of experts that are modules of their own."""


def experts_of(layer: nn.Module) -> nn.Module | None:
    """The module inside a sparse layer that computes its experts, if they are of a known form."""
    for module in layer.modules():
        if isinstance(module, RedirectedExperts) or is_stacked_experts(module) or FIRST_EXPERT in module._modules:
            return module
    return None
