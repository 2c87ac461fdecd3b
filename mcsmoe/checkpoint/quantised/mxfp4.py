"""Four-bit floats in groups of 32 with a power of two each (OCP Microscaling Formats 1.0), as gpt-oss stores its experts.

``X_blocks`` uint8 [E, O, I / 32, 16] and ``X_scales`` uint8 [E, O, I / 32] hold what the model has as ``X`` [E, I, O].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised.base import Parts, Quantised, Read, e2m1, listed, scale_values

_GROUP = 32


def decoded(parts: Parts) -> Tensor:
    """Float32 [I, O] of one expert."""
    values_OGN = e2m1(parts["blocks"]) * scale_values(parts["scales"]).unsqueeze(-1)
    return values_OGN.flatten(-2).t()


def find(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Quantised]]:
    """Every pair of blocks and scales; see ``base.Format``."""
    for blocks, info in infos.items():
        name = blocks.removesuffix("_blocks")
        scales = infos.get(f"{name}_scales")
        if name == blocks or scales is None:
            continue
        shape = info.shape
        fits = len(shape) == 4 and 2 * shape[3] == _GROUP and scales.shape == shape[:3]
        if not fits or info.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise ValueError(
                f"tensor {blocks!r} is {info.shape} beside scales of {scales.shape}; four-bit floats come as bytes in "
                "[experts, outputs, groups, 16] with a byte for each group"
            )
        parts = {"blocks": blocks, "scales": f"{name}_scales"}
        yield name, Quantised(parts, (shape[0], shape[2] * _GROUP, shape[1]), decoded, stacked=True)


def with_plain(settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Modules that are not quantised are named from their start."""
    return listed(settings, "modules_to_not_convert", modules)
