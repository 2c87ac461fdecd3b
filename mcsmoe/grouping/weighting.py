"""How whole experts weigh in their group: what merging averages by, and what table ``groups`` says of each expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mcsmoe.types import Grouping, LayerId

Weighting = Callable[[Grouping, Tensor, int, LayerId], Tensor]
"""From a layer's grouping, its experts' frequency [E], a seed and the layer's name to weights [E] of any scale."""


def _frequency(grouping: Grouping, frequency_E: Tensor, seed: int, layer: LayerId) -> Tensor:
    return frequency_E


def _uniform(grouping: Grouping, frequency_E: Tensor, seed: int, layer: LayerId) -> Tensor:
    return torch.ones_like(frequency_E)


def _reversed(grouping: Grouping, frequency_E: Tensor, seed: int, layer: LayerId) -> Tensor:
    return 1 - frequency_E


def _leader(grouping: Grouping, frequency_E: Tensor, seed: int, layer: LayerId) -> Tensor:
    return grouping.leads().to(frequency_E)


def _random(grouping: Grouping, frequency_E: Tensor, seed: int, layer: LayerId) -> Tensor:
    return random_importance(grouping.num_experts, seed, layer)


WEIGHTINGS: dict[str, Weighting] = {
    "frequency": _frequency,
    "uniform": _uniform,
    "reversed": _reversed,
    "leader": _leader,
    "random": _random,
}
"""By name, as ``mcsmoe.methods.MERGES`` gives it."""


def random_importance(experts: int, seed: int, layer: LayerId) -> Tensor:
    """[E] float64 in [0, 1), the same for the same seed and layer whatever else was drawn before."""
    # hash() would differ between processes.
    key = int.from_bytes(f"{seed} {layer}".encode(), "little") % (2**61 - 1)
    return torch.rand(experts, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def shares(grouping: Grouping, importance_E: Tensor) -> Tensor:
    """[E] float64: importance of each expert over that of its group (equation 2), uniform where a group has none.

    Sums to 1 in each group.
    """
    importance_E = importance_E.to(device="cpu", dtype=torch.float64)
    table = grouping.expert_to_group.cpu()
    total_G = torch.zeros(grouping.num_groups, dtype=torch.float64).index_add_(0, table, importance_E)
    size_G = torch.bincount(table, minlength=grouping.num_groups).double()
    total_E = total_G[table]
    return torch.where(total_E > 0, importance_E / total_E, 1.0 / size_G[table])
