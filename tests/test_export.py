"""Exports: the same function where that is promised, a measured change where it is not, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_switch import batch, logits, model
from torch import nn

import mcsmoe
from mcsmoe import modules
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.export.change import logits_change
from mcsmoe.export.forms import dense, exact, folds, stock
from mcsmoe.export.recovery import RouterRecovery
from mcsmoe.types import ExpertWeights, LowRankFactors

TABLE = torch.tensor([0, 1, 0, 2, 1, 0])
FREQUENCY = torch.tensor([0.4, 0.1, 0.3, 0.1, 0.05, 0.05], dtype=torch.float64)


def merge(made: nn.Module, skip: int = 0, compress: bool = False) -> nn.Module:
    adapter = adapter_for(made)
    for layer in adapter.layers(made)[skip:]:
        weights = adapter.read_experts(made, layer)
        merged = {
            name: torch.stack([t[group == TABLE].mean(0) for group in range(3)]) for name, t in weights.tensors.items()
        }
        adapter.write_experts(made, layer, ExpertWeights(merged, weights.roles), TABLE)
        if compress:
            factors = {}
            for name, matrix in merged.items():
                u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
                left, right = u[..., :2] * s[:, None, :2], vh[:, :2]
                residual = matrix - left @ right
                residual[:, ::3] = 0
                factors[name] = LowRankFactors(left, right, residual)
            adapter.write_compressed(made, layer, factors, {}, TABLE)
    return modules.pack(made)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    mcsmoe.save(merge(model()), tmp_path / "merged")
    return tmp_path / "merged"


def text(made: nn.Module) -> list[dict[str, torch.Tensor]]:
    batches = [batch(seed=seed) for seed in range(5)]
    if made.config.is_encoder_decoder:
        return batches
    for one in batches:
        one["labels"] = torch.where(one["attention_mask"].bool(), one["input_ids"], -100)
    return batches


def stock_model(folder: Path, like: nn.Module) -> nn.Module:
    """Loaded by transformers alone."""
    back, found = type(like).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert not any(isinstance(module, modules.RedirectedExperts) for module in back.modules())
    return back.eval()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("skip", [0, 1])
def test_dense_is_the_same_function_in_plain_transformers(skip: int, compress: bool, tmp_path: Path) -> None:
    made = merge(model(), skip, compress)
    mcsmoe.save(made, tmp_path / "merged")
    dense(Streamed(tmp_path / "merged"), tmp_path / "dense")
    back = stock_model(tmp_path / "dense", made)
    assert back.config.model_type == "switch_transformers"
    assert back.config.num_experts == 6
    assert (logits(back, batch()) - logits(made, batch())).abs().max() < 5e-6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_dense_and_stock_of_stacked_experts_load_in_plain_transformers(family: str, tmp_path: Path) -> None:
    made = merge(tiny_models.model(family))
    mcsmoe.save(made, tmp_path / "merged")
    source = Streamed(tmp_path / "merged")
    dense(source, tmp_path / "dense")
    batches = text(made)
    assert logits_change(made, stock_model(tmp_path / "dense", made), batches).largest < 1e-6
    report = stock(source, tmp_path / "stock", batches)
    back = stock_model(tmp_path / "stock", made)
    assert back.config.num_local_experts == 3
    assert logits_change(made, back, batches) == report.folds["mean"]


def test_exact_gives_the_same_bytes(merged: Path, tmp_path: Path) -> None:
    exact(Streamed(merged), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert torch.equal(logits(mcsmoe.load(tmp_path / "again"), batch()), logits(mcsmoe.load(merged), batch()))


def test_stock_has_as_many_experts_as_groups_and_reports_the_change(merged: Path, tmp_path: Path) -> None:
    source, batches = Streamed(merged), [batch()]
    report = stock(source, tmp_path / "stock", batches, frequency=dict.fromkeys(source.layers, FREQUENCY))
    full = mcsmoe.load(merged)
    back = stock_model(tmp_path / "stock", full)
    assert back.config.num_experts == 3
    assert set(report.folds) == {"mean", "frequency", "dominant"}
    assert logits_change(full, back, batches) == report.folds[report.chosen]
    assert report.folds[report.chosen].divergence == min(change.divergence for change in report.folds.values())
    assert report.folds[report.chosen].largest > 1e-3  # the routers are not the same function, and it is said
    layer = source.layers[0]
    for name, parts in full.get_submodule(layer).experts.weights().tensors.items():
        assert torch.equal(adapter_for(back).read_experts(back, layer).tensors[name], parts)


def test_stock_is_exact_where_the_members_of_a_group_have_one_router_row(tmp_path: Path) -> None:
    """With equal rows the group's choice is the same; only the combine weight, a softmax over fewer rows, differs."""
    made = model()
    adapter = adapter_for(made)
    for layer in adapter.layers(made):
        rows = made.get_submodule(layer).router.classifier.weight.data
        rows.copy_(rows[torch.tensor([0, 1, 3])][TABLE])
    mcsmoe.save(merge(made), tmp_path / "merged")
    report = stock(Streamed(tmp_path / "merged"), tmp_path / "stock", [batch()])
    back = stock_model(tmp_path / "stock", made)
    with adapter.capture(made) as one, adapter_for(back).capture(back) as two:
        logits(made, batch())
        logits(back, batch())
        layer = adapter.layers(made)[0]
        assert torch.equal(TABLE[one.batches[layer].wanted_TK], two.batches[layer].wanted_TK)
    assert report.folds["mean"].largest > 0


