"""AWQ (arXiv:2306.00978) in the layout of its matrix product: four-bit integers packed along a row of outputs.

``qweight`` int32 [I, O / 8], ``qzeros`` int32 [groups, O / 8], ``scales`` [groups, O]. The eight numbers of a word are in the
order 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised.base import Parts, Quantised, Read, integer_modules, listed, unpacked

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each number of a word, which place in it it has."""


def decoded(parts: Parts) -> Tensor:
    """Float32 [O, I] of one matrix."""
    weight_IO = unpacked(parts["qweight"], 4, _PLACES)
    scale_GO = parts["scales"].float()
    zero_GO = unpacked(parts["qzeros"], 4, _PLACES).float()
    inputs, groups = weight_IO.shape[0], scale_GO.shape[0]
    group_I = torch.arange(inputs) // -(-inputs // groups)
    return ((weight_IO.float() - zero_GO[group_I]) * scale_GO[group_I]).t()


def find(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Quantised]]:
    """Every ``qweight``; see ``base.Format``."""
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm" or settings.get("bits", settings.get("w_bit", 4)) != 4:
        raise ValueError(
            f"AWQ of version {version!r} in {settings.get('bits', settings.get('w_bit'))} bits is not read; gemm in 4 bits is"
        )
    for module, parts in integer_modules(infos):
        inputs, words = infos[parts["qweight"]].shape
        yield f"{module}weight", Quantised(parts, (8 * words, inputs), decoded)


def with_plain(settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Modules that are not quantised are named from their start."""
    return listed(settings, "modules_to_not_convert", modules)
