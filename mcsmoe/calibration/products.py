"""Matrix products of half precision on processors that have no instructions for it.

Where a processor has none, torch multiplies bfloat16 and float16 several times slower than float32 (docs/results.md). A product of numbers
in half precision is exact in float32, and sums are kept in float32 either way: so operands are widened, multiplied, and
the result is rounded once, which differs from torch's own product in the order of the sum alone. Weights are widened a
piece at a time; a float32 copy of a layer would need twice the layer's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HALF = (torch.bfloat16, torch.float16)
_ROWS = 16
"""With fewer rows widening costs as much as it saves."""
_GROUP_ROWS = 8
"""The same for the rows of one expert among many."""
_WEIGHTS = 2**16
"""A smaller matrix is multiplied by torch itself: there is nothing to win."""
_PIECE = 2**21
"""Weights that are widened at a time: 8 MB, which the cache of a processor holds."""

_aten = torch.ops.aten


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of ``dtype``, bfloat16 or float16, itself."""
    known: Any = torch.ops.mkldnn
    asked = known._is_mkldnn_bf16_supported if dtype is torch.bfloat16 else known._is_mkldnn_fp16_supported
    return bool(asked())


def slow_types(weights: Iterable[Tensor]) -> list[torch.dtype]:
    """Types of half precision that this processor multiplies slowly and that large enough matrices among ``weights`` have."""
    there = {one.dtype for one in weights if one.dtype in _HALF and one.numel() >= _WEIGHTS}
    return [dtype for dtype in _HALF if dtype in there and not has_instructions(dtype)]


def fast_products(slow: Sequence[torch.dtype]) -> AbstractContextManager[Any]:
    """Products of these types on the processor are widened in this context; no type costs nothing."""
    return WidenedProducts(slow) if slow else nullcontext()


def widened_product(left_NI: Tensor, right_IO: Tensor, start_NO: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """[N, O]: ``start + scale * left @ right``, summed in float32 and rounded once to the type of ``left``."""
    given_NO = left_NI.new_empty(left_NI.shape[0], right_IO.shape[1])
    wide_NI = left_NI.float()
    columns = max(1, _PIECE // right_IO.shape[0])
    for first in range(0, right_IO.shape[1], columns):
        piece = slice(first, first + columns)
        sum_NO = wide_NI @ right_IO[:, piece].float()
        if start_NO is not None:
            sum_NO = sum_NO.mul_(scale).add_(start_NO[:, piece])
        given_NO[:, piece] = sum_NO
    return given_NO


class WidenedProducts(TorchDispatchMode):
    """Inside, products of large enough matrices of these types on the processor are ``widened_product``."""

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = tuple(dtypes)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        way = _WAYS.get(function)
        if way is not None and way.knows(args, kwargs or {}) and self._pays(*args[way.operands :][:2]):
            return way.compute(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _pays(self, left: Tensor, right: Tensor) -> bool:
        if left.device.type != "cpu" or left.dtype not in self.dtypes or right.dtype != left.dtype:
            return False
        return left.shape[-2] >= _ROWS and right.shape[-2] * right.shape[-1] >= _WEIGHTS


class _Way:
    """How one of torch's products is computed: the place of its operands, the arguments known, the computation."""

    def __init__(
        self,
        compute: Callable[..., Tensor],
        dims: tuple[int, int],
        operands: int = 0,
        more: int = 0,
        named: Sequence[str] = (),
    ) -> None:
        self.compute, self.dims, self.operands, self.named = compute, dims, operands, set(named)
        self.positional = operands + 2 + more

    def knows(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
        if not self.operands + 2 <= len(args) <= self.positional or not self.named.issuperset(given):
            return False
        return tuple(one.dim() for one in args[self.operands :][:2]) == self.dims


def _mm(left_NI: Tensor, right_IO: Tensor) -> Tensor:
    return widened_product(left_NI, right_IO)


def _addmm(start: Tensor, left_NI: Tensor, right_IO: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    start_NO = start.expand(left_NI.shape[0], right_IO.shape[1]).float() * beta
    return widened_product(left_NI, right_IO, start_NO, float(alpha))


def _bmm(left_BNI: Tensor, right_BIO: Tensor) -> Tensor:
    return torch.stack(
        [widened_product(left_NI, right_IO) for left_NI, right_IO in zip(left_BNI, right_BIO, strict=True)]
    )


def _baddbmm(start: Tensor, left_BNI: Tensor, right_BIO: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    start_BNO = start.expand(left_BNI.shape[0], left_BNI.shape[1], right_BIO.shape[2]).float() * beta
    parts = zip(start_BNO, left_BNI, right_BIO, strict=True)
    return torch.stack([widened_product(left, right, first, float(alpha)) for first, left, right in parts])


def _grouped(left_NI: Tensor, right_GIO: Tensor, offs: Tensor) -> Tensor:
    """Rows of ``left_NI`` up to ``offs[g]`` belong to group g; those after the last are nobody's, and 0."""
    if left_NI.shape[0] < _GROUP_ROWS * right_GIO.shape[0]:
        return _aten._grouped_mm.default(left_NI, right_GIO, offs)
    given_NO = left_NI.new_zeros(left_NI.shape[0], right_GIO.shape[2])
    first = 0
    for right_IO, last in zip(right_GIO, offs.tolist(), strict=True):
        rows = left_NI[first:last]
        given_NO[first:last] = widened_product(rows, right_IO) if last - first >= _GROUP_ROWS else rows @ right_IO
        first = last
    return given_NO


_WAYS = {
    _aten.mm.default: _Way(_mm, (2, 2)),
    _aten.addmm.default: _Way(_addmm, (2, 2), operands=1, named=("beta", "alpha")),
    _aten.bmm.default: _Way(_bmm, (3, 3)),
    _aten.baddbmm.default: _Way(_baddbmm, (3, 3), operands=1, named=("beta", "alpha")),
    _aten._grouped_mm.default: _Way(_grouped, (2, 3), more=1, named=("offs",)),
}
