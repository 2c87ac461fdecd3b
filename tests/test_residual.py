"""Kept rows of residuals and their schedule: closed forms, brute force, and the published defects."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcsmoe.compress.residual as residual_module
from mcsmoe.compress.residual import KeptSchedule, ResidualPruner, kept_rows


def matrices(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -- schedule ----------------------------------------------------------------------------------------------------
def test_the_papers_schedule() -> None:
    schedule = KeptSchedule(0.1, 10_000, 400, 1600)
    assert schedule.phases == (400, 1600)
    for step in (0, 1, 399, 400):
        assert schedule.kept(step) == 1.0
    for step in (401, 2_000, 5_000, 8_399):
        assert schedule.kept(step) == pytest.approx(0.1 + 0.9 * (1 - (step - 400) / 8000) ** 3, abs=1e-15)
    for step in (8_400, 9_999, 20_000):
        assert schedule.kept(step) == 0.1
        assert schedule.finished(step)
    assert not schedule.finished(8_399)


@pytest.mark.parametrize("steps", [*range(1, 30), 97, 1000])
@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (1, 0), (0, 5), (16, 64), (50, 200), (400, 1600)])
def test_defect_schedule_jump(steps: int, warmup: int, cooldown: int) -> None:
    schedule = KeptSchedule(0.1, steps, warmup, cooldown)
    kept = [1.0, *map(schedule.kept, range(steps))]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 0.1
    assert schedule.finished(steps - 1)
    assert [schedule.finished(step) for step in range(steps)] == [value == 0.1 for value in kept[1:]]
    # The steepest descent of a cubic over half the steps; a single step cannot but jump.
    descent = max(1, steps - sum(schedule.phases))
    assert descent >= steps // 2
    largest = max(before - after for before, after in pairwise(kept))
    assert largest <= 0.9 * (1 - (1 - 1 / descent) ** 3) + 1e-12


def test_phases_are_shortened_in_proportion_only_where_they_must_be() -> None:
    assert KeptSchedule(0.1, 100, 10, 40).phases == (10, 40)
    assert KeptSchedule(0.1, 100, 40, 160).phases == (10, 40)
    assert KeptSchedule(0.1, 100, 0, 0).phases == (0, 1)
    assert KeptSchedule(1.0, 10, 1, 1).kept(9) == 1.0
    assert KeptSchedule(0.0, 10, 1, 1).kept(9) == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.1, 10, 1, 1), r"final is 1\.1"),
        ((-0.1, 10, 1, 1), r"final is -0\.1"),
        ((0.1, 0, 1, 1), "steps is 0"),
        ((0.1, 10, -1, 1), "warmup is -1"),
        ((0.1, 10, 1, -2), "cooldown is -2"),
    ],
)
def test_bad_schedules_are_named(values: tuple[float, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeptSchedule(*values)


# -- rows --------------------------------------------------------------------------------------------------------
def test_rows_of_lowest_score_go_first_over_all_matrices() -> None:
    scores = {"a": torch.tensor([[5.0, 1.0], [3.0, 8.0]]), "b": torch.tensor([[2.0, 7.0, 4.0, 6.0]])}
    kept = kept_rows(scores, {"a": 3, "b": 3}, 0.5)
    assert kept["a"].tolist() == [[True, False], [False, True]]
    assert kept["b"].tolist() == [[False, True, False, True]]


def test_the_fraction_is_of_entries_where_rows_differ_in_width() -> None:
    scores = {"narrow": torch.tensor([[1.0, 2.0, 9.0, 3.0]]), "wide": torch.tensor([[8.0, 4.0]])}
    widths = {"narrow": 2, "wide": 8}  # 24 entries: from the top 2, 8 (10), 8 (18), 2 (20), 2 (22), 2 (24)
    for wanted, narrow, wide in ((2, 1, 0), (3, 1, 1), (10, 1, 1), (11, 1, 2), (18, 1, 2), (19, 2, 2), (24, 4, 2)):
        kept = kept_rows(scores, widths, wanted / 24)
        assert (int(kept["narrow"].sum()), int(kept["wide"].sum())) == (narrow, wide)


@pytest.mark.parametrize("rows", [1, 7, 10, 30, 100])
def test_tied_scores_give_the_exact_count_lowest_rows_first(rows: int) -> None:
    for percent in range(0, 101, 10):
        kept = kept_rows({"a": torch.zeros(1, rows)}, {"a": 3}, percent / 100)["a"][0].tolist()
        count = -(-percent * rows // 100)
        assert kept == [True] * count + [False] * (rows - count)


# -- pruner ------------------------------------------------------------------------------------------------------
class Constant:
    """A schedule that keeps one fraction."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def kept(self, step: int) -> float:
        return self.fraction

    def finished(self, step: int) -> bool:
        return True


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(matrices(2, 6, 4, seed=seed)), "b": nn.Parameter(matrices(3, 4, 6, seed=seed + 1))}


