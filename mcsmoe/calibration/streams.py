"""The residual stream after the blocks of a model: what a change of one layer is small or large against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from mcsmoe.calibration.replay import block_of
from mcsmoe.types import LayerId, RoutedBatch

_ADDED = 0.02
"""How far from a multiple of what a layer gives more the change of the stream may be: half precision rounds to .004."""


def _is_stream(leaf: Any, tokens: int, width: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape[-1:] == (width,) and leaf.numel() == tokens * width


def stream_of(output: Any, tokens: int, width: int) -> Tensor | None:
    """[T, D]: the residual stream that a block returned; None if it is not among its outputs."""
    leaves = (leaf for leaf in _pytree.tree_leaves(output) if _is_stream(leaf, tokens, width))
    found = next(leaves, None)
    return None if found is None else found.detach().reshape(tokens, width)


def stream_square(output: Any, inputs_TD: Tensor) -> Tensor | None:
    """Float64 [T]: squared norm of the residual stream that a block returned; None if it is not among its outputs."""
    stream_TD = stream_of(output, *inputs_TD.shape)
    if stream_TD is None:
        return None
    return torch.linalg.vector_norm(stream_TD, dim=1, dtype=torch.float32).double().square()


def stream_factor(layer: LayerId, module: nn.Module, run: Callable[[], Any], tokens: int, width: int) -> float:
    """What the output of a sparse layer is multiplied by where its block adds it to the residual stream.

    Measured: the block runs once as it is and once with noise added to what ``module`` gives.

    Args:
        module: the sparse layer.
        run: runs the block on a batch of ``tokens`` positions.

    Raises:
        ValueError: the stream is not among the outputs, or something else than a factor stands between; names the layer.
    """
    noise: list[Tensor] = []

    def disturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        leaves, spec = _pytree.tree_flatten(output)
        for place, leaf in enumerate(leaves):
            if _is_stream(leaf, tokens, width):
                drawn = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
                leaves[place] = disturbed = leaf + drawn * leaf.std()
                noise.append((disturbed.double() - leaf.double()).reshape(tokens, width))
                break
        return _pytree.tree_unflatten(leaves, spec)

    before_TD = stream_of(run(), tokens, width)
    hook = module.register_forward_hook(disturb)
    try:
        after_TD = stream_of(run(), tokens, width)
    finally:
        hook.remove()
    if before_TD is None or after_TD is None or not noise:
        raise ValueError(f"layer {layer!r}: the residual stream is not what its block returns; refit towards the layer")
    change_TD = after_TD.double() - before_TD.double()
    square = float(noise[0].square().sum())
    factor = float((change_TD * noise[0]).sum()) / square if square else 0.0
    rest = float((change_TD - factor * noise[0]).square().sum()) ** 0.5
    if not factor or rest > _ADDED * abs(factor) * square**0.5:
        raise ValueError(
            f"layer {layer!r}: its output is not added to the residual stream as it is (a norm may stand between), so the "
            "stream cannot be what it is refitted towards; refit towards the layer"
        )
    return factor


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
