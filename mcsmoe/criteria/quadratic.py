"""The set of experts whose loss costs least by a quadratic: p' Q p over the dropped, Q a Gram matrix of gated outputs.

With Q_ij = sum over tokens of g_i g_j <f_i, f_j> the cost is exactly the squared change of the layer's output when the
set is deleted and nothing else changes. Whoever drops experts one by one by a score alone misses what they add together.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.types import LayerId


@dataclass(frozen=True)
class Limits:
    """What a set of kept experts must respect.

    ``group_E`` labels the groups that a router chooses among first; each must keep the same number of experts.
    """

    protected_E: Tensor  # bool: always kept
    dropped_E: Tensor  # bool: never kept
    group_E: Tensor  # int64, labels 0..N-1

    @classmethod
    def none(cls, experts: int) -> Limits:
        """Without any limit."""
        no_E = torch.zeros(experts, dtype=torch.bool)
        return cls(no_E, no_E.clone(), torch.zeros(experts, dtype=torch.int64))

    @property
    def groups(self) -> int:
        return int(self.group_E.max()) + 1

    def quota(self, kept: int, layer: LayerId = "") -> Tensor:
        """int64 [N]: experts to keep in each group.

        Raises:
            ValueError: no set of ``kept`` experts respects the limits; names the layer, the values and the remedy.
        """
        experts, groups = len(self.group_E), self.groups
        if not 1 <= kept <= experts:
            raise ValueError(f"layer {layer!r}: {kept} of {experts} experts are to be kept; give 1 to {experts}")
        both = (self.protected_E & self.dropped_E).nonzero()[:, 0].tolist()
        if both:
            raise ValueError(f"layer {layer!r}: expert {both[0]} is both protected and dropped; leave it in one list")
        if kept % groups:
            raise ValueError(
                f"layer {layer!r}: {kept} experts are to be kept, but its router chooses among {groups} groups of experts "
                f"first, which need the same number each; give a multiple of {groups}"
            )
        share = kept // groups
        for group in range(groups):
            here_E = self.group_E == group
            protected, free = int((self.protected_E & here_E).sum()), int((~self.dropped_E & here_E).sum())
            where = f"layer {layer!r}" + (f", router group {group}" if groups > 1 else "")
            if protected > share:
                raise ValueError(
                    f"{where}: {protected} experts are protected, but only {share} are kept; protect fewer"
                )
            if free < share:
                raise ValueError(
                    f"{where}: with those that are dropped {free} experts are left, not {share}; drop fewer"
                )
        return torch.full((groups,), share, dtype=torch.int64)

    def numbers(self, fewest: int = 1) -> list[int]:
        """Numbers of experts, from ``fewest`` up, of which some set respects the limits."""
        found = []
        for kept in range(max(1, fewest), len(self.group_E) + 1):
            with suppress(ValueError):
                self.quota(kept)
                found.append(kept)
        return found


def rounded(values: Tensor, scale: float) -> Tensor:
    """float64, rounded to 12 digits of ``scale``: sums that differ in last bits only (another order of threads) tie."""
    if not scale > 0:
        return values.double()
    return (values.double() / scale * 1e12).round() / 1e12


def highest(score_E: Tensor, kept: int, limits: Limits, layer: LayerId = "") -> Tensor:
    """int64 [kept], ascending: the experts with the highest score within the limits; ties go to the lower index."""
    quota_N = limits.quota(kept, layer)
    score_E = rounded(score_E, float(score_E.double().abs().max()))
    score_E = torch.where(limits.protected_E, torch.inf, torch.where(limits.dropped_E, -torch.inf, score_E))
    order_E = torch.argsort(score_E, descending=True, stable=True)
    parts = [order_E[limits.group_E[order_E] == group][:share] for group, share in enumerate(quota_N.tolist())]
    return torch.cat(parts).sort().values


def cost(quadratic_EE: Tensor, dropped_E: Tensor) -> float:
    """p' Q p for the experts marked in ``dropped_E`` (bool)."""
    part = quadratic_EE.double()[dropped_E][:, dropped_E]
    return float(part.sum())


