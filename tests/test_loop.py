"""The training loop against one written out by hand, and what it promises: pieces, precision, early stops, resumption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mcsmoe.train.loop import Batch, Trainer, TrainingPlan, decay_groups
from mcsmoe.train.state import StateStore

ROWS, WIDTH = 12, 5
PLAN = {"steps": 9, "steps_per_epoch": 4, "learning_rate": 0.05, "warmup_steps": 3, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """accelerate keeps one precision for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, 1)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[torch.dtype] = []

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        self.seen.append(hidden.dtype)
        return self.last(self.dropout(self.norm(hidden).relu())).squeeze(1)


class Squares:
    """Mean square over the whole batch, as a sum over rows divided by their number."""

    def prepare(self, batch: Batch) -> int:
        return len(batch["labels"])

    def __call__(self, model: nn.Module, rows: Batch, totals: int) -> dict[str, Tensor]:
        loss = (model(rows["x"]).float() - rows["labels"]).square().sum() / totals
        return {"loss": loss, "task_loss": loss}


def batch(step: int) -> Batch:
    drawn = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=drawn)
    return {"x": x, "labels": x.sum(dim=1).sin()}


def small(dropout: float = 0.0) -> Small:
    torch.manual_seed(0)
    return Small(dropout)


def train(
    model: nn.Module, folder: Path, batch_for: Callable[[int], Batch] = batch, select: Any = None, **changes: Any
) -> Any:
    plan = TrainingPlan(**{**PLAN, **changes})
    store = StateStore(folder, "one and the same")
    return Trainer(model, plan, Squares(), batch_for, store, select=select, selection_metric="x", device="cpu").run("")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_it_is_adamw_with_clipping_warm_up_and_decay(tmp_path: Path, clip_norm: float) -> None:
    model, by_hand = small(), small()
    found = train(model, tmp_path, clip_norm=clip_norm)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in by_hand.named_parameters()}
    clipped = 0
    for step in range(PLAN["steps"]):
        rows = batch(step)
        loss = (by_hand(rows["x"]) - rows["labels"]).square().mean()
        assert float(loss.detach()) == pytest.approx(found.training["loss"][step], rel=1e-5)
        names, parameters = zip(*by_hand.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        clipped += scale < 1
        rate = 0.05 * ((step + 1) / 4 if step < 3 else (9 - step) / 6)
        assert found.training["learning_rate"][step] == pytest.approx(rate)
        with torch.no_grad():
            for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * scale * gradient)
                second.mul_(0.98).add_(0.02 * (scale * gradient).square())
                if parameter.ndim > 1:  # biases and norms are not decayed
                    parameter.mul_(1 - rate * 0.1)
                up = first / (1 - 0.9 ** (step + 1))
                down = (second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-6
                parameter.sub_(rate * up / down)
    assert bool(clipped) == bool(clip_norm)
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(weights(model)[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_norms_and_biases_are_not_decayed() -> None:
    model = small()
    decayed, plain = decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.first.weight), id(model.last.weight)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == 4
    model.first.weight.requires_grad_(False)
    assert len(decay_groups(model, 0.1)[0]["params"]) == 1


def test_one_call_for_all_parameters_gives_the_bits_of_one_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, one_by_one = small(), small()
    train(at_once, tmp_path / "at once")
    monkeypatch.setattr("mcsmoe.train.loop._SMALL", 0)
    train(one_by_one, tmp_path / "one by one")
    assert all(torch.equal(tensor, weights(one_by_one)[name]) for name, tensor in weights(at_once).items())


class Wrapped(nn.Module):
    """What several processes train in the place of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, rows: Tensor) -> Any:
        return self.module(rows)


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_it_trains_on_in_its_own_mode_after_a_selection(tmp_path: Path, dropout: bool, wrapped: bool) -> None:
    model, modes = small(dropout=0.3), []
    model.dropout.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    plan = TrainingPlan(**PLAN, select_every=2, dropout=dropout)
    store = StateStore(tmp_path, "one and the same")
    trainer = Trainer(model, plan, Squares(), batch, store, select=lambda _: 0.0, selection_metric="x", device="cpu")
    if wrapped:
        trainer.wrapped = Wrapped(model)
    trainer.run("")
    assert modes == [dropout] * PLAN["steps"]


@pytest.mark.parametrize("pieces", [2, 3, 5, 50])
def test_a_batch_in_pieces_is_the_whole_batch(tmp_path: Path, pieces: int) -> None:
    """Whatever their number, even where the rows cannot be shared out evenly or there are fewer of them."""
    whole, parts = small(), small()
    one = train(whole, tmp_path / "one").training
    other = train(parts, tmp_path / "other", accumulation=pieces).training
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"), rtol=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path: Path) -> None:
    plain, mixed = small(), small()
    one = train(plain, tmp_path / "one").training
    AcceleratorState._reset_state(reset_partial_state=True)
    other = train(mixed, tmp_path / "other", precision="bf16").training
    assert set(plain.seen) == {torch.float32}
    assert set(mixed.seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(mixed).values()} == {torch.float32}
    assert not one["loss"].equals(other["loss"])
    assert other["loss"].to_numpy() == pytest.approx(one["loss"].to_numpy(), rel=0.05)


def test_it_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    values, kept = iter([0.2, 0.6, 0.5, 0.6, 0.9]), []

    def select(model: nn.Module) -> float:
        kept.append(weights(model))
        return next(values)

    model = small()
    found = train(model, tmp_path, select=select, steps=40, select_every=2, patience=2)
    # 0.6 after step 4 is not bettered after steps 6 and 8; an equal value is no better one.
    assert found.selection["step"].tolist() == [2, 4, 6, 8]
    assert found.selection["best"].tolist() == [True, True, False, False]
    assert (found.best_step, len(found.training)) == (4, 8)
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in weights(model).items())


def test_a_training_resumes_in_the_middle_of_an_epoch_to_the_same_bits(tmp_path: Path) -> None:
    """Dropout, moments, the curve and the selection go on as if nothing had happened."""

    def select(model: nn.Module) -> float:
        return -float(Squares()(model, batch(99), ROWS)["loss"])

    def power_cut(step: int) -> Batch:
        if step == 7:
            raise KeyboardInterrupt
        return batch(step)

    settings = {"select": select, "select_every": 2, "save_every": 3, "steps": 11}
    whole = small(dropout=0.3)
    one = train(whole, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(small(dropout=0.3), tmp_path / "cut", power_cut, **settings)
    again = small(dropout=0.3)
    torch.manual_seed(12345)
    other = train(again, tmp_path / "cut", **settings)
    assert (6 % PLAN["steps_per_epoch"], len(other.training)) == (2, 11)
    pd.testing.assert_frame_equal(one.training.drop(columns="seconds"), other.training.drop(columns="seconds"))
    pd.testing.assert_frame_equal(one.selection, other.selection)
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())


def test_a_loss_that_is_not_finite_is_refused_by_step_and_rate(tmp_path: Path) -> None:
    def broken(step: int) -> Batch:
        return {**batch(step), "labels": torch.full((ROWS,), math.inf if step == 3 else 0.0)}

    with pytest.raises(ValueError, match=r"the loss is inf at step 4; lower the learning rate \(0\.05\)"):
        train(small(), tmp_path, broken)
