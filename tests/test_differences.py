"""Behaviour in which we differ from the published code and that no other test is about (docs/differences.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_switch
import torch
from torch import Tensor, nn

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.train.loop import Trainer, TrainingPlan
from mcsmoe.train.state import StateStore


class Squared:
    """An objective that notes whether the model it trains is in training mode."""

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def prepare(self, batch: dict[str, Tensor]) -> None:
        return None

    def __call__(self, model: nn.Module, rows: dict[str, Tensor], totals: None) -> dict[str, Tensor]:
        self.modes.append(model.training)
        loss = model(rows["x"]).square().mean()
        return {"loss": loss, "task_loss": loss}


def trained(place: Path, values: list[float], dropout: bool = True) -> tuple[Any, Squared, list[bool], nn.Module]:
    """A training of six steps that is scored after every second with ``values`` in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    plan = TrainingPlan(steps=6, steps_per_epoch=6, learning_rate=0.1, select_every=2, save_every=0, dropout=dropout)
    objective, scored = Squared(), []

    def select(model: nn.Module) -> float:
        scored.append(model.training)
        return values[len(scored) - 1]

    def batch(_step: int) -> dict[str, Tensor]:
        return {"x": torch.ones(4, 2), "labels": torch.zeros(4, 1, dtype=torch.int64)}

    store = StateStore(place, "signature")
    result = Trainer(model, plan, objective, batch, store, select=select, device="cpu").run("test")
    return result, objective, scored, model


def test_a_checkpoint_is_kept_even_where_no_score_rises_above_zero(tmp_path: Path) -> None:
    result, _, _, model = trained(tmp_path, [-0.5, -0.1, -0.2])
    assert result.best_step == 4
    assert result.selection["best"].tolist() == [True, True, False]
    other = trained(tmp_path, [-0.5, -0.6, -0.7])
    assert other[0].best_step == 2
    assert not torch.equal(model[0].weight, other[3][0].weight)


def test_evaluations_come_after_the_steps_they_are_entered_under(tmp_path: Path) -> None:
    result, _, _, _ = trained(tmp_path, [0.1, 0.2, 0.3])
    assert result.selection["step"].tolist() == [2, 4, 6]


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_is_on_where_it_is_asked_for_and_never_while_scoring(tmp_path: Path, dropout: bool) -> None:
    _, objective, scored, model = trained(tmp_path, [0.1, 0.2, 0.3], dropout)
    assert objective.modes == [dropout] * 6
    assert scored == [False] * 3
    assert not model.training


def test_router_jitter_has_no_part_in_evaluation() -> None:
    model = tiny_switch.model(router_jitter_noise=0.5)
    plain = tiny_switch.model(router_jitter_noise=0.0)
    plain.load_state_dict(model.state_dict())
    inputs = tiny_switch.batch()
    adapter = adapter_for(model)
    with adapter.capture(model) as captured:
        logits = tiny_switch.logits(model, inputs)
        seen = {layer: batch.inputs_TD for layer, batch in captured.batches.items()}
    assert torch.equal(logits, tiny_switch.logits(plain, inputs))
    with adapter.capture(plain) as captured:
        tiny_switch.logits(plain, inputs)
        assert all(torch.equal(seen[layer], batch.inputs_TD) for layer, batch in captured.batches.items())
