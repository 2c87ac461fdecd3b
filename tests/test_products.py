"""Products of half precision that are widened, against float64 and against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from torch import Tensor

from mcsmoe.calibration import products
from mcsmoe.calibration.products import WidenedProducts, fast_products, slow_types

ROWS, WIDTH, OUT, EXPERTS = 96, 320, 288, 3
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half of a unit in the last place, as a share of the value."""
Product = Callable[[Callable[[Tensor], Tensor]], Tensor]


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LEFT, RIGHT, START = _drawn(ROWS, WIDTH, seed=0), _drawn(OUT, WIDTH, seed=1), _drawn(OUT, seed=2)
STACK = _drawn(EXPERTS, OUT, WIDTH, seed=3)
ENDS = torch.tensor([40, 41, 90], dtype=torch.int32)


def _grouped(of: Callable[[Tensor], Tensor]) -> Tensor:
    left, stack = of(LEFT), of(STACK).transpose(1, 2)
    if left.dtype is torch.float64:
        return torch.cat([left[:40] @ stack[0], left[40:41] @ stack[1], left[41:90] @ stack[2]])
    return torch.nn.functional.grouped_mm(left, stack, offs=ENDS)[:90]


PRODUCTS: dict[str, Product] = {
    "linear": lambda of: torch.nn.functional.linear(of(LEFT), of(RIGHT)),
    "linear with bias": lambda of: torch.nn.functional.linear(of(LEFT), of(RIGHT), of(START)),
    "linear of rows in batches": lambda of: torch.nn.functional.linear(
        of(LEFT).view(4, 24, WIDTH), of(RIGHT), of(START)
    ),
    "addmm with factors": lambda of: torch.addmm(of(START), of(LEFT), of(RIGHT).T, beta=0.5, alpha=2),
    "addmm to a column": lambda of: torch.addmm(of(LEFT[:, :1]), of(LEFT), of(RIGHT).T),
    "bmm": lambda of: torch.bmm(of(LEFT).view(EXPERTS, -1, WIDTH), of(STACK).transpose(1, 2)),
    "baddbmm": lambda of: torch.baddbmm(
        of(STACK[:, None, :, 0]), of(LEFT).view(EXPERTS, -1, WIDTH), of(STACK).mT, alpha=2
    ),
    "grouped": _grouped,
}


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products were widened; weights come in pieces that do not divide them."""
    seen: list[int] = []
    usual = products.widened_product

    def counted(left: Tensor, right: Tensor, *more: object) -> Tensor:
        seen.append(left.shape[0])
        return usual(left, right, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "widened_product", counted)
    monkeypatch.setattr(products, "_PIECE", WIDTH * 100)
    return seen


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_a_widened_product_is_rounded_once(name: str, dtype: torch.dtype, pieces: list[int]) -> None:
    truth = PRODUCTS[name](lambda tensor: tensor.to(dtype).double())
    with WidenedProducts([dtype]):
        given = PRODUCTS[name](lambda tensor: tensor.to(dtype))
    assert pieces
    assert given.dtype is dtype
    # Sums of float32 are off by some 2^-20 of the terms beside the rounding at the end.
    assert bool(((given.double() - truth).abs() <= UNIT[dtype] * truth.abs() + 2e-4).all())
    own = PRODUCTS[name](lambda tensor: tensor.to(dtype))
    error, torchs = ((one.double() - truth).abs().mean() for one in (given, own))
    assert error <= 1.01 * torchs


def test_what_is_small_or_of_another_type_is_left_to_torch(pieces: list[int]) -> None:
    half = torch.bfloat16
    with WidenedProducts([half]):
        for left, right in (
            (LEFT, RIGHT),  # float32
            (LEFT.to(torch.float16), RIGHT.to(torch.float16)),
            (LEFT.to(half)[:15], RIGHT.to(half)),
            (LEFT.to(half)[:, :64], RIGHT.to(half)[:64, :64]),
        ):
            assert torch.equal(left @ right.T, _outside(left, right))
    assert not pieces


def _outside(left: Tensor, right: Tensor) -> Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        return left @ right.T


def test_a_processor_with_instructions_is_left_alone(monkeypatch: pytest.MonkeyPatch, pieces: list[int]) -> None:
    monkeypatch.setattr(products, "has_instructions", lambda dtype: dtype is torch.bfloat16)
    halves = [RIGHT.to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    with fast_products(slow_types(halves)):
        LEFT.to(torch.bfloat16) @ RIGHT.to(torch.bfloat16).T
        assert not pieces
        LEFT.to(torch.float16) @ RIGHT.to(torch.float16).T
    assert len(pieces) == 1
    monkeypatch.setattr(products, "has_instructions", lambda _dtype: True)
    with fast_products(slow_types(halves)):
        LEFT.to(torch.float16) @ RIGHT.to(torch.float16).T
    assert len(pieces) == 1


def test_a_model_comes_no_further_from_float32_than_with_torchs_own(pieces: list[int]) -> None:
    half = tiny_models.model("qwen3_moe", hidden_size=320, moe_intermediate_size=256).to(torch.bfloat16).eval()
    batch = tiny_models.batch(rows=16)
    with torch.no_grad():
        own = half(**batch).logits.float()
        with WidenedProducts([torch.bfloat16]):
            given = half(**batch).logits.float()
        truth = half.float()(**batch).logits
    assert len(pieces) > 8
    error, torchs = ((one - truth).square().mean().sqrt() for one in (given, own))
    assert 0 < error <= 1.05 * torchs
