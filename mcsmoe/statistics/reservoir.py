"""A fixed number of tokens per expert, drawn so that the sample does not depend on how the tokens were batched.

Every (token, expert) pair has a pseudo-random key that depends on the seed, the token's number in the stream and the
expert alone, and an expert keeps the tokens with the smallest keys (bottom-k sampling): a uniform sample without
replacement, the same for one pass, for a resumed one and for two halves that are put together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).max
"""Key of a place that holds no token."""

# Multipliers and shifts of the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit numbers.
_STEPS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_LAST_SHIFT = 31
_GAMMA = 0x9E3779B97F4A7C15 - 2**64


@dataclass
class Reservoir:
    """Up to S tokens of each expert, ordered by key; empty places come last and hold zeros."""

    key_ES: Tensor  # int64, EMPTY where there is no token
    input_ESD: Tensor  # what the expert saw
    gate_ES: Tensor  # combine weights

    @classmethod
    def empty(cls, experts: int, size: int, like_TD: Tensor) -> Reservoir:
        """Without tokens, for inputs of the width, type and device of ``like_TD``."""
        device, width = like_TD.device, like_TD.shape[1]
        return cls(
            torch.full((experts, size), EMPTY, device=device),
            torch.zeros(experts, size, width, dtype=like_TD.dtype, device=device),
            torch.zeros(experts, size, dtype=torch.float32, device=device),
        )

    @property
    def count_E(self) -> Tensor:
        """int64 [E]: tokens kept."""
        return (self.key_ES != EMPTY).sum(dim=1)

    def to(self, device: torch.device) -> Reservoir:
        """The same tokens on ``device``."""
        return Reservoir(self.key_ES.to(device), self.input_ESD.to(device), self.gate_ES.to(device))

    def scaled(self, weight: float) -> Reservoir:
        """The sample with keys divided by ``weight``: in a merge its tokens are that much likelier to stay."""
        key_ES = (self.key_ES.double() / weight).clamp_(max=float(EMPTY >> 1)).to(torch.int64)
        return Reservoir(torch.where(self.key_ES == EMPTY, EMPTY, key_ES), self.input_ESD, self.gate_ES)

    def offer(self, inputs_TD: Tensor, token_N: Tensor, expert_N: Tensor, gate_N: Tensor, key_N: Tensor) -> Reservoir:
        """Self with N (token, expert) pairs, named by rows of ``inputs_TD``, drawn into it."""
        experts, size = self.key_ES.shape
        # In a long stream nearly all pairs are beyond the largest key kept, and need no sorting.
        near_N = key_N < self.key_ES[:, -1][expert_N]
        token_N, expert_N, gate_N, key_N = token_N[near_N], expert_N[near_N], gate_N[near_N], key_N[near_N]
        order_N = torch.argsort(key_N)
        order_N = order_N[torch.argsort(expert_N[order_N], stable=True)]
        count_E = torch.bincount(expert_N, minlength=experts)
        start_E = count_E.cumsum(0) - count_E
        rank_N = torch.arange(order_N.shape[0], device=order_N.device) - start_E[expert_N[order_N]]
        order_N, rank_N = order_N[rank_N < size], rank_N[rank_N < size]
        new = Reservoir.empty(experts, size, inputs_TD)
        place = (expert_N[order_N], rank_N)
        new.key_ES[place] = key_N[order_N]
        new.input_ESD[place] = inputs_TD[token_N[order_N]]
        new.gate_ES[place] = gate_N[order_N].to(new.gate_ES)
        return self.merge(new)

    def merge(self, other: Reservoir) -> Reservoir:
        """The sample of both streams together."""
        device = self.key_ES.device
        size = self.key_ES.shape[1]
        key_ES, place_ES = torch.cat([self.key_ES, other.key_ES.to(device)], dim=1).sort(dim=1, stable=True)
        place_ES = place_ES[:, :size]
        inputs = torch.cat([self.input_ESD, other.input_ESD.to(self.input_ESD)], dim=1)
        gates = torch.cat([self.gate_ES, other.gate_ES.to(device)], dim=1)
        index_ESD = place_ES[:, :, None].expand(-1, -1, inputs.shape[2])
        return Reservoir(key_ES[:, :size].clone(), inputs.gather(1, index_ESD), gates.gather(1, place_ES))


def keys(counter_N: Tensor, expert_N: Tensor, seed: int) -> Tensor:
    """int64 [N], non-negative: pseudo-random key of each pair of a token's number in the stream and an expert."""
    return _mix(_mix(counter_N * _GAMMA + seed) + (expert_N + 1) * _GAMMA) & (EMPTY >> 1)


def _mix(values_N: Tensor) -> Tensor:
    for shift, factor in _STEPS:
        values_N = (values_N ^ _shifted(values_N, shift)) * factor
    return values_N ^ _shifted(values_N, _LAST_SHIFT)


def _shifted(values_N: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's fills with the sign."""
    return (values_N >> bits) & ((1 << (64 - bits)) - 1)