def set_gradients(residuals: dict[str, nn.Parameter], seed: int) -> None:
    for place, residual in enumerate(residuals.values()):
        residual.grad = matrices(*residual.shape, seed=1000 + 10 * seed + place)


def pruner_of(residuals: dict[str, nn.Parameter], schedule: Any, smoothing: float = 0.85) -> ResidualPruner:
    return ResidualPruner(residuals, schedule, smoothing)


def test_pruning_follows_the_definition_over_many_steps() -> None:
    residuals = parameters()
    schedule = KeptSchedule(0.2, 12, 2, 3)
    pruner = pruner_of(residuals, schedule)
    optimizer = torch.optim.AdamW(residuals.values(), lr=0.05)
    smooth = {name: np.zeros(tuple(residual.shape)) for name, residual in residuals.items()}  # of entries
    for step in range(12):
        set_gradients(residuals, step)
        for name, residual in residuals.items():
            taken = np.abs(residual.detach().double().numpy() * residual.grad.double().numpy())  # type: ignore[union-attr]
            smooth[name] = 0.85 * smooth[name] + 0.15 * taken
        pruner.observe()
        optimizer.step()
        before = {name: residual.detach().clone() for name, residual in residuals.items()}
        kept = pruner.apply(step)
        rows = sorted(
            (score, name, row)
            for name, entries in smooth.items()
            for row, score in enumerate(entries.mean(axis=2).flatten())
        )
        entries, zeroed = 120, set()
        for _, name, row in rows:
            if entries - residuals[name].shape[2] < schedule.kept(step) * 120 - 1e-6:
                break
            entries -= residuals[name].shape[2]
            zeroed.add((name, row))
        assert kept == pytest.approx(entries / 120)
        for name, residual in residuals.items():
            expected = before[name].flatten(0, 1).clone()
            expected[[row for other, row in zeroed if other == name]] = 0
            assert torch.equal(residual.detach().flatten(0, 1), expected)
    rows_left = {name: (residual != 0).any(dim=2).sum(dim=1).tolist() for name, residual in residuals.items()}
    assert pruner.kept_rows() == rows_left
    assert 24 <= 4 * sum(rows_left["a"]) + 6 * sum(rows_left["b"]) < 24 + 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [1, 8, 20, 2**17])
