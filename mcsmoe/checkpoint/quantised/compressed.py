"""compressed-tensors: eight-bit floats and integers, packed integers of few bits, NVFP4 and the MX formats.

Which of them a module has is told by the parts that it has: ``weight`` or ``weight_packed``, the number format, and the
scales beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised.base import (
    FLOAT8,
    Parts,
    Quantised,
    Read,
    e2m1,
    listed,
    scale_values,
    scaled,
    spread,
    unpacked,
)

_REFUSED = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_NVFP4_GROUP = 16


def of_bytes(parts: Parts, block: Sequence[int] | None) -> Tensor:
    """Float32 of eight-bit floats or integers: (q - zero point) * scale."""
    weight = parts["weight"].float()
    if "zero_point" in parts:
        weight = weight - spread(parts["zero_point"].float(), tuple(weight.shape), block)
    return scaled(weight, parts["scale"], block)


def of_words(parts: Parts, bits: int, shape: tuple[int, int]) -> Tensor:
    """Float32 [O, I] of integers packed along a row; without zero points they are signed around 2^(bits - 1)."""
    rows, columns = shape
    middle = 1 << (bits - 1)
    weight_OI = unpacked(parts["packed"], bits)[:, :columns].float() - middle
    scale = parts["scale"].float()
    scale = scale.reshape(rows, -1) if scale.numel() > 1 else scale.reshape(1, 1)
    groups = scale.shape[1]
    group_I = parts["g_idx"].long() if "g_idx" in parts else torch.arange(columns) // -(-columns // groups)
    if "zero_point" in parts:
        # Zero points are packed down the rows.
        zero = parts["zero_point"]
        if zero.dtype == torch.int32:
            zero = unpacked(zero.t().contiguous(), bits).t()[:rows].float() - middle
        weight_OI = weight_OI - zero.float().reshape(rows, -1)[:, group_I]
    return weight_OI * scale[:, group_I]


def of_nvfp4(parts: Parts) -> Tensor:
    """Float32 [O, I] of four-bit floats, a scale for each 16, divided by one for the tensor."""
    scale = parts["scale"].float() / parts["global_scale"].float()
    return scaled(e2m1(parts["packed"]), scale)


def of_mxfp4(parts: Parts) -> Tensor:
    """Float32 [O, I] of four-bit floats with a power of two for each 32."""
    return scaled(e2m1(parts["packed"]), scale_values(parts["scale"]))


def find(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Quantised]]:
    """Every quantised tensor; see ``base.Format``."""
    groups = [one for one in (settings.get("config_groups") or {}).values() if isinstance(one, Mapping)]
    formats = {str(settings.get("format")), *(str(one.get("format")) for one in groups)}
    for refused in _REFUSED:
        if refused in formats:
            raise ValueError(f"the format {refused!r} of compressed-tensors is not read")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise ValueError(f"the sparse format {sparsity['format']!r} of compressed-tensors is not read")
    weights = [one["weights"] for one in groups if isinstance(one.get("weights"), Mapping)]
    blocks = [one["block_structure"] for one in weights if one.get("block_structure")]
    for name, info in infos.items():
        module, packed = name.removesuffix("weight_packed"), name.endswith("weight_packed")
        if not packed:
            module = name.removesuffix("weight")
            if module == name or info.dtype not in (*FLOAT8, torch.int8):
                continue
        beside = {
            role: f"{module}weight_{role}"
            for role in ("scale", "zero_point", "global_scale", "g_idx", "shape")
            if f"{module}weight_{role}" in infos
        }
        if "scale" not in beside:
            raise ValueError(f"tensor {name!r} is quantised and has no {module}weight_scale beside it")
        unused = {role: module + role for role in _UNUSED if module + role in infos}
        parts = {"packed" if packed else "weight": name, **beside, **unused}
        shape, decode = _decoder(name, infos, beside, weights, blocks, read)
        yield f"{module}weight", Quantised(parts, shape, decode, unused=frozenset({*unused, "shape"}))


def _decoder(
    name: str,
    infos: Mapping[str, TensorInfo],
    beside: Mapping[str, str],
    weights: Sequence[Mapping[str, Any]],
    blocks: Sequence[Any],
    read: Read,
) -> tuple[tuple[int, ...], Any]:
    """Shape of a tensor, and the function that makes it of its parts."""
    info = infos[name]
    if len(info.shape) != 2:
        raise ValueError(f"tensor {name!r} has shape {info.shape}; compressed-tensors holds matrices")
    rows, columns = info.shape
    if not name.endswith("weight_packed"):
        grid = infos[beside["scale"]].shape
        fitting = [_pair(one) for one in blocks]
        fitting = [one for one in fitting if grid == (-(-rows // one[0]), -(-columns // one[1]))]
        return info.shape, partial(of_bytes, block=fitting[0] if fitting else None)
    if info.dtype == torch.uint8:
        return (rows, 2 * columns), of_nvfp4 if "global_scale" in beside else of_mxfp4
    if "shape" not in beside:
        raise ValueError(f"tensor {name!r} is packed and has no {beside['scale'].removesuffix('scale')}shape beside it")
    shape = tuple(int(one) for one in read(beside["shape"]).flatten())
    said = dict.fromkeys(one.get("num_bits") for one in weights)
    bits = [one for one in said if one in (1, 2, 4, 8) and columns == -(-shape[-1] * int(one) // 32)]
    if len(shape) != 2 or shape[0] != rows or not bits:
        raise ValueError(
            f"tensor {name!r} is {info.shape} for a matrix of {shape} in {list(said)} bits; read are 1, 2, 4 and 8 bits"
        )
    return shape, partial(of_words, bits=int(bits[0]), shape=(rows, shape[1]))


def _pair(block: Any) -> tuple[int, int]:
    """Rows and columns of a block, which older versions write as text."""
    found = [int(one) for one in (block if isinstance(block, list) else re.findall(r"\d+", str(block)))]
    if len(found) != 2 or min(found) < 1:
        raise ValueError(f"block_structure is {block!r}; blocks are [rows, columns]")
    return found[0], found[1]


def with_plain(settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Modules that are not quantised are named by an expression, which holds for those inside them too."""
    return listed(settings, "ignore", [f"re:{re.escape(module)}(\\.|$)" for module in modules])
