"""Integers in place of weights: rounding with the best scale for each group, and words of 32 bits that hold them.

A row of a matrix is cut into groups of consecutive entries; a group has one scale s, and entry w becomes the integer
q = round(w / s), from -2^(b-1) to 2^(b-1) - 1. The scale is the one, among shrunken ones and after a step of least squares,
with the smallest squared error of its group: the largest entry need not be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (4, 8)
# Shares of the scale at which the largest entry is the largest integer: the finer the integers, the less is won by cutting it.
_SHRUNKEN = {4: torch.linspace(1.0, 0.6, 17).tolist(), 8: torch.linspace(1.0, 0.88, 25).tolist()}
_AT_ONCE = 2**22  # entries that are looked at together


def group_size(widths: list[int], wanted: int | None = None) -> int:
    """Entries a group: ``wanted``, or the largest of 128, 64 and 32 that divides every width.

    Raises:
        ValueError: it divides one of them not; names the width.
    """
    for size in (128, 64, 32) if wanted is None else (wanted,):
        if size >= 1 and all(width % size == 0 for width in widths):
            return size
    least = 32 if wanted is None else wanted
    bad = next(width for width in widths if least < 1 or width % least)
    asked = "128, 64 and 32" if wanted is None else str(wanted)
    raise ValueError(
        f"rows of {bad} weights are not whole groups of {asked}; give a --group-size that divides {sorted(set(widths))}"
    )


def check_bits(bits: int) -> None:
    """Raise ValueError unless weights can be stored in that many bits."""
    if bits not in BITS:
        raise ValueError(f"the weights are to have {bits} bits; give one of {', '.join(map(str, BITS))}")


@torch.no_grad()
def quantise(weight_oi: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers int8 [o, i] and scales [o, i / group], in the dtype of the weights.

    Raises:
        ValueError: a number of bits, or a group that is no part of a row.
    """
    check_bits(bits)
    group_size([weight_oi.shape[1]], group)
    integers, scales = [], []
    for rows in weight_oi.split(max(1, _AT_ONCE // weight_oi.shape[1])):
        q_Ng, scale_N = _groups(rows.reshape(-1, group), bits, weight_oi.dtype)
        integers.append(q_Ng.view(rows.shape))
        scales.append(scale_N.view(rows.shape[0], -1))
    return torch.cat(integers), torch.cat(scales)


def _groups(weight_Ng: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wide_Ng = weight_Ng.float()
    largest_N = wide_Ng.abs().amax(dim=1)

    def rounded(scale_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The scale as it is stored, so that the error is that of what is read.
        scale_N = torch.where(scale_N > 0, scale_N, 1.0).to(dtype).float()
        scale_N = torch.where(scale_N > 0, scale_N, torch.finfo(dtype).tiny)
        q_Ng = (wide_Ng / scale_N[:, None]).round_().clamp_(low, high)
        return q_Ng, scale_N, (q_Ng * scale_N[:, None]).sub_(wide_Ng).square_().sum(dim=1)

    best_Ng, best_N, error_N = rounded(largest_N / high)

    def better(scale_N: Tensor) -> None:
        q_Ng, scale_N, other_N = rounded(scale_N)
        win_N = other_N < error_N
        best_Ng[win_N], best_N[win_N], error_N[win_N] = q_Ng[win_N], scale_N[win_N], other_N[win_N]

    for share in _SHRUNKEN[bits]:
        better(largest_N / (high + 0.5) * share)
    square_N = best_Ng.square().sum(dim=1)
    better((best_Ng * wide_Ng).sum(dim=1) / square_N.clamp(min=1))
    return best_Ng.to(torch.int8), best_N.to(dtype)


@torch.no_grad()
def dequantise(integer_oi: Tensor, scale_og: Tensor) -> Tensor:
    """[o, i]: the weights that integers and scales stand for, in the dtype of the scales."""
    group = integer_oi.shape[1] // scale_og.shape[1]
    return integer_oi.to(scale_og.dtype) * scale_og.repeat_interleave(group, dim=1)


@torch.no_grad()
def pack(integer_oi: Tensor, bits: int) -> Tensor:
    """int32 [o, ceil(i bits / 32)]: entry n of a row, plus 2^(bits-1), in bits n bits .. (n + 1) bits - 1 of its words."""
    each = 32 // bits
    rows, columns = integer_oi.shape
    words = -(-columns // each)
    padded = integer_oi.new_zeros(rows, words * each, dtype=torch.int64)
    padded[:, :columns] = integer_oi.to(torch.int64) + 2 ** (bits - 1)
    shift = torch.arange(each, device=integer_oi.device) * bits
    packed = (padded.view(rows, words, each) << shift).sum(dim=2)
    # Words of 32 bits without a sign, as ones with a sign.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


@torch.no_grad()
def unpack(packed_ow: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of ``pack``: int8 [o, columns]."""
    each = 32 // bits
    shift = torch.arange(each, device=packed_ow.device) * bits
    found = (packed_ow.to(torch.int64)[:, :, None] >> shift) & (2**bits - 1)
    return (found.flatten(1)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)


def packed_bytes(shape: tuple[int, ...], scale_bytes: int, bits: int, group: int) -> int:
    """Bytes of one matrix when it is packed: its words, its scales, and its shape as two numbers of 8 bytes."""
    rows, columns = shape
    return rows * -(-columns * bits // 32) * 4 + rows * (columns // group) * scale_bytes + 16