def test_importance_does_not_depend_on_how_many_rows_are_taken_at_a_time(
    monkeypatch: pytest.MonkeyPatch, cached: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(residual_module, "_CACHED", cached)
    residual = nn.Parameter(matrices(3, 5, 4).to(dtype))
    residual.grad = matrices(3, 5, 4, seed=7).to(dtype)
    pruner = pruner_of({"a": residual}, Constant(0.5))
    pruner.observe()
    expected = 0.15 * (residual.detach().float() * residual.grad.float()).abs().mean(dim=2)
    assert torch.allclose(pruner.state_dict()["a"], expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_defect_lag() -> None:
    # The mask of the first step already knows the first step's gradient.
    residual = nn.Parameter(torch.ones(1, 4, 2))
    pruner = pruner_of({"a": residual}, Constant(0.5))
    residual.grad = torch.tensor([1.0, 4.0, 2.0, 3.0])[None, :, None].expand(1, 4, 2)
    pruner.observe()
    assert pruner.apply(0) == 0.5
    assert residual.detach()[0].any(dim=1).tolist() == [False, True, False, True]


def test_defect_revive() -> None:
    # Masked rows are zero after every step, though momentum moves them, and score with the weight, zero, that they had.
    residuals = parameters()
    pruner = pruner_of(residuals, Constant(0.5))
    optimizer = torch.optim.AdamW(residuals.values(), lr=0.1)
    set_gradients(residuals, 0)
    masked: dict[str, Tensor] = {}
    for step in range(4):
        pruner.observe()
        scores = pruner.state_dict()
        optimizer.step()
        if step:
            assert all((residual.detach()[masked[name]] != 0).any() for name, residual in residuals.items())
        pruner.apply(step)
        masked = {name: (residual.detach() == 0).all(dim=2) for name, residual in residuals.items()}
        pruner.observe()
        for name, score in pruner.state_dict().items():
            assert torch.allclose(score[masked[name]], 0.85 * scores[name][masked[name]])
        pruner.load_state_dict(scores)


def test_a_row_revives_by_its_score_only() -> None:
    residual = nn.Parameter(torch.ones(1, 2, 3))
    pruner = pruner_of({"a": residual}, Constant(0.5))
    pruner.load_state_dict({"a": torch.tensor([[1.0, 2.0]])})
    pruner.apply(0)
    assert residual.detach()[0].any(dim=1).tolist() == [False, True]
    with torch.no_grad():
        residual.fill_(0.5)  # as momentum would
    pruner.load_state_dict({"a": torch.tensor([[3.0, 2.0]])})
    pruner.apply(1)
    assert residual.detach()[0].tolist() == [[0.5] * 3, [0.0] * 3]


def test_defect_kth() -> None:
    # Right after the warm-up a small model has less than one row to lose.
    residual = nn.Parameter(torch.ones(1, 2, 1))
    pruner = pruner_of({"a": residual}, KeptSchedule(0.5, 1000, 1, 1))
    residual.grad = torch.ones(1, 2, 1)
    pruner.observe()
    for step in range(4):
        assert pruner.apply(step) == 1.0
    assert pruner.apply(999) == 0.5
    assert pruner.kept_rows() == {"a": [1]}


def test_nothing_or_everything_kept() -> None:
    residuals = parameters()
    pruner = pruner_of(residuals, Constant(1.0))
    before = residuals["a"].detach().clone()
    assert pruner.apply(0) == 1.0
    assert torch.equal(residuals["a"].detach(), before)
    assert pruner_of(residuals, Constant(0.0)).apply(0) == 0.0
    assert pruner.kept_rows() == {"a": [0, 0], "b": [0, 0, 0]}


def test_experts_without_gradient_lose_importance_and_nothing_else() -> None:
    residuals = parameters()
    pruner = pruner_of(residuals, Constant(0.5))
    set_gradients(residuals, 0)
    pruner.observe()
    first = pruner.state_dict()
    residuals["a"].grad = None
    pruner.observe()
    assert torch.allclose(pruner.state_dict()["a"], 0.85 * first["a"])
    assert (pruner.state_dict()["b"] > first["b"]).all()


def test_a_gradient_that_overflowed_does_not_poison_the_score() -> None:
    residuals = parameters()
    pruner = pruner_of(residuals, Constant(0.5))
    set_gradients(residuals, 0)
    residuals["a"].grad[0, 0, 0] = torch.inf  # type: ignore[index]
    residuals["a"].grad[0, 1, 0] = torch.nan  # type: ignore[index]
    pruner.observe()
    assert torch.isfinite(pruner.state_dict()["a"]).all()
    assert pruner.apply(0) >= 0.5


def test_a_resumed_pruner_goes_on_exactly() -> None:
    def run(pause: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        residuals = parameters()
        schedule = KeptSchedule(0.2, 10, 1, 2)
        pruner = pruner_of(residuals, schedule)
        for step in range(10):
            if step == pause:
                saved = pruner.state_dict()
                residuals = {name: nn.Parameter(residual.detach().clone()) for name, residual in residuals.items()}
                pruner = pruner_of(residuals, schedule)
                pruner.load_state_dict(saved)
            set_gradients(residuals, step)
            pruner.observe()
            with torch.no_grad():
                for residual in residuals.values():
                    residual.sub_(0.1 * residual.grad)  # type: ignore[operator]
            pruner.apply(step)
        return pruner.state_dict(), {name: residual.detach() for name, residual in residuals.items()}

    for undisturbed, resumed in zip(run(None), run(4), strict=True):
        for name, tensor in undisturbed.items():
            assert torch.equal(tensor, resumed[name])


def test_saved_state_is_a_copy() -> None:
    residuals = parameters()
    pruner = pruner_of(residuals, Constant(0.5))
    saved = pruner.state_dict()
    set_gradients(residuals, 0)
    pruner.observe()
    assert all((score == 0).all() for score in saved.values())


def test_bad_residuals_and_states_are_named() -> None:
    with pytest.raises(ValueError, match="no residuals to prune"):
        pruner_of({}, Constant(0.5))
    with pytest.raises(ValueError, match=r"residual 'a' has shape \(3, 4\)"):
        pruner_of({"a": nn.Parameter(torch.zeros(3, 4))}, Constant(0.5))
    with pytest.raises(ValueError, match=r"smoothing is 1\.0"):
        pruner_of(parameters(), Constant(0.5), smoothing=1.0)
    pruner = pruner_of(parameters(), Constant(0.5))
    with pytest.raises(ValueError, match="residual 'b' is only in this model"):
        pruner.load_state_dict({"a": torch.zeros(2, 6)})
    with pytest.raises(ValueError, match=r"residual 'a': the saved importance is \(2, 5\), not \(2, 6\)"):
        pruner.load_state_dict({"a": torch.zeros(2, 5), "b": torch.zeros(3, 4)})
