"""Structured pruning of residuals while training: importance, schedule, masks (section 3.2 of MC-SMoE; LoSparse).

A row of a residual [G, o, i] is an output feature of one expert. Per step the importance of an entry is
|s * dL/ds|, smoothed over steps and averaged over its row; the rows of lowest importance over all residuals of all
layers are set to zero so that the kept fraction follows a cubic schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_CACHED = 2**17  # entries of a product that are summed at a time on a CPU


@dataclass(frozen=True)
class KeptSchedule:
    """The kept fraction P(t) of step t = 0..steps-1: 1, then a cubic descent, then ``final``.

    P(t) = 1 before T_i, final + (1 - final) (1 - (t - T_i) / (T - T_i - T_f))^3, and ``final`` for the last T_f steps:
    continuous, unlike the formula printed in the paper. The first and last phase together take at most half of the
    steps, and are shortened in proportion where more is asked for, so that a short training descends as smoothly as it
    can. The last step always has the final fraction.

    Args:
        final: fraction kept in the end, from 0 to 1.
        steps: T, of the whole training.
        warmup: T_i, steps before the first row is pruned.
        cooldown: T_f, steps at the final fraction.

    Raises:
        ValueError: a value out of range; names the field.
    """

    final: float
    steps: int
    warmup: int
    cooldown: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.final <= 1.0:
            raise ValueError(f"final is {self.final}; the kept fraction is from 0 to 1")
        for field, least in (("steps", 1), ("warmup", 0), ("cooldown", 0)):
            value = getattr(self, field)
            if value < least:
                raise ValueError(f"{field} is {value}; give at least {least}")

    @property
    def phases(self) -> tuple[int, int]:
        """(T_i, T_f) as they are used, in steps."""
        warmup, cooldown = self.warmup, max(1, self.cooldown)
        room = self.steps // 2
        if warmup + cooldown > room:
            warmup = warmup * room // (warmup + cooldown)
            cooldown = max(1, room - warmup)
        return warmup, cooldown

    def kept(self, step: int) -> float:
        """Fraction of the residual to keep after step ``step``, counted from 0."""
        warmup, cooldown = self.phases
        if step >= self.steps - cooldown:
            return self.final
        if step <= warmup:
            return 1.0
        progress = (step - warmup) / (self.steps - warmup - cooldown)
        return self.final + (1.0 - self.final) * (1.0 - progress) ** 3

    def finished(self, step: int) -> bool:
        """Whether step ``step`` has the final fraction, as every later one."""
        return step >= self.steps - self.phases[1]


def kept_rows(scores: Mapping[str, Tensor], widths: Mapping[str, int], fraction: float) -> dict[str, Tensor]:
    """By name, bool like the scores: the fewest rows of highest score that hold ``fraction`` of all entries.

    The fraction is of entries, because rows of different matrices differ in width and the fraction promises a size.
    Ties break by order of the names, then by lower row.

    Args:
        scores: by name, importance of rows in any shape.
        widths: by name, entries in a row.
    """
    flat_N = torch.cat([score.flatten() for score in scores.values()])
    width_N = torch.cat([torch.full((score.numel(),), widths[name]) for name, score in scores.items()])
    width_N = width_N.to(flat_N.device)
    total = int(width_N.sum())
    # The product may exceed a whole number by rounding only.
    wanted = math.ceil(fraction * total - 1e-9 * total)
    order_N = torch.argsort(flat_N, descending=True, stable=True)
    before_N = width_N[order_N].cumsum(0) - width_N[order_N]
    keep_N = torch.empty_like(flat_N, dtype=torch.bool)
    keep_N[order_N] = before_N < wanted
    parts = keep_N.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _row_sums(weight_Goi: Tensor, gradient_Goi: Tensor) -> Tensor:
    """[G, o] float32: sum of |weight * gradient| over each row."""
    weight_Ni, gradient_Ni = weight_Goi.flatten(0, 1), gradient_Goi.flatten(0, 1)
    rows, inner = weight_Ni.shape
    # On a CPU the product of a few rows stays in its cache; the whole product would go through memory three times.
    step = rows if weight_Ni.device.type != "cpu" else max(1, _CACHED // inner)
    product_ni = weight_Ni.new_empty(min(step, rows), inner)
    sum_N = weight_Ni.new_empty(rows, dtype=torch.float32)
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        product = product_ni[: here.stop - start]
        torch.mul(weight_Ni[here], gradient_Ni[here], out=product).abs_()
        torch.sum(product, dim=1, dtype=torch.float32, out=sum_N[here])
    return sum_N.view(weight_Goi.shape[:2])


class ResidualPruner:
    """Prunes rows of residuals along a schedule; called once a step at two places.

    ``observe`` after the backward pass, before the optimiser: it needs this step's gradients with the weights they
    were taken at. ``apply`` after the optimiser: momentum moves rows that are masked, so the mask is laid on again
    every step. Masks depend on weights and averaged gradients only, so they are the same on every process.

    Args:
        residuals: by name, [G, o, i]; names and order must be the same when resuming.
        schedule: fraction of all entries to keep by step.
        smoothing: weight of the past in the moving average of the importance, from 0 to below 1.

    Raises:
        ValueError: no residuals, one that is not [G, o, i], or a smoothing out of range.
    """

    def __init__(self, residuals: Mapping[str, Tensor], schedule: KeptSchedule, smoothing: float = 0.85) -> None:
        if not residuals:
            raise ValueError("no residuals to prune; compress the model first (write_compressed)")
        for name, residual in residuals.items():
            if residual.ndim != 3:
                raise ValueError(f"residual {name!r} has shape {tuple(residual.shape)}, not [groups, out, inner]")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing is {smoothing}; give a number from 0 to below 1")
        self.residuals, self.schedule, self.smoothing = dict(residuals), schedule, smoothing
        self._widths = {name: residual.shape[2] for name, residual in self.residuals.items()}
        self._entries = sum(residual.numel() for residual in self.residuals.values())
        # The moving average is linear, so the average over a row is kept in the place of its entries.
        self.scores = {
            name: torch.zeros(residual.shape[:2], dtype=torch.float32, device=residual.device)
            for name, residual in self.residuals.items()
        }

    @torch.no_grad()
    def observe(self) -> None:
        """Take this step's gradients into the importance; a residual without a gradient (unused) contributes zero."""
        for name, residual in self.residuals.items():
            score_Go = self.scores[name].mul_(self.smoothing)
            if residual.grad is not None:
                sum_Go = _row_sums(residual, residual.grad)
                # Scaled half-precision gradients overflow now and then; the optimiser skips those steps as well.
                sum_Go.nan_to_num_(nan=0.0, posinf=0.0)
                score_Go.add_(sum_Go, alpha=(1.0 - self.smoothing) / self._widths[name])

    @torch.no_grad()
    def apply(self, step: int) -> float:
        """Zero the rows of lowest importance for step ``step`` (from 0).

        Returns:
            The fraction of all entries that is in kept rows: the schedule's, rounded up to whole rows.
        """
        fraction = self.schedule.kept(step)
        if fraction >= 1.0:
            return 1.0
        kept = 0
        for name, keep_Go in kept_rows(self.scores, self._widths, fraction).items():
            self.residuals[name][~keep_Go] = 0
            kept += int(keep_Go.sum()) * self._widths[name]
        return kept / self._entries

    def finished(self, step: int) -> bool:
        """Whether the schedule prunes nothing more after step ``step``."""
        return self.schedule.finished(step)

    def kept_rows(self) -> dict[str, list[int]]:
        """By name, rows of each group that are not all zero: what a packed checkpoint stores."""
        return {name: (residual != 0).any(dim=2).sum(dim=1).tolist() for name, residual in self.residuals.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the smoothed importance, float32 [G, o] by name of the residual."""
        return {name: score.detach().cpu().clone() for name, score in self.scores.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict`` exactly.

        Raises:
            ValueError: the state is of other residuals; names the first that differs.
        """
        for name in sorted(set(state) ^ set(self.scores)):
            raise ValueError(f"residual {name!r} is only in {'the saved state' if name in state else 'this model'}")
        for name, score in self.scores.items():
            if state[name].shape != score.shape:
                raise ValueError(
                    f"residual {name!r}: the saved importance is {tuple(state[name].shape)}, not {tuple(score.shape)}"
                )
        for name, score in self.scores.items():
            score.copy_(state[name])
