"""Whether the calibration was enough: do two halves of its rows keep the same experts?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.statistics.outputs import ChosenOutputs
from mcsmoe.types import RoutedBatch


@dataclass
class Halves:
    """Tokens and saliency of one layer, of the even and of the odd rows apart."""

    tokens_2E: Tensor
    gated_norm_sum_2E: Tensor

    @classmethod
    def empty(cls, num_experts: int) -> Halves:
        """Of no rows."""
        return cls(torch.zeros(2, num_experts, dtype=torch.int64), torch.zeros(2, num_experts, dtype=torch.float64))

    def take(self, batch: RoutedBatch, outputs: ChosenOutputs, row_T: Tensor) -> None:
        """Take in a batch; ``row_T`` is the number of each token's row."""
        kept_TK = (batch.chosen_TK >= 0) & batch.valid_T[:, None]
        norm_N = torch.linalg.vector_norm(outputs.outputs_TKD, dim=2, dtype=torch.float32)[kept_TK].double()
        experts = self.tokens_2E.shape[1]
        place_N = ((row_T % 2)[:, None] * experts + batch.chosen_TK)[kept_TK]
        gated_N = norm_N * outputs.weights_TK[kept_TK].double()
        self.tokens_2E += torch.bincount(place_N, minlength=2 * experts).view(2, experts).cpu()
        sums = torch.bincount(place_N, weights=gated_N, minlength=2 * experts).double()
        self.gated_norm_sum_2E += sums.view(2, experts).cpu()

    def overlap(self, keep: int) -> float:
        """Share of the ``keep`` experts with the largest mean saliency (REAP) that both halves have in common."""
        score_2E = (self.gated_norm_sum_2E / self.tokens_2E.clamp(min=1)).round(decimals=12)
        first, second = (set(row.argsort(descending=True, stable=True)[:keep].tolist()) for row in score_2E)
        return len(first & second) / keep
