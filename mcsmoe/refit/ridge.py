"""Refit: the output projections that bring a reduced layer closest to what it gave before, in closed form.

With the layer's routing as it now is (gates g), blocks S (experts, novices) with features h_b(x) and projections W_b,

    min over W  sum_t | y_t - sum_b g_tb W_b h_b(x_t) |^2 + sum_b mu_b |W_b - W_b^0|^2

is a ridge regression towards the projections there are. It is solved block by block (Gauss-Seidel): a block's target is
what the others leave, its own solution a Cholesky factorisation in float64. Every step lowers the sum, which starts at
the error of W^0, so the error on these tokens never rises. How strong the ridge is, tokens that are held out say: in the
first sweep some blocks are solved for with each candidate, and the one with the least error on them serves all further
sweeps. The first sweep itself takes the strongest, so that the penalty never grows on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Candidates for mu over the mean diagonal of a block's Gram matrix, the strongest first."""

SWEEPS = 2
"""Of Gauss-Seidel over the blocks: where a quarter of the experts is left, the second wins a fifth, a third nothing."""

_CHOOSING = 16  # blocks that choose among the ridges: what that costs does not grow with their number
_CACHE_BYTES = 2**29  # of features that are kept from one sweep to the next

_Gated = list[tuple[Tensor, Tensor]]  # by batch, tokens [N] and gate times features [N, P] of one block


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
    """Projections that were solved for, and squared errors before and after, over the tokens and over those held out."""

    weights: list[Tensor]  # [D, P] each, as they were given
    before: float
    after: float
    held_before: float
    held_after: float
    ridge: float
    judged: bool  # whether there are tokens held out

    @property
    def helps(self) -> bool:
        """Whether held-out tokens say that the error falls; without any, whether it does on the others."""
        return self.held_after < self.held_before if self.judged else self.after < self.before


@torch.no_grad()
def refit(
    blocks: Sequence[Block],
    batches: Sequence[RefitBatch],
    held: Sequence[RefitBatch] = (),
    ridges: Sequence[float] = RIDGES,
    sweeps: int = SWEEPS,
    layer: str = "",
) -> Refitted:
    """Solve for the projections of ``blocks``; a block without tokens keeps its own.

    Args:
        blocks: what is solved for.
        batches: tokens; read ``sweeps`` + 1 times, linear in their number. Their residuals are kept, [T, D] in float32.
        held: tokens that nothing is fitted to; they choose among ``ridges``, and say whether the refit helps.
        ridges: candidates; mu_b is one of these times the mean diagonal of the block's Gram matrix. Without held-out
            tokens the strongest is taken.
        sweeps: of Gauss-Seidel over the blocks.

    Raises:
        ValueError: a ridge or number of sweeps out of range, or tokens that are not finite; names the layer.
    """
    ridges = sorted(ridges, reverse=True)
    if not ridges or not ridges[-1] > 0:
        raise ValueError(
            f"layer {layer!r}: the ridge is {ridges[-1] if ridges else None}; give numbers above 0, such as {RIDGES[-1]}"
        )
    if sweeps < 1:
        raise ValueError(f"layer {layer!r}: {sweeps} sweeps; give at least 1")
    # Between visits in float32 where they come and go in half precision: many wide experts in float64 outgrow their layer.
    weights = [block.weight_DP.detach().to(_kept_in(block.weight_DP), copy=True) for block in blocks]
    fitting, judging = _Tokens(blocks, batches), _Tokens(blocks, held)
    for index, weight_DP in enumerate(weights):
        fitting.subtract(index, weight_DP)
        judging.subtract(index, weight_DP)
    before, held_before = fitting.square(), judging.square()
    if not torch.isfinite(torch.tensor([before, held_before])).all():
        raise ValueError(f"layer {layer!r}: outputs on the calibration tokens are not finite; the model diverges there")
    chosen = ridges[0]
    judges = _spread([index for index in range(len(blocks)) if fitting.count(index) and judging.count(index)])
    for sweep in range(sweeps):
        choosing = sweep == 0 and len(ridges) > 1 and bool(judges)
        errors = dict.fromkeys(ridges, 0.0)
        for index in range(len(blocks)):
            if not fitting.count(index):
                continue
            # Features that are not kept are computed once a visit.
            features, held_features = fitting.features(index), judging.features(index)
            gram_PP, cross_PD = fitting.moments(index, features)
            old_DP = weights[index].double()
            solve = _solver(gram_PP, cross_PD, old_DP, blocks[index].weight_DP.detach().double())
            change_DP = solve(chosen) - old_DP
            if choosing and index in judges:
                held_PP, held_PD = judging.moments(index, held_features)
                for ridge in ridges:
                    other_DP = change_DP if ridge == chosen else solve(ridge) - old_DP
                    # |r - h D'|^2 - |r|^2, r being what is left of the target.
                    errors[ridge] += float((other_DP @ held_PP).mul_(other_DP).sum() - 2 * (other_DP.T * held_PD).sum())
            weights[index] = (old_DP + change_DP).to(weights[index])
            fitting.subtract_change(features, change_DP)
            judging.subtract_change(held_features, change_DP)
        if choosing:
            chosen = min(ridges, key=lambda ridge: errors[ridge])
    after, held_after = fitting.square(), judging.square()
    if after > before:
        # Rounding alone can do this, where nothing was left to win.
        kept = [block.weight_DP for block in blocks]
        return Refitted(kept, before, before, held_before, held_before, chosen, bool(held))
    made = [new.to(block.weight_DP) for new, block in zip(weights, blocks, strict=True)]
    return Refitted(made, before, after, held_before, held_after, chosen, bool(held))


