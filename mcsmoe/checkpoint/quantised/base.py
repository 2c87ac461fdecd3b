"""What the formats of quantised weights share: parts of a tensor, scales of blocks, packed numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of four-bit floats: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EXPONENT_BIAS = 127

Parts = Mapping[str, Tensor]
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Quantised:
    """One tensor of a model that the files hold in parts.

    Attributes:
        parts: by role, the names of the parts in the files. The part named ``main`` comes first.
        shape: of the tensor they make.
        decode: makes float32 of the parts that are not in ``unused``.
        stacked: whether the first axis of every part is one of experts, so that each can be decoded alone.
        unused: roles that have no part in the weights, such as scales of activations.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    decode: Callable[[Parts], Tensor]
    stacked: bool = False
    unused: frozenset[str] = frozenset()

    @property
    def main(self) -> str:
        """Name in the files of the part that holds the numbers."""
        return next(iter(self.parts.values()))

    def value(self, read: Read, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``, its parts read by ``read``; experts one after another where they are stacked."""
        found = {role: read(name) for role, name in self.parts.items() if role not in self.unused}
        if not self.stacked:
            return self.decode(found).to(dtype)
        made = torch.empty(self.shape, dtype=dtype)
        for expert in range(self.shape[0]):
            made[expert] = self.decode({role: part[expert] for role, part in found.items()})
        return made


class Format(Protocol):
    """One ``quant_method``: how its tensors are found in the files, and how its settings name what is not quantised."""

    def find(
        self, infos: Mapping[str, TensorInfo], settings: Mapping[str, Any], read: Read
    ) -> Iterator[tuple[str, Quantised]]:
        """Every quantised tensor among ``infos``, by its name in the model.

        Raises:
            ValueError: a kind of it that is not read; says which.
        """

    def with_plain(self, settings: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
        """``settings`` that say of ``modules``, and of what is inside them, that they are not quantised."""


def integer_modules(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, dict[str, str]]]:
    """Start of the names of every module with a ``qweight``, and its ``qweight``, ``qzeros`` and ``scales`` by role.

    Raises:
        ValueError: zeros or scales are missing; names the tensor and what it lacks.
    """
    for name in infos:
        module = name.removesuffix("qweight")
        if module == name:
            continue
        parts = {role: module + role for role in ("qweight", "qzeros", "scales")}
        missing = [part for part in parts.values() if part not in infos]
        if missing:
            raise ValueError(f"tensor {name!r} is quantised and has no {missing[0]} beside it")
        yield module, parts


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32; bytes and e8m0 are exponents of two, biased by 127."""
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scale.shape), scale.int() - _EXPONENT_BIAS)
    return scale.float()


def scaled(values_RC: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> Tensor:
    """Float32 ``values * scale``, the scale of one number, one a row, or one a block.

    Args:
        values_RC: numbers to scale, [R, C].
        scale: one number, [R] or [R, 1], or [ceil(R / rows), ceil(C / columns)] for blocks.
        block: rows and columns of a block; the last ones of each axis may be smaller. Without it columns of equal groups.

    Raises:
        ValueError: the shapes do not fit.
    """
    made_RC = values_RC.float()
    return made_RC * spread(scale_values(scale), tuple(made_RC.shape), block)


def spread(scale: Tensor, shape: tuple[int, ...], block: Sequence[int] | None = None) -> Tensor:
    """``scale`` in a shape that a matrix of ``shape`` can be multiplied with; arguments and errors as in ``scaled``."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(())
    if block is not None and tuple(scale.shape) == (-(-rows // block[0]), -(-columns // block[1])):
        tall = scale.repeat_interleave(block[0], dim=0)[:rows]
        return tall.repeat_interleave(block[1], dim=1)[:, :columns]
    if scale.shape[0] == rows and scale.numel() == rows:
        return scale.reshape(rows, 1)
    if scale.ndim == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0:
        return scale.repeat_interleave(columns // scale.shape[1], dim=1)
    raise ValueError(f"scales of shape {tuple(scale.shape)} do not fit a matrix of {shape} in blocks of {block}")


def nibbles(packed: Tensor, high_first: bool = False) -> Tensor:
    """Numbers from 0 to 15 of bytes [..., N]: [..., 2 N], the low half of a byte first unless ``high_first``."""
    low, high = packed & 0xF, packed >> 4
    return torch.stack([high, low] if high_first else [low, high], dim=-1).flatten(-2)


def e2m1(packed: Tensor) -> Tensor:
    """Float32 [..., 2 N] of bytes [..., N] that hold two four-bit floats each, the first in the low half."""
    return torch.tensor(E2M1)[nibbles(packed.view(torch.uint8)).int()]


def unpacked(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Unsigned numbers of ``bits`` bits from int32 words [..., N]: int32 [..., N * 32 / bits], the lowest bits first.

    Args:
        words: int32.
        bits: 1, 2, 4 or 8.
        order: for each number of a word, which place in the word it has; 0, 1, ... if None.
    """
    places = torch.tensor(order if order is not None else range(32 // bits), dtype=torch.int32)
    return ((words.unsqueeze(-1) >> (places * bits)) & ((1 << bits) - 1)).flatten(-2)


def listed(settings: Mapping[str, Any], field: str, modules: Sequence[str]) -> dict[str, Any]:
    """``settings`` whose list ``field`` names ``modules`` too."""
    before = [one for one in settings.get(field) or [] if isinstance(one, str)]
    return {**settings, field: [*before, *(one for one in modules if one not in before)]}
