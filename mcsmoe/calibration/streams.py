"""The residual stream after the blocks of a model: what a change of one layer is small or large against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from mcsmoe.calibration.replay import block_of
from mcsmoe.types import LayerId, RoutedBatch


def stream_square(output: Any, inputs_TD: Tensor) -> Tensor | None:
    """Float64 [T]: squared norm of the residual stream that a block returned; None if it is not among its outputs."""
    tokens, width = inputs_TD.shape
    for leaf in _pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor) or leaf.shape[-1:] != (width,) or leaf.numel() != tokens * width:
            continue
        norm_T = torch.linalg.vector_norm(leaf.detach().reshape(tokens, width), dim=1, dtype=torch.float32)
        return norm_T.double().square()
    return None


class Streams:
    """What the block of each layer returned in the forward pass that ran last."""

    def __init__(self) -> None:
        self.outputs: dict[LayerId, Any] = {}

    def squares(self, batches: Mapping[LayerId, RoutedBatch]) -> dict[LayerId, Tensor] | None:
        """By layer ``stream_square`` of its block; None unless that of every layer was seen. They are forgotten here."""
        outputs, self.outputs = self.outputs, {}
        found = {layer: stream_square(outputs.get(layer), batch.inputs_TD) for layer, batch in batches.items()}
        seen = {layer: square_T for layer, square_T in found.items() if square_T is not None}
        return seen if len(seen) == len(found) else None


@contextmanager
def streams_after(model: nn.Module, layers: Sequence[LayerId]) -> Iterator[Streams]:
    """Watch the blocks that hold ``layers`` during forward passes inside the context."""
    made, hooks = Streams(), []
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for layer in layers:
        block = block_of(layer, lists)
        if block is None:
            continue

        def seen(_module: nn.Module, _inputs: Any, output: Any, layer: LayerId = layer) -> None:
            made.outputs[layer] = output

        hooks.append(model.get_submodule(block).register_forward_hook(seen))
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()
