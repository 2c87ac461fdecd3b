"""Refit: the output projections that bring a reduced layer closest to what it gave before, in closed form.

With the layer's routing as it now is (gates g), blocks S (experts, novices) with features h_b(x) and projections W_b,

    min over W  sum_t | y_t - sum_b g_tb W_b h_b(x_t) |^2 + sum_b mu_b |W_b - W_b^0|^2

is a ridge regression towards the projections there are. It is solved block by block (Gauss-Seidel): a block's target is
what the others leave, its own solution a Cholesky factorisation in float64. Every step lowers the sum, which starts at
the error of W^0, so the error on these tokens never rises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.01
"""mu over the mean diagonal of a block's Gram matrix."""

SWEEPS = 3

_CACHE_BYTES = 2**29  # of features that are kept from one sweep to the next


@dataclass(frozen=True)
class Block:
    """What is solved for: ``y += gate * (features(inputs) @ weight_DP.T + fixed(inputs))``.

    A bias is a feature that is one everywhere; a novice's constant is a block with that feature alone.
    """

    features: Callable[[Tensor], Tensor]  # [N, D] -> [N, P]
    weight_DP: Tensor
    fixed: Callable[[Tensor], Tensor] | None = None  # [N, D] -> [N, D]: a part of its output that stays


@dataclass(frozen=True)
class RefitBatch:
    """Tokens of one layer: T tokens, and N choices of blocks, at most one per token and block."""

    inputs_TD: Tensor
    target_TD: Tensor
    token_N: Tensor  # int64, sorted by block
    gate_N: Tensor
    count_B: Tensor  # int64: choices of each block

    @classmethod
    def of(cls, inputs_TD: Tensor, target_TD: Tensor, block_TK: Tensor, gate_TK: Tensor, blocks: int) -> RefitBatch:
        """From the choices of each token: block_TK int64, -1 for none. Gates of one block chosen twice are added."""
        token_TK = torch.arange(len(block_TK), device=block_TK.device)[:, None].expand_as(block_TK)
        valid_TK = block_TK >= 0
        key_N = block_TK[valid_TK] * max(1, len(block_TK)) + token_TK[valid_TK]
        key_M, place_N = key_N.unique(return_inverse=True)
        gate_M = torch.zeros(len(key_M), dtype=gate_TK.dtype, device=gate_TK.device)
        gate_M.index_add_(0, place_N, gate_TK[valid_TK])
        block_M = key_M.div(max(1, len(block_TK)), rounding_mode="floor")
        token_M = key_M - block_M * max(1, len(block_TK))
        return cls(inputs_TD, target_TD, token_M, gate_M, torch.bincount(block_M, minlength=blocks))

    def of_block(self, block: int) -> tuple[Tensor, Tensor]:
        """Tokens and gates of one block, int64 [N_b] and [N_b]."""
        end_B = self.count_B.cumsum(0)
        here = slice(int(end_B[block] - self.count_B[block]), int(end_B[block]))
        return self.token_N[here], self.gate_N[here]


@dataclass(frozen=True)
class Refitted:
    """Projections that were solved for, and the squared error over the tokens before and after."""

    weights: list[Tensor]  # [D, P] each, as they were given
    before: float
    after: float


@torch.no_grad()
def refit(
    blocks: Sequence[Block], batches: Sequence[RefitBatch], ridge: float = RIDGE, sweeps: int = SWEEPS, layer: str = ""
) -> Refitted:
    """Solve for the projections of ``blocks``; a block without tokens keeps its own.

    Args:
        blocks: what is solved for.
        batches: tokens; read ``sweeps`` + 1 times, linear in their number. Their residuals are kept, [T, D] in float32.
        ridge: mu_b is this times the mean diagonal of the block's Gram matrix.
        sweeps: of Gauss-Seidel over the blocks.

    Raises:
        ValueError: a ridge or number of sweeps out of range, or tokens that are not finite; names the layer.
    """
    if not ridge > 0:
        raise ValueError(f"layer {layer!r}: the ridge is {ridge}; give a number above 0, such as {RIDGE}")
    if sweeps < 1:
        raise ValueError(f"layer {layer!r}: {sweeps} sweeps; give at least 1")
    start = [block.weight_DP.detach().double() for block in blocks]
    weights = [weight_DP.clone() for weight_DP in start]
    cache = _Features(blocks, batches)
    residuals = [batch.target_TD.detach().to(_wide(batch.target_TD), copy=True) for batch in batches]
    for index in range(len(blocks)):
        cache.subtract(index, weights[index], residuals, fixed=True)
    before = _square(residuals)
    if not torch.isfinite(torch.tensor(before)):
        raise ValueError(f"layer {layer!r}: outputs on the calibration tokens are not finite; the model diverges there")
    grams: dict[int, Tensor] = {}
    for _ in range(sweeps):
        for index in range(len(blocks)):
            if not cache.count(index):
                continue
            weights[index] = _solve(index, weights, start, cache, residuals, grams, ridge)
    after = _square(residuals)
    if after > before:
        # Rounding alone can do this, where nothing was left to win.
        return Refitted([block.weight_DP for block in blocks], before, before)
    return Refitted(
        [new.to(block.weight_DP) for new, block in zip(weights, blocks, strict=True)],
        before,
        after,
    )