def cheapest(quadratic_EE: Tensor, kept: int, limits: Limits, layer: LayerId = "") -> Tensor:
    """int64 [kept], ascending: what is left after dropping the set with the (nearly) smallest p' Q p.

    Experts are dropped one after another, each the cheapest beside those dropped already, then exchanged with kept ones
    as long as an exchange helps: O(E) for a step, O(E^2) for an exchange. Ties go to dropping the higher index, so that
    an expert that costs nothing leaves before one of a lower index.
    """
    quota_N = limits.quota(kept, layer)
    matrix_EE = quadratic_EE.detach().cpu().double()
    matrix_EE = (matrix_EE + matrix_EE.T) / 2
    if not bool(torch.isfinite(matrix_EE).all()):
        i, j = (~torch.isfinite(matrix_EE)).nonzero()[0].tolist()
        raise ValueError(f"layer {layer!r}: the cost of experts {i} and {j} is {float(matrix_EE[i, j])}; collect anew")
    scale = float(matrix_EE.diagonal().sum())
    dropped_E = limits.dropped_E.clone()
    for _ in range(len(matrix_EE) - kept - int(dropped_E.sum())):
        dropped_E[_next(matrix_EE, dropped_E, limits, quota_N, scale)] = True
    _exchange(matrix_EE, dropped_E, limits, scale)
    return (~dropped_E).nonzero()[:, 0]


def curve(quadratic_EE: Tensor, limits: Limits, fewest: int = 1) -> Tensor:
    """float64 [E + 1]: cost of the cheapest set found with k experts kept; infinite where k cannot be.

    Never rises with k: a set found for more dropped experts bounds those for fewer.
    """
    experts = len(quadratic_EE)
    made = torch.full((experts + 1,), torch.inf, dtype=torch.float64)
    for kept in limits.numbers(fewest):
        kept_K = cheapest(quadratic_EE, kept, limits)
        dropped_E = torch.ones(experts, dtype=torch.bool)
        dropped_E[kept_K] = False
        made[kept] = max(0.0, cost(quadratic_EE, dropped_E))
    for kept in range(1, experts + 1):
        if torch.isfinite(made[kept]) and torch.isfinite(made[:kept]).any():
            made[kept] = torch.minimum(made[kept], made[:kept].min())
    return made


def _next(matrix_EE: Tensor, dropped_E: Tensor, limits: Limits, quota_N: Tensor, scale: float) -> int:
    """The expert that adds least to the cost of those dropped, among groups that have more than their quota left."""
    added_E = matrix_EE.diagonal() + 2 * (matrix_EE @ dropped_E.double())
    left_N = torch.bincount(limits.group_E[~dropped_E], minlength=len(quota_N))
    open_E = ~dropped_E & ~limits.protected_E & (left_N > quota_N)[limits.group_E]
    added_E = torch.where(open_E, rounded(added_E, scale), torch.inf)
    return len(added_E) - 1 - int(added_E.flip(0).argmin())


def _exchange(matrix_EE: Tensor, dropped_E: Tensor, limits: Limits, scale: float) -> None:
    """Exchange a dropped expert with a kept one of its router group, the best first, until none helps; in place."""
    same_EE = limits.group_E[:, None] == limits.group_E[None, :]
    diagonal_E = matrix_EE.diagonal()
    for _ in range(len(matrix_EE) ** 2):
        sum_E = matrix_EE @ dropped_E.double()
        back_E = dropped_E & ~limits.dropped_E
        out_E = ~dropped_E & ~limits.protected_E
        # Rows: dropped experts that come back; columns: kept ones that leave.
        change_EE = (diagonal_E - 2 * sum_E)[:, None] + (diagonal_E + 2 * sum_E)[None, :] - 2 * matrix_EE
        allowed_EE = back_E[:, None] & out_E[None, :] & same_EE
        change_EE = torch.where(allowed_EE, rounded(change_EE, scale), torch.inf)
        place = int(change_EE.argmin())
        back, out = divmod(place, len(matrix_EE))
        if not float(change_EE[back, out]) < -1e-11:
            return
        dropped_E[back], dropped_E[out] = False, True
