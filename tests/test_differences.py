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


class TwoExperts(nn.Module):
    """Rows go to expert 0 or 1 by the sign of their first column; stacked, one product holds both, as in merged layers."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.stacked = stacked
        self.experts = nn.ParameterList([torch.ones(2, 3)] if stacked else [torch.ones(3), torch.ones(3)])

    def forward(self, x_TD: Tensor) -> Tensor:
        chosen_T = (x_TD[:, 0] > 0).long()
        if self.stacked:
            return (self.experts[0][chosen_T] * x_TD).sum(dim=1)
        out_T = torch.zeros(len(x_TD))
        for expert in chosen_T.unique().tolist():
            out_T = out_T.masked_scatter(chosen_T == expert, x_TD[chosen_T == expert] @ self.experts[expert])
        return out_T


def first_expert(folder: Path, stacked: bool, steps: int) -> Tensor:
    """Weights of expert 0 after a training in which it receives tokens in the first step only."""

    def batch(step: int) -> dict[str, Tensor]:
        x = torch.ones(4, 3)
        if step == 0:
            x[:2, 0] = -1
        return {"x": x, "labels": torch.zeros(4, 1, dtype=torch.int64)}

    model = TwoExperts(stacked)
    plan = TrainingPlan(
        steps=steps, steps_per_epoch=steps, learning_rate=0.05, weight_decay=0.1, schedule="constant", save_every=0
    )
    Trainer(model, plan, Squared(), batch, StateStore(folder, "signature"), device="cpu").run("test")
    return (model.experts[0][0] if stacked else model.experts[0]).detach().clone()


def test_an_expert_without_tokens_stands_still_in_layers_that_were_not_merged(tmp_path: Path) -> None:
    one, four = (first_expert(tmp_path / f"own{steps}", False, steps) for steps in (1, 4))
    assert torch.equal(one, four)
    # In a merged layer the experts are one tensor: a gradient of zero decays them and lets their momentum go on.
    one, four = (first_expert(tmp_path / f"stacked{steps}", True, steps) for steps in (1, 4))
    assert not torch.equal(one, four)