def _solve(
    index: int,
    weights: list[Tensor],
    start: list[Tensor],
    cache: _Features,
    residuals: list[Tensor],
    grams: dict[int, Tensor],
    ridge: float,
) -> Tensor:
    """New projection of one block; the residuals follow it."""
    old_DP = weights[index]
    features = cache.features(index)
    cross_PD = old_DP.new_zeros(old_DP.T.shape)
    gram_PP = grams.get(index)
    fresh = gram_PP is None
    total_PP = old_DP.new_zeros(old_DP.shape[1], old_DP.shape[1]) if gram_PP is None else gram_PP
    for (token_N, gated_NP), residual_TD in zip(features, residuals, strict=True):
        wide_NP = gated_NP.double()
        cross_PD += wide_NP.T @ residual_TD[token_N].double()
        if fresh:
            total_PP += wide_NP.T @ wide_NP
    grams[index] = total_PP
    mu = ridge * float(total_PP.diagonal().mean())
    if not mu > 0:
        return old_DP
    # Against the block's own part taken out of the sum: C = sum h (r + W h)' = cross + H W'.
    right_PD = cross_PD + total_PP @ old_DP.T + mu * start[index].T
    system_PP = total_PP + mu * torch.eye(len(total_PP), dtype=total_PP.dtype, device=total_PP.device)
    new_DP = torch.cholesky_solve(right_PD, torch.linalg.cholesky(system_PP)).T
    change_DP = new_DP - old_DP
    for (token_N, gated_NP), residual_TD in zip(features, residuals, strict=True):
        residual_TD.index_add_(0, token_N, (gated_NP.to(residual_TD) @ change_DP.T.to(residual_TD)), alpha=-1)
    return new_DP


@torch.no_grad()
def squared_error(blocks: Sequence[Block], batches: Iterable[RefitBatch], weights: Sequence[Tensor]) -> float:
    """Squared error over ``batches`` with the projections ``weights``."""
    total = 0.0
    for batch in batches:
        cache = _Features(blocks, [batch])
        residual = [batch.target_TD.detach().to(_wide(batch.target_TD), copy=True)]
        for index, weight_DP in enumerate(weights):
            cache.subtract(index, weight_DP, residual, fixed=True)
        total += _square(residual)
    return total


class _Features:
    """Gated features of blocks on their tokens, computed when asked for and kept while there is room."""

    def __init__(self, blocks: Sequence[Block], batches: Sequence[RefitBatch]) -> None:
        self.blocks, self.batches = blocks, batches
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._room = _CACHE_BYTES

    def count(self, index: int) -> int:
        return sum(int(batch.count_B[index]) for batch in self.batches)

    def features(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """By batch, tokens [N] and gate times features [N, P]."""
        if index in self._kept:
            return self._kept[index]
        made = []
        for batch in self.batches:
            token_N, gate_N = batch.of_block(index)
            features_NP = self.blocks[index].features(batch.inputs_TD[token_N])
            made.append((token_N, features_NP * gate_N[:, None].to(features_NP)))
        size = sum(gated_NP.numel() * gated_NP.element_size() for _, gated_NP in made)
        if size <= self._room:
            self._kept[index], self._room = made, self._room - size
        return made

    def subtract(self, index: int, weight_DP: Tensor, residuals: Sequence[Tensor], fixed: bool) -> None:
        """Take a block's output out of the residuals."""
        block = self.blocks[index]
        for batch, (token_N, gated_NP), residual_TD in zip(self.batches, self.features(index), residuals, strict=True):
            output_ND = gated_NP.to(residual_TD) @ weight_DP.T.to(residual_TD)
            if fixed and block.fixed is not None:
                gate_N = batch.of_block(index)[1]
                output_ND += block.fixed(batch.inputs_TD[token_N]).to(residual_TD) * gate_N[:, None].to(residual_TD)
            residual_TD.index_add_(0, token_N, output_ND, alpha=-1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _square(residuals: Iterable[Tensor]) -> float:
    return sum(float(residual_TD.double().square().sum()) for residual_TD in residuals)
