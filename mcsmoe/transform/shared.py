"""The shared expert beside the routed ones, found by what the layer computes: its output projection, and its gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from mcsmoe.adapters.places import experts_of
from mcsmoe.calibration.observe import observing
from mcsmoe.transform.layers import SparseLayer

_NEAR = 1e-3  # of the norm of what is left of the output: float32 sums differ by less, another structure by far more


@dataclass(frozen=True)
class Probe:
    """What a layer does with some tokens, as it is now."""

    index_TK: Tensor  # int64, experts
    gate_TK: Tensor  # what their outputs are multiplied with
    hidden_TP: Tensor | None = None  # what the shared output projection reads
    factor_T: Tensor | None = None  # what its output is multiplied with
    scale_TK: Tensor | None = None  # what experts' inputs are multiplied with before they read them; None: 1


@torch.no_grad()
def probe(layer: SparseLayer, inputs_TD: Tensor, projection: str | None = None) -> Probe:
    """Run the block of ``layer`` alone on tokens; ``projection`` names the shared one, whose part is then found too."""
    block, inner, seen_TP = layer.module, None, []
    hooks = []
    if projection is not None:
        inner = block.get_submodule(projection)
        hooks.append(inner.register_forward_pre_hook(lambda _module, given: seen_TP.append(given[0])))
    try:
        with layer.adapter.capture(layer.model) as captured, observing(layer.id, block) as seen:
            output = block(inputs_TD[None])
            found = captured.batches[layer.id]
            chosen = seen.take(found)
    finally:
        for hook in hooks:
            hook.remove()
    if inner is None or len(seen_TP) != 1:
        return Probe(found.chosen_TK, chosen.weights_TK, scale_TK=found.scale_TK)
    total_TD = _of_tokens(output, inputs_TD)
    if total_TD is None:
        return Probe(found.chosen_TK, chosen.weights_TK, scale_TK=found.scale_TK)
    gated_TKD = chosen.outputs_TKD.double() * chosen.weights_TK[:, :, None].double()
    routed_TD = torch.where((found.chosen_TK >= 0)[:, :, None], gated_TKD, 0.0).sum(dim=1)
    hidden_TP = seen_TP[0].reshape(len(inputs_TD), -1)
    given_TD, rest_TD = inner(hidden_TP).double(), total_TD.double() - routed_TD
    factor_T = (rest_TD * given_TD).sum(dim=1) / given_TD.square().sum(dim=1).clamp(min=1e-300)
    off = (rest_TD - factor_T[:, None] * given_TD).norm() / rest_TD.norm().clamp(min=1e-300)
    low = total_TD.dtype in (torch.bfloat16, torch.float16)
    if not off < (_NEAR * 30 if low else _NEAR):
        return Probe(found.chosen_TK, chosen.weights_TK, scale_TK=found.scale_TK)
    return Probe(found.chosen_TK, chosen.weights_TK, hidden_TP, factor_T.to(hidden_TP.dtype), found.scale_TK)


def shared_projection(layer: SparseLayer, inputs_TD: Tensor) -> str | None:
    """Name, inside the block, of the linear map whose output, times a number a token, is all that is not routed.

    None where there is none: no shared expert, several, or one that is added elsewhere.
    """
    block, experts = layer.module, experts_of(layer.module)
    own = set() if experts is None else {id(module) for module in experts.modules()}
    routers = set(layer.adapter.router_parameters(layer.model))
    names = [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in own
        and f"{layer.id}.{name}.weight" not in routers
        and module.bias is None
        and module.out_features == inputs_TD.shape[1]
    ]
    try:
        found = [name for name in names if probe(layer, inputs_TD[:64], name).factor_T is not None]
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None  # a block that does not run on tokens alone, such as one with attention in it
    return found[0] if len(found) == 1 else None


def _of_tokens(output: Any, inputs_TD: Tensor) -> Tensor | None:
    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.numel() == inputs_TD.numel() and leaf.shape[-1] == inputs_TD.shape[1]:
            return leaf.reshape(inputs_TD.shape)
    return None


def shared_weight(layer: SparseLayer, projection: str) -> Tensor:
    """The weight [D, P] of the shared output projection, itself and no copy."""
    found: Any = layer.module.get_submodule(projection)
    weight: Tensor = found.weight.data
    return weight