def test_router_recovery_trains_only_routers_and_helps(merged: Path, tmp_path: Path) -> None:
    batches = [batch(seed=seed) for seed in range(5)]
    plain = stock(Streamed(merged), tmp_path / "plain", batches, fold="mean")
    assert plain.recovered is None
    recovery = RouterRecovery(steps=40, learning_rate=1e-2)
    report = stock(Streamed(merged), tmp_path / "trained", batches, fold="mean", recovery=recovery)
    full = mcsmoe.load(merged)
    before, after = stock_model(tmp_path / "plain", full), stock_model(tmp_path / "trained", full)
    assert logits_change(full, after, batches[-1:]) == report.recovered
    assert report.recovered.divergence < logits_change(full, before, batches[-1:]).divergence
    changed = {
        name
        for (name, one), two in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
        if not torch.equal(one, two)
    }
    assert changed == set(adapter_for(after).router_parameters(after))


def test_folding_matrices_by_hand() -> None:
    dead_E = torch.tensor([False, False, False, True, False, False])
    found = folds(TABLE, 3, dead_E, FREQUENCY)
    third = 1 / 3
    assert torch.allclose(found["mean"][0], torch.tensor([third, 0, third, 0, 0, third], dtype=torch.float64))
    assert torch.allclose(found["frequency"][0] * 0.75, torch.tensor([0.4, 0, 0.3, 0, 0, 0.05], dtype=torch.float64))
    assert found["dominant"].argmax(dim=1).tolist()[:2] == [0, 1]
    # Group 2 has only expert 3, which is never chosen: its row stays its own.
    assert found["mean"][2].tolist() == [0, 0, 0, 1, 0, 0]
    for matrix in found.values():
        assert torch.allclose(matrix.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_layers_with_different_numbers_of_groups_have_no_stock_form(tmp_path: Path) -> None:
    mcsmoe.save(merge(model(), skip=1), tmp_path / "merged")
    with pytest.raises(ValueError, match=r"encoder\.block\.1\.layer\.1\.mlp: 6.*--budget uniform"):
        stock(Streamed(tmp_path / "merged"), tmp_path / "stock", [batch()])
    assert not (tmp_path / "stock").exists()


def test_what_the_stock_form_cannot_hold_is_refused(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--fold is 'dominant'.*--groups"):
        stock(Streamed(merged), tmp_path / "stock", [batch()], fold="dominant")
    many = merge(tiny_models.model("mixtral", num_experts_per_tok=4))
    mcsmoe.save(many, tmp_path / "many")
    with pytest.raises(ValueError, match="3 groups, but num_experts_per_tok is 4"):
        stock(Streamed(tmp_path / "many"), tmp_path / "stock", text(many))


def test_a_change_is_none_for_the_same_model_and_only_real_positions_count() -> None:
    made = model()
    same = logits_change(made, made, [batch()])
    assert (same.largest, same.mean, same.agreement) == (0.0, 0.0, 1.0)
    assert abs(same.divergence) < 1e-6
    assert same.positions == int((batch()["labels"] != -100).sum())
