"""What a result keeps of its source: ties, buffers, number formats, left-over tensors, configuration, companions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_switch
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch, logits, model
from torch import nn

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.export.change import logits_change
from mcsmoe.export.forms import dense, stock
from mcsmoe.types import ExpertWeights

PREDICTION = "model.layers.3"


def edit(folder: Path, **fields: object) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return config


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def add(folder: Path, **tensors: torch.Tensor) -> None:
    found = load_file(folder / "model.safetensors") | {name.replace("__", "."): one for name, one in tensors.items()}
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def merge(source: Streamed, out: Path, groups: int = 4) -> None:
    """Every layer to ``groups`` groups of neighbours, averaged."""
    adapter = source.adapter

    def change(layer: str) -> None:
        experts = adapter.num_experts(source.model, layer)
        table = torch.arange(experts) * groups // experts
        weights = adapter.read_experts(source.model, layer)
        merged = {
            name: torch.stack([one[table == group].float().mean(0) for group in range(groups)]).to(one.dtype)
            for name, one in weights.tensors.items()
        }
        adapter.write_experts(source.model, layer, ExpertWeights(merged, weights.roles), table)

    source.rewrite(out, change, {"stage": "merge"})


def text(seed: int = 3) -> list[dict[str, torch.Tensor]]:
    return [batch(seed=seed + step) for step in range(3)]


# -- routers and buffers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen2_moe", "laguna"])
def test_a_streamed_model_computes_what_the_model_in_memory_does_on_every_batch(family: str, tmp_path: Path) -> None:
    made = model(family)
    made.save_pretrained(tmp_path / "model")
    source = Streamed(tmp_path / "model")
    adapter = adapter_for(made)
    with source.runnable() as streamed, source.adapter.capture(streamed) as one, adapter.capture(made) as two:
        for inputs in text():
            assert torch.equal(logits(streamed, inputs), logits(made, inputs))
            for layer in source.layers:
                assert torch.equal(one.batches[layer].wanted_TK, two.batches[layer].wanted_TK)
                assert torch.equal(one.batches[layer].logits_TE, two.batches[layer].logits_TE)
    assert all(tensor.is_meta for tensor in source.model.state_dict().values())


def test_computing_with_a_tensor_that_was_not_read_is_an_error(tmp_path: Path) -> None:
    model("qwen3_moe").save_pretrained(tmp_path / "model")
    source = Streamed(tmp_path / "model")
    with source.runnable() as streamed:
        source.forget(["lm_head.weight"])
        with pytest.raises(RuntimeError, match="contents were not read"):
            logits(streamed, batch())


# -- ties --------------------------------------------------------------------------------------------------------
def tied(family: str, folder: Path, own_head: bool) -> nn.Module:
    """A checkpoint whose configuration says that the head is tied; the model as transformers alone reads it."""
    make = tiny_switch.model if family == "switch" else lambda **how: model(family, **how)
    made = make(tie_word_embeddings=True)
    made.save_pretrained(folder)
    if own_head:
        add(folder, lm_head__weight=torch.randn(made.lm_head.weight.shape, generator=torch.Generator().manual_seed(2)))
    return type(made).from_pretrained(folder).eval()


@pytest.mark.parametrize("family", ["qwen3_moe", "switch"])
@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("form", ["compact", "stock"])
def test_a_tie_is_what_transformers_takes_it_for(family: str, own_head: bool, form: str, tmp_path: Path) -> None:
    truth = tied(family, tmp_path / "model", own_head)
    inputs = tiny_switch.batch() if family == "switch" else batch()
    back = mcsmoe.load(tmp_path / "model")
    assert torch.equal(logits(back, inputs), logits(truth, inputs))
    if form == "compact":
        adapter = adapter_for(back)
        for layer in adapter.layers(back):
            weights = adapter.read_experts(back, layer)
            adapter.write_experts(back, layer, weights, torch.arange(weights.num_experts))
    mcsmoe.save(back, tmp_path / "saved")
    again = mcsmoe.load(tmp_path / "saved")
    # Redirected experts add up in another order.
    assert torch.allclose(logits(again, inputs), logits(truth, inputs), atol=1e-4)
    assert torch.equal(logits(again, inputs), logits(back, inputs))
    head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == (not own_head)
    with Streamed(tmp_path / "saved").runnable() as streamed:
        assert torch.equal(logits(streamed, inputs), logits(again, inputs))
    if family == "qwen3_moe":
        assert config_of(tmp_path / "saved")["tie_word_embeddings"] is not own_head


def test_a_head_stored_without_the_embedding_serves_both(tmp_path: Path) -> None:
    tied("qwen3_moe", tmp_path / "model", own_head=False)
    found = load_file(tmp_path / "model" / "model.safetensors")
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
    save_file(found, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    inputs, back = batch(), mcsmoe.load(tmp_path / "model")
    with Streamed(tmp_path / "model").runnable() as streamed:
        assert torch.equal(logits(streamed, inputs), logits(back, inputs))


# -- number formats ----------------------------------------------------------------------------------------------
def test_a_file_of_several_number_formats_runs_in_the_models_and_is_kept_in_its_own(tmp_path: Path) -> None:
    folder, inputs = tmp_path / "model", batch()
    made = model("qwen3_moe")
    router = {name: one for name, one in made.state_dict().items() if name.endswith("mlp.gate.weight")}
    made.to(torch.bfloat16).save_pretrained(folder)
    add(folder, **router)
    truth = type(made).from_pretrained(folder, dtype="auto").eval()
    source = Streamed(folder)
    with source.runnable() as streamed:
        assert torch.equal(logits(streamed, inputs), logits(truth, inputs))
    merge(source, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {one.dtype for name, one in stored.items() if name.endswith("gate.weight")} == {torch.float32}
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert logits(mcsmoe.load(tmp_path / "merged"), inputs).isfinite().all()


# -- configuration -----------------------------------------------------------------------------------------------
STRANGE = {"rope_theta": 5000000, "sliding_window": None, "model_maker": {"note": [1, None]}, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("form", ["merged", "dense", "stock", "saved"])
def test_the_configuration_is_the_sources_own_with_what_changed(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model("qwen3_moe", num_experts=8).to(torch.bfloat16).save_pretrained(folder)
    source = edit(folder, **STRANGE)
    source.pop("dtype")
    source.pop("num_local_experts", None)
    source["num_experts"] = 8
    (folder / "config.json").write_text(json.dumps(source).replace('"rope_theta": 5000000', '"rope_theta": Infinity'))
    (folder / "config.json").write_text(json.dumps(source))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5], "temperature": 0.6, "house_rule": true}')
    opened = Streamed(folder)
    merge(opened, tmp_path / "merged")
    if form == "dense":
        dense(Streamed(tmp_path / "merged"), tmp_path / form)
    elif form == "stock":
        stock(Streamed(tmp_path / "merged"), tmp_path / form, text(), fold="mean")
    elif form == "saved":
        mcsmoe.save(mcsmoe.load(folder), tmp_path / form)
    result = config_of(tmp_path / form)
    if form == "merged":
        assert result.pop("mcsmoe")["base_model_type"] == "qwen3_moe"
        assert result.pop("model_type") == "mcsmoe"
        result = {**result, "model_type": "qwen3_moe"}
    assert result == source | ({"num_experts": 4} if form == "stock" else {})
    kept = json.loads((tmp_path / form / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [1, 5], "temperature": 0.6, "house_rule": True}


def test_an_infinity_in_a_configuration_survives(tmp_path: Path) -> None:
    model("qwen3_moe").save_pretrained(tmp_path / "model")
    for written in ('{"__float__": "Infinity"}', "Infinity"):
        config = edit(tmp_path / "model", limit="HERE")
        (tmp_path / "model" / "config.json").write_text(json.dumps(config).replace('"HERE"', written))
        out = tmp_path / f"merged-{len(written)}"
        merge(Streamed(tmp_path / "model"), out)
        assert json.dumps(config_of(out)["limit"]) == written
        assert mcsmoe.load(out).config.limit == float("inf")


# -- tensors without a place -------------------------------------------------------------------------------------
def with_prediction(folder: Path) -> None:
    made = model("deepseek_v3", n_group=1, topk_group=1)
    made.save_pretrained(folder)
    found = load_file(folder / "model.safetensors")
    further = {
        name.replace("layers.2.", "layers.3."): one.clone() for name, one in found.items() if "layers.2." in name
    }
    save_file(found | further | {f"{PREDICTION}.eh_proj.weight": torch.ones(16, 32)}, folder / "model.safetensors")
    edit(folder, num_nextn_predict_layers=1)


def held(folder: Path) -> int:
    return sum(name.startswith(PREDICTION) for file in folder.glob("*.safetensors") for name in load_file(file))


def test_layers_for_prediction_are_kept_where_they_fit_and_named_where_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_prediction(tmp_path / "model")
    caplog.set_level("INFO", logger="mcsmoe")
    merge(Streamed(tmp_path / "model"), tmp_path / "merged")
    assert f"{PREDICTION}.*" in caplog.text
    count = held(tmp_path / "model")
    assert held(tmp_path / "merged") == count > 20
    assert config_of(tmp_path / "merged")["num_nextn_predict_layers"] == 1
    dense(Streamed(tmp_path / "merged"), tmp_path / "dense")
    assert held(tmp_path / "dense") == count
    assert config_of(tmp_path / "dense")["num_nextn_predict_layers"] == 1
    caplog.clear()
    source = Streamed(tmp_path / "merged")
    source.keeps_prediction = False
    stock(source, tmp_path / "stock", text(), fold="mean")
    assert held(tmp_path / "stock") == 0
    assert config_of(tmp_path / "stock")["num_nextn_predict_layers"] == 0
    assert f"left out {PREDICTION}.*" in caplog.text
    caplog.clear()
    mcsmoe.save(mcsmoe.load(tmp_path / "merged"), tmp_path / "saved")
    assert f"left out {PREDICTION}.*" in caplog.text
    assert held(tmp_path / "saved") == 0
    assert config_of(tmp_path / "saved")["num_nextn_predict_layers"] == 0


def test_left_over_tensors_travel_with_every_result(tmp_path: Path) -> None:
    name = "model.vision_tower.blocks.0.attn.qkv.weight"
    model("qwen3_moe").save_pretrained(tmp_path / "model")
    add(tmp_path / "model", **{name: torch.ones(3, 5)})
    merge(Streamed(tmp_path / "model"), tmp_path / "merged")
    dense(Streamed(tmp_path / "merged"), tmp_path / "dense")
    stock(Streamed(tmp_path / "merged"), tmp_path / "stock", text(), fold="mean")
    for form in ("merged", "dense", "stock"):
        assert load_file(tmp_path / form / "model.safetensors")[name].shape == (3, 5)
        assert logits(mcsmoe.load(tmp_path / form), batch()).isfinite().all()


# -- names and companions ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_stock_result_of_an_unchanged_or_pruned_model_has_the_published_names(family: str, tmp_path: Path) -> None:
    model(family).save_pretrained(tmp_path / "model")
    source = Streamed(tmp_path / "model")

    def change(layer: str) -> None:
        source.adapter.write_experts(source.model, layer, source.adapter.read_experts(source.model, layer))

    source.rewrite(tmp_path / "out", change, {})
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_companions_are_copied_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model("qwen3_moe").save_pretrained(folder)
    (tmp_path / "secret.txt").write_text("private\n")
    names = [
        "LICENSE",
        "README.md",
        "modeling_my.py",
        "merges.txt",
        "additional_chat_templates/tool.jinja",
        "vocab.bpe",
    ]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    for name in ("pytorch_model.bin", "optimizer.pt", ".hidden", "model.gguf", "consolidated.safetensors"):
        (folder / name).write_bytes(b"weights")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    merge(Streamed(folder), tmp_path / "out")
    files = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    ours = {"config.json", "generation_config.json", "model.safetensors", "SHA256SUMS"}
    assert files == {*names, *ours, "README.parent.md"}  # the result has a card of its own
    for name in names:
        kept = "README.parent.md" if name == "README.md" else name
        assert (tmp_path / "out" / kept).read_bytes() == name.encode()


def test_a_model_without_a_head_has_a_dense_form_and_no_stock_one(tmp_path: Path) -> None:
    made = model("mixtral").model
    made.save_pretrained(tmp_path / "model")
    merge(Streamed(tmp_path / "model"), tmp_path / "merged", groups=3)
    dense(Streamed(tmp_path / "merged"), tmp_path / "dense")
    with pytest.raises(ValueError, match="MixtralModel has no language-modelling head"):
        stock(Streamed(tmp_path / "merged"), tmp_path / "stock", text())
    assert not (tmp_path / "stock").exists()


def test_logits_of_streamed_models_are_those_of_loaded_ones(tmp_path: Path) -> None:
    with_prediction(tmp_path / "model")
    merge(Streamed(tmp_path / "model"), tmp_path / "merged")
    loaded = mcsmoe.load(tmp_path / "merged")
    with Streamed(tmp_path / "merged").runnable() as streamed:
        assert logits_change(loaded, streamed, text()).largest == 0
