"""bitsandbytes: four-bit numbers by a table of values (QLoRA, arXiv:2305.14314), and integers of eight bits by row.

Four bits: ``weight`` uint8 [N / 2, 1], two numbers a byte, the first in its high half; ``weight.absmax`` for each block,
``weight.quant_map`` the values, and ``weight.quant_state.bitsandbytes__nf4`` JSON in bytes. Doubly quantised, ``absmax`` is bytes
into ``weight.nested_quant_map`` with scales and an offset of their own. Eight bits: ``weight`` int8 [O, I] beside ``SCB`` [O].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised.base import Parts, Quantised, Read, listed, nibbles

_STATE = ".quant_state.bitsandbytes__"


def of_four_bits(
    parts: Parts, shape: tuple[int, ...], block: int, nested_block: int = 0, nested_offset: float = 0.0
) -> Tensor:
    """Float32 of one tensor of ``shape``; ``block`` numbers share a scale."""
    count = math.prod(shape)
    scale_B = parts["absmax"].flatten()
    if "nested_absmax" in parts:
        outer_B = parts["nested_absmax"].float().repeat_interleave(nested_block)[: len(scale_B)]
        scale_B = parts["nested_quant_map"].float()[scale_B.int()] * outer_B + nested_offset
    values_N = parts["quant_map"].float()[nibbles(parts["weight"].flatten().view(torch.uint8), high_first=True).int()]
    return (values_N[:count] * scale_B.float().repeat_interleave(block)[:count]).reshape(shape)


def of_eight_bits(parts: Parts) -> Tensor:
    """Float32 [O, I]: a row's largest number is 127."""
    return parts["weight"].float() * (parts["scale"].float() / 127).unsqueeze(1)


def find(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Quantised]]:
    """Every quantised tensor; see ``base.Format``."""
    for name, info in infos.items():
        if _STATE in name:
            weight, _, kind = name.partition(_STATE)
            yield weight, _four_bits(weight, kind, name, infos, read)
        elif info.dtype == torch.int8 and name.endswith("weight"):
            module = name.removesuffix("weight")
            if f"{module}SCB" not in infos:
                raise ValueError(f"tensor {name!r} has integers and no {module}SCB beside it")
            parts = {"weight": name, "scale": f"{module}SCB"}
            unused = {"form": f"{module}weight_format"} if f"{module}weight_format" in infos else {}
            yield name, Quantised({**parts, **unused}, info.shape, of_eight_bits, unused=frozenset(unused))


def _four_bits(weight: str, kind: str, state: str, infos: Mapping[str, TensorInfo], read: Read) -> Quantised:
    try:
        said = json.loads(bytes(read(state).flatten().tolist()))
        shape, block = tuple(int(one) for one in said["shape"]), int(said["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tensor {state!r} does not say shape and block of a {kind} tensor ({error})") from error
    roles = {"weight": weight, "absmax": f"{weight}.absmax", "quant_map": f"{weight}.quant_map"}
    nested: dict[str, Any] = {}
    if f"{weight}.nested_absmax" in infos:
        roles |= {one: f"{weight}.{one}" for one in ("nested_absmax", "nested_quant_map")}
        nested = {
            "nested_block": int(said.get("nested_blocksize", 256)),
            "nested_offset": float(said.get("nested_offset", 0)),
        }
    missing = [one for one in roles.values() if one not in infos]
    if missing:
        raise ValueError(f"tensor {state!r} belongs to {missing[0]!r}, which is not in the files")
    held, count = math.prod(infos[weight].shape) * infos[weight].dtype.itemsize, math.prod(shape)
    if held != -(-count // 2) or block < 1 or math.prod(infos[f"{weight}.absmax"].shape) != -(-count // block):
        raise ValueError(f"tensor {weight!r} has {held} bytes for four bits of {shape} in blocks of {block}")
    decode = partial(of_four_bits, shape=shape, block=block, **nested)
    return Quantised({**roles, "state": state}, shape, decode, unused=frozenset({"state"}))


def with_plain(settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Modules that are not quantised are named from their start."""
    return listed(settings, "llm_int8_skip_modules", modules)