def _kept_in(weight_DP: Tensor) -> torch.dtype:
    return torch.float32 if weight_DP.dtype in (torch.bfloat16, torch.float16) else torch.float64


def _spread(indices: list[int]) -> set[int]:
    """At most ``_CHOOSING`` of them, from the first to the last."""
    step = max(1, -(-len(indices) // _CHOOSING))
    return set(indices[::step])


def _solver(gram_PP: Tensor, cross_PD: Tensor, old_DP: Tensor, start_DP: Tensor) -> Callable[[float], Tensor]:
    """From a ridge to the new projection of one block, against what is left of the target with its own part in it."""
    scale = float(gram_PP.diagonal().mean())
    # Against the block's own part taken out of the sum: sum h (r + W h)' = cross + H W'.
    whole_PD = cross_PD + gram_PP @ old_DP.T

    def solve(ridge: float) -> Tensor:
        mu = ridge * scale
        if not mu > 0:
            return old_DP
        system_PP = gram_PP.clone()
        system_PP.diagonal().add_(mu)
        return torch.cholesky_solve(whole_PD + mu * start_DP.T, torch.linalg.cholesky(system_PP)).T

    return solve


class _Tokens:
    """Tokens with what is left of their targets; gated features are computed when asked for and kept while there is room."""

    def __init__(self, blocks: Sequence[Block], batches: Sequence[RefitBatch]) -> None:
        self.blocks, self.batches = blocks, batches
        self.residuals = [batch.target_TD.detach().to(_wide(batch.target_TD), copy=True) for batch in batches]
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._grams: dict[int, Tensor] = {}
        self._room = _CACHE_BYTES

    def count(self, index: int) -> int:
        """How many of them one block has."""
        return sum(int(batch.count_B[index]) for batch in self.batches)

    def square(self) -> float:
        """Squared norm of what is left."""
        return sum(float(residual_TD.double().square().sum()) for residual_TD in self.residuals)

    def moments(self, index: int, features: _Gated) -> tuple[Tensor, Tensor]:
        """Float64 [P, P] and [P, D]: sums over one block's tokens of h h' and of h r', r what is left of the target."""
        weight_DP, fresh = self.blocks[index].weight_DP, index not in self._grams
        cross_PD = torch.zeros_like(weight_DP.T, dtype=torch.float64)
        if fresh:
            self._grams[index] = cross_PD.new_zeros(len(cross_PD), len(cross_PD))
        for (token_N, gated_NP), residual_TD in zip(features, self.residuals, strict=True):
            # Products in the precision of the features, which is float32 or more; the ridge is far above their rounding.
            wide_NP = gated_NP.to(residual_TD)
            cross_PD += wide_NP.T @ residual_TD[token_N]
            if fresh:
                self._grams[index] += wide_NP.T @ wide_NP
        return self._grams[index], cross_PD

    def subtract(self, index: int, weight_DP: Tensor) -> None:
        """Take a block's output out of what is left, its fixed part included."""
        self.subtract_change(self.features(index), weight_DP)
        fixed = self.blocks[index].fixed
        if fixed is None:
            return
        for batch, residual_TD in zip(self.batches, self.residuals, strict=True):
            token_N, gate_N = batch.of_block(index)
            output_ND = fixed(batch.inputs_TD[token_N]).to(residual_TD) * gate_N[:, None].to(residual_TD)
            residual_TD.index_add_(0, token_N, output_ND, alpha=-1)

    def subtract_change(self, features: _Gated, change_DP: Tensor) -> None:
        """Take out what a block gives more."""
        for (token_N, gated_NP), residual_TD in zip(features, self.residuals, strict=True):
            output_ND = gated_NP.to(residual_TD) @ change_DP.T.to(residual_TD)
            residual_TD.index_add_(0, token_N, output_ND, alpha=-1)

    def features(self, index: int) -> _Gated:
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


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
