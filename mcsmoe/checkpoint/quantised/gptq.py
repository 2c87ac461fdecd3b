"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it: integers packed down the columns, one scale and zero a group.

``qweight`` int32 [I * bits / 32, O], ``scales`` [groups, O], ``qzeros`` int32 [groups, O * bits / 32], and ``g_idx`` [I], the
group of each input. The first version of the format stores zeros less one, so that 0 is stored as the largest number there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised.base import Parts, Quantised, Read, integer_modules, unpacked

_BITS = (2, 4, 8)


def decoded(parts: Parts, bits: int, offset: int, group_size: int) -> Tensor:
    """Float32 [O, I] of one matrix."""
    weight_OI = unpacked(parts["qweight"].t().contiguous(), bits)
    inputs = weight_OI.shape[1]
    scale_GO = parts["scales"].float()
    zero_GO = ((unpacked(parts["qzeros"], bits)[:, : scale_GO.shape[1]].int() + offset) % 2**bits).float()
    size = group_size if group_size > 0 else inputs
    group_I = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // size
    return (weight_OI.float() - zero_GO[group_I].t()) * scale_GO[group_I].t()


def find(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Quantised]]:
    """Every ``qweight``; see ``base.Format``."""
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    form = settings.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f"the checkpoint format {form!r} of GPTQ is not read; gptq and gptq_v2 are")
    size = settings.get("group_size", 128)
    for module, parts in integer_modules(infos):
        if f"{module}g_idx" in infos:
            parts["g_idx"] = f"{module}g_idx"
        rows, outputs = infos[parts["qweight"]].shape
        # A module may have other bits than the rest: its zeros say how many numbers are in a word.
        bits = _bits(32 * infos[parts["qzeros"]].shape[1] / outputs, settings.get("bits"), parts["qweight"])
        yield (
            f"{module}weight",
            Quantised(
                parts,
                (outputs, rows * 32 // bits),
                partial(decoded, bits=bits, offset=offset, group_size=size if type(size) is int else 128),
            ),
        )


def _bits(found: float, said: Any, name: str) -> int:
    # Zeros of few outputs do not fill a word.
    bits = int(found) if found in _BITS else said
    if bits not in _BITS or (isinstance(said, int) and said == 3):
        raise ValueError(f"tensor {name!r} has integers of {said} bits; read are 2, 4 and 8")
    return int(bits)


def with_plain(settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Modules that are not quantised are expressions with a minus sign."""
    dynamic = settings.get("dynamic")
    # The first expression that fits counts, so what is plain stands first.
    fresh: dict[str, Any] = {f"-:{re.escape(module)}(\\.|$)": {} for module in modules}
    return {**settings, "dynamic": {**fresh, **(dynamic if isinstance(dynamic, Mapping) else {})}}
