"""The shared expert beside the routed ones: found by what the layer computes, and refitted with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import run
from safetensors.torch import load_file

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.calibration.tokens import LayerBatch
from mcsmoe.transform import refit as refitting
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.shared import probe, shared_projection

NAMES = {"qwen2_moe": "shared_expert.down_proj", "deepseek_v3": "shared_experts.down_proj"}


def layer_of(family: str) -> SparseLayer:
    model = tiny_models.model(family)
    adapter = adapter_for(model)
    return SparseLayer(model, adapter, adapter.layers(model)[0])


@pytest.mark.parametrize(("family", "name"), [*NAMES.items(), ("qwen3_moe", None), ("gpt_oss", None)])
def test_it_is_found_by_what_the_layer_gives(family: str, name: str | None) -> None:
    layer = layer_of(family)
    inputs_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    assert shared_projection(layer, inputs_TD) == name
    if name is None:
        return
    seen, block = probe(layer, inputs_TD, name), layer.module
    mlp: Any = block.get_submodule(name.split(".")[0])
    with torch.no_grad():
        gate_T = torch.ones(50)
        if hasattr(block, "shared_expert_gate"):
            gate_T = block.shared_expert_gate(inputs_TD).sigmoid()[:, 0]  # type: ignore[operator]
        hidden_TP = mlp.act_fn(mlp.gate_proj(inputs_TD)) * mlp.up_proj(inputs_TD)
    assert seen.factor_T is not None
    assert seen.hidden_TP is not None
    assert torch.allclose(seen.factor_T, gate_T, atol=1e-4)
    assert torch.allclose(seen.hidden_TP, hidden_TP, atol=1e-6)


@dataclass
class Tokens:
    """Tokens of a layer as it was."""

    made: list[LayerBatch]

    def batches(self) -> Iterator[LayerBatch]:
        return iter(self.made)


def tokens_of(layer: SparseLayer, count: int) -> Tokens:
    made = []
    for number in range(4):
        inputs_TD = torch.randn(count, 16, generator=torch.Generator().manual_seed(number))
        seen = probe(layer, inputs_TD)
        weights, target_TD = layer.read_experts(), torch.zeros(count, 16)
        for expert in range(weights.num_experts):
            gate_T = (seen.gate_TK * (seen.index_TK == expert)).sum(dim=1)
            target_TD += gate_T[:, None] * weights.output(expert, weights.hidden(expert, inputs_TD, layer.activation))
        made.append(LayerBatch(inputs_TD, seen.index_TK, seen.gate_TK, target_TD, number == 3))
    return Tokens(made)


@pytest.mark.parametrize("family", list(NAMES))
def test_the_layer_with_it_comes_nearer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for alone in (True, False):
        layer = layer_of(family)
        tokens = tokens_of(layer, 200)
        wanted = [layer.module(batch.inputs_TD[None]).detach() for batch in tokens.made]
        weights, table = layer.read_experts(), torch.arange(layer.num_experts) % 2
        layer.write_experts(weights.select(torch.tensor([0, 1])), table)
        if alone:
            monkeypatch.setattr(refitting, "shared_projection", lambda *_: None)
        report = refitting.refit_layer(layer, tokens, refitting.Refitting((1e-4,), sweeps=30))
        monkeypatch.undo()
        assert report.shared == (None if alone else NAMES[family])
        assert report.held_after < report.held_before
        found = [layer.module(batch.inputs_TD[None]).detach() for batch in tokens.made]
        pairs = [
            pair for pair, batch in zip(zip(found, wanted, strict=True), tokens.made, strict=True) if not batch.held_out
        ]
        errors.append(sum(float((one - two).square().sum()) for one, two in pairs))
    with_experts_alone, with_both = errors
    assert with_both < with_experts_alone


@pytest.mark.parametrize("family", list(NAMES))
def test_the_result_of_a_command_has_it(family: str, tmp_path: Path) -> None:
    sets = {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 2} if family == "deepseek_v3" else {}
    mcsmoe.save(tiny_models.model(family, **sets), tmp_path / "full")
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 96, (16,), generator=generator).tolist()} for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = ("--experts", 4, "--calibration", tmp_path / "text.jsonl", "--refit")
    # Its router takes sets of two of which both have to be there, so none of its eight can be deleted.
    more = ("--dropped", "redirect") if family == "deepseek_v3" else ()
    run("prune", tmp_path / "full", *given, *more, "--out", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "out"))
    shared = {name for name in before if name.endswith(f"{NAMES[family]}.weight")}
    assert shared
    # Held-out tokens may keep a layer as it was.
    assert not all(torch.equal(before[name], after[name]) for name in shared)
    same = [name for name in before if ".experts." not in name and ".gate" not in name and name not in shared]
    assert all(torch.equal(before[name], after[name]) for name in same)
