"""Tensors whose contents are not in memory: made so, and never computed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _NothingEmpty(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        empty = filled = False
        for value in (*args, *(kwargs or {}).values()):
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(one, Tensor):
                    empty, filled = empty or one.is_meta, filled or not one.is_meta
        if empty and filled:
            # torch itself computes with memory that nobody has written.
            raise RuntimeError(f"{func} was given a tensor whose contents were not read from the checkpoint")
        return func(*args, **(kwargs or {}))


def nothing_empty() -> TorchDispatchMode:
    """A context of this thread in which computing with a tensor on the meta device is an error, as it is not in torch."""
    return _NothingEmpty()


def forget(module: nn.Module, stored: Mapping[str, torch.dtype] | None = None, below: str = "") -> None:
    """Replace the stored tensors of ``module`` (and below) by empty ones; structure such as redirect tables stays."""
    formats = stored or {}
    for path, part in module.named_modules():
        prefix = ".".join(one for one in (below, path) if one)
        for name, parameter in list(part.named_parameters(recurse=False)):
            dtype = formats.get(f"{prefix}.{name}" if prefix else name, parameter.dtype)
            empty = torch.empty_like(parameter, dtype=dtype, device="meta")
            setattr(part, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            if name not in part._non_persistent_buffers_set:
                dtype = formats.get(f"{prefix}.{name}" if prefix else name, buffer.dtype)
                setattr(part, name, torch.empty_like(buffer, dtype=dtype, device="meta"))
