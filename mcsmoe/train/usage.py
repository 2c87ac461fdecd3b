"""How much a task uses each expert while a model is fine-tuned, and which are left (Chen et al., arXiv 2206.00277).

Pure bookkeeping: the training loop gives token counts and masks the router with ``dropped``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mcsmoe.types import Grouping, LayerId, check_per_expert


class UsageAverage:
    """Moving average of how often each expert is used, by layer; each sums to 1."""

    def __init__(self, decay: float = 0.9) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")
        self.decay = decay
        self.frequency: dict[LayerId, Tensor] = {}

    def update(self, counts: Mapping[LayerId, Tensor]) -> float:
        """Take in the token counts [E] of one step; the first step sets the average.

        Returns:
            L1 distance of the step's frequencies from the average before it, over all layers; at first from even use.
        """
        distance = 0.0
        for layer, counted_E in counts.items():
            check_per_expert(layer, "token count", counted_E, len(self.frequency.get(layer, counted_E)))
            experts, total = len(counted_E), float(counted_E.sum())
            if total == 0:
                continue
            now_E = counted_E.double() / total
            before_E = self.frequency.get(layer)
            even_E = torch.full((experts,), 1.0 / experts, dtype=torch.float64)
            distance += float((now_E - (even_E if before_E is None else before_E)).abs().sum())
            mixed_E = now_E if before_E is None else self.decay * before_E + (1 - self.decay) * now_E
            self.frequency[layer] = mixed_E / mixed_E.sum()
        return distance

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.frequency)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.frequency = dict(state)


class TaskSpecificPruner:
    """Which experts of each layer are still alive; a dead one never comes back.

    Args:
        threshold: an expert dies whose share among the living is below ``threshold`` / (number alive).
        minimum: experts that stay alive in each layer whatever happens.
    """

    def __init__(self, threshold: float = 0.1, minimum: int = 1) -> None:
        if minimum < 1:
            raise ValueError(f"minimum is {minimum}; at least one expert must stay")
        self.threshold, self.minimum = threshold, minimum
        self.alive: dict[LayerId, Tensor] = {}

    def prune(self, frequency: Mapping[LayerId, Tensor], to_minimum: bool = False) -> dict[LayerId, Tensor]:
        """Decide again from the usage so far; with ``to_minimum`` only the most used ``minimum`` stay.

        Returns:
            bool [E] by layer: the experts alive.

        Raises:
            ValueError: a layer with fewer experts than the minimum, or of another size than before.
        """
        for layer, used_E in frequency.items():
            alive_E = self.alive.get(layer, torch.ones(len(used_E), dtype=torch.bool))
            check_per_expert(layer, "usage", used_E, len(alive_E))
            living = int(alive_E.sum())
            if living < self.minimum:
                raise ValueError(f"layer {layer!r}: {living} experts are alive, the minimum is {self.minimum}")
            total = float(used_E[alive_E].sum())
            # Without any use there is nothing to decide by: all count the same.
            share_E = used_E.double() / total if total > 0 else torch.full((len(used_E),), 1.0 / living).double()
            share_E = share_E.masked_fill(~alive_E, -1.0)
            stay_E = share_E >= self.threshold / living
            if to_minimum or int(stay_E.sum()) < self.minimum:
                stay_E = torch.zeros_like(alive_E)
                stay_E[torch.argsort(share_E, descending=True, stable=True)[: self.minimum]] = True
            self.alive[layer] = stay_E
        return dict(self.alive)

    def dropped(self, layer: LayerId) -> Tensor:
        """bool [E]: experts the router may not choose. Add -inf to their logits; a factor would raise negative ones."""
        return ~self.alive[layer]

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.alive)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.alive = dict(state)


def living_grouping(alive_E: Tensor, frequency_E: Tensor) -> Grouping:
    """Every living expert leads a group of its own, for the merge method ``drop``.

    The dead, which no token can reach, are entered under the most used living expert.
    """
    dominant = alive_E.nonzero()[:, 0]
    heaviest = dominant[frequency_E[dominant].argmax()]
    leader_E = torch.where(alive_E, torch.arange(len(alive_E)), heaviest)
    return Grouping(torch.searchsorted(dominant, leader_E), dominant)
