"""Task-specific pruning in the training loop: who falls and when, and that what is left is the masked model exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_switch
import torch
from torch import Tensor

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.train.loop import Trainer, TrainingPlan, TrainingResult
from mcsmoe.train.objectives import TaskObjective
from mcsmoe.train.state import StateStore
from mcsmoe.train.task_specific import UsagePruner, remove_fallen
from mcsmoe.types import chosen_layers


def train(
    folder: Path, steps: int = 12, experts: int = 2, stop_after: int | None = None
) -> tuple[torch.nn.Module, UsagePruner, TrainingResult]:
    model = tiny_switch.model()
    adapter = adapter_for(model)
    pruner = UsagePruner(model, adapter, adapter.layers(model), experts, steps, interval=2, until=0.5, threshold=0.5)
    objective = TaskObjective(adapter, balance_weight=0.01, usage=pruner.count)

    def batch_for(step: int) -> dict[str, Tensor]:
        if step == stop_after:
            raise KeyboardInterrupt
        return tiny_switch.batch(seed=step)

    plan = TrainingPlan(steps=steps, steps_per_epoch=steps, learning_rate=1e-3, save_every=1)
    trainer = Trainer(model, plan, objective, batch_for, StateStore(folder, "test"), pruner=pruner, device="cpu")
    return model, pruner, trainer.run("test")


def test_each_layer_comes_down_and_what_is_left_is_the_masked_model(tmp_path: Path) -> None:
    model, pruner, result = train(tmp_path / "state")
    adapter = adapter_for(model)
    kept = result.training["kept_fraction"]
    assert (kept.diff().dropna() <= 1e-12).all(), "an expert came back"
    assert kept.iloc[0] == 1.0
    assert kept.iloc[-1] == pytest.approx(2 / 6)
    assert not pruner.finished(4)
    assert pruner.finished(5)

    inputs = tiny_switch.batch(rows=8, seed=77)
    before = tiny_switch.logits(model, inputs)
    with adapter.capture(model) as captured, torch.no_grad():
        model(**inputs)
    for layer, batch in captured.batches.items():
        chosen = set(batch.wanted_TK[batch.valid_T].flatten().tolist())
        assert chosen <= set(pruner.pruner.alive[layer].nonzero()[:, 0].tolist()), layer

    groupings = pruner.groupings()
    remove_fallen(model, adapter, groupings)
    assert torch.equal(tiny_switch.logits(model, inputs), before)
    for layer, grouping in groupings.items():
        assert grouping.num_groups == 2 == adapter.read_experts(model, layer).num_experts
    for layer, grouping in groupings.items():
        rows = grouping.rows(layer, grouping.leads())
        assert [row["expert"] for row in rows if row["dominant"]] == grouping.dominant.tolist()
        assert [row["group"] for row in rows] == grouping.expert_to_group.tolist()
        assert sum(row["weight"] for row in rows) == grouping.num_groups


def test_the_most_used_experts_stay() -> None:
    model = tiny_switch.model()
    adapter = adapter_for(model)
    layers = adapter.layers(model)
    pruner = UsagePruner(model, adapter, layers[:1], experts=3, steps=4, until=0.5, interval=1, threshold=0.3)
    counts = torch.tensor([50, 0, 20, 10, 15, 5])
    pruner.count(layers[0], counts)
    pruner.count(layers[0], counts)
    pruner.count(layers[1], counts)  # a layer that is left out
    pruner.observe()
    # The even share is 100 / 6; below 0.3 of it, 5 tokens, only expert 1 falls.
    assert pruner.apply(0) == pytest.approx(5 / 6)
    assert pruner.pruner.alive[layers[0]].tolist() == [True, False, True, True, True, True]
    assert pruner.apply(1) == pytest.approx(0.5)
    assert pruner.pruner.alive[layers[0]].tolist() == [True, False, True, False, True, False]
    assert list(pruner.groupings()) == layers[:1]


def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    expected, whole, curve = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_after=5)
    found, resumed, again = train(tmp_path / "cut")
    assert whole.pruner.alive.keys() == resumed.pruner.alive.keys()
    for layer, alive_E in whole.pruner.alive.items():
        assert torch.equal(alive_E, resumed.pruner.alive[layer])
    for (name, wanted), (_, got) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(wanted, got), name
    assert curve.training["loss"].tolist() == again.training["loss"].tolist()
    # In the same order, too: the table of groups is compared by its bytes.
    assert list(whole.groupings()) == list(resumed.groupings())
    for layer, grouping in whole.groupings().items():
        assert torch.equal(grouping.expert_to_group, resumed.groupings()[layer].expert_to_group)


def test_more_experts_than_there_are_is_refused_by_layer() -> None:
    model = tiny_switch.model()
    adapter = adapter_for(model)
    with pytest.raises(ValueError, match=r"encoder\.block.* has 6 experts; it cannot keep 7, lower experts"):
        UsagePruner(model, adapter, adapter.layers(model), experts=7, steps=4)


def test_a_layer_left_out_must_exist() -> None:
    assert chosen_layers(["a", "b"], ["a"]) == ["b"]
    with pytest.raises(ValueError, match=r"merge\.exclude_layers names 'c'; the model has \['a', 'b'\]"):
        chosen_layers(["a", "b"], ["c"])
