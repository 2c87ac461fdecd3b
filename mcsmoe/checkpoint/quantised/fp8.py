"""Eight-bit floats with a scale for each block, row or tensor: ``weight`` beside ``weight_scale_inv`` or ``weight_scale``.

Blocks are those of DeepSeek-V3 (arXiv:2412.19437, section 3.3): 128 x 128, the last ones of an axis smaller. The scale
multiplies, whatever its name says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised.base import FLOAT8, Parts, Quantised, Read, listed, scaled

SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "input_scale_ub")


def decoded(parts: Parts, block: Sequence[int] | None) -> Tensor:
    """Float32 of one matrix."""
    return scaled(parts["weight"], parts["scale"], block)


def find(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Quantised]]:
    """Every tensor of eight-bit floats; see ``base.Format``."""
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)
    ):
        raise ValueError(f"weight_block_size is {block!r}; blocks are [rows, columns]")
    for name, info in infos.items():
        if info.dtype not in FLOAT8 or name.endswith(SCALES):
            continue
        yield name, of_float8(name, info, infos, block)


def of_float8(name: str, info: TensorInfo, infos: Mapping[str, TensorInfo], block: Sequence[int] | None) -> Quantised:
    """The tensor ``name`` of eight-bit floats with the scales beside it.

    Raises:
        ValueError: there is no scale beside it.
    """
    scale = next((name + ending for ending in SCALES if name + ending in infos), None)
    if scale is None:
        raise ValueError(f"tensor {name!r} has eight-bit floats and no {name}_scale_inv or {name}_scale beside it")
    stacked = len(info.shape) == 3
    if stacked and infos[scale].shape[:1] != info.shape[:1]:
        raise ValueError(f"tensor {scale!r} has shape {infos[scale].shape}, which is no scale for each of {info.shape}")
    parts = {"weight": name, "scale": scale}
    module = name.removesuffix("weight")
    beside = [module + one for one in _ACTIVATIONS] if module != name else [f"{name}_{one}" for one in _ACTIVATIONS]
    more = {f"unused {number}": one for number, one in enumerate(beside) if one in infos}
    return Quantised({**parts, **more}, info.shape, partial(decoded, block=block), stacked, frozenset(more))


def with_plain(settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Modules that are not quantised are named from their start."""
    return listed(settings, "modules_to_not_convert", modules)
