"""What no reader of a checkpoint may believe, open or build: refused by name, before any work."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import model
from tiny_switch import model as switch_model

import mcsmoe
from mcsmoe.artefacts.digests import SUMS
from mcsmoe.artefacts.tensors import INDEX
from mcsmoe.checkpoint.streaming import Streamed

READERS = {"load": mcsmoe.load, "command line": Streamed}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    model("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change(folder: Path, function: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = function(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path, *words: str) -> None:
    for reader in READERS.values():
        with pytest.raises(ValueError, match=re.escape(words[0] if words else "")) as error:
            reader(folder)
        for word in words:
            assert word in str(error.value), str(error.value)
        assert "\n" not in str(error.value)


QUANTISED = {
    "hqq": {"quantization_config": {"quant_method": "hqq", "bits": 4}},
    "quark": {"quantization_config": {"quant_method": "quark", "weight_block_size": [128, 128]}},
    "nested": {"text_config": {"quantization_config": {"quant_method": "aqlm"}}},
    "affine": {"quantization": {"mode": "affine", "bits": 4, "group_size": 64}},
}


@pytest.mark.parametrize("kind", list(QUANTISED))
def test_a_configuration_of_an_unknown_quantiser_is_refused_by_its_method(kind: str, folder: Path) -> None:
    edit(folder, **QUANTISED[kind])
    (folder / "model.safetensors").unlink()  # before tensors are looked for
    refused(folder, "quantised", {"nested": "aqlm"}.get(kind, kind), "start from the model in bfloat16", "fp8")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_configuration_are_refused(dtype: torch.dtype, folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change(folder, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    refused(folder, name, str(dtype).removeprefix("torch."), "quantised")


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "qzeros", "g_idx", "scales", "weight_packed"])
def test_a_scale_without_a_place_is_refused(suffix: str, folder: Path) -> None:
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    change(folder, lambda tensors: tensors | {name: torch.ones(4)})
    refused(folder, name, "quantised")


def test_integers_where_the_model_has_real_numbers_are_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int32)})
    refused(folder, "lm_head.weight", "int32")


def test_an_index_that_names_a_pickle_or_another_folder_is_refused_unread(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("pytorch_model.bin", "../model.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors"):
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        refused(folder, INDEX, repr(name))


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"]
)
def test_what_is_no_index_is_refused(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    model("qwen3_moe", seed=1).save_pretrained(folder / "other", max_shard_size="20KB")
    for file in [*(folder / "other").glob("model-*"), folder / "other" / INDEX]:
        shutil.move(file, folder / file.name)
    refused(folder, "two sets of weights", INDEX)
    (folder / "model.safetensors").unlink()
    assert torch.equal(mcsmoe.load(folder).lm_head.weight, model("qwen3_moe", seed=1).lm_head.weight)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, SUMS])
def test_a_pipe_is_not_opened(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, name, "not an ordinary file")


@pytest.mark.parametrize("name", ["/dev/zero", "../outside", "a/../../outside"])
def test_a_list_of_digests_names_files_of_its_folder_only(name: str, folder: Path) -> None:
    (folder / SUMS).write_text(f"{'0' * 64}  {name}\n")
    refused(folder, SUMS, name)


NUMBERS = {
    "num_hidden_layers": 10**8,
    "num_experts": 10**9,
    "hidden_size": 10**13,
    "vocab_size": 10**13,
    "max_position_embeddings": 10**13,
}


@pytest.mark.parametrize("field", list(NUMBERS))
def test_sizes_that_no_file_bears_out_are_refused_before_anything_is_built(field: str, folder: Path) -> None:
    edit(folder, **{field: NUMBERS[field]})
    if field == "num_experts":  # the class writes it by its other name
        edit(folder, num_local_experts=NUMBERS[field])
    refused(folder, str(NUMBERS[field]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 4), ("hidden_size", 32), ("vocab_size", 97), ("moe_intermediate_size", 48)],
)
def test_sizes_that_differ_from_the_files_are_refused(field: str, value: int, folder: Path) -> None:
    edit(folder, **{field: value})
    refused(folder)


@pytest.mark.parametrize(
    "text", ["[]", "3", "", "{", "[" * 100_000, '{"architectures": 3}', '{"architectures": ["os"]}']
)
def test_a_broken_configuration_is_one_message(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "wide"}, {"hidden_size": None}, {"num_experts_per_tok": []}, {"num_attention_heads": 0}]
)
def test_fields_of_the_wrong_kind_are_one_message(fields: dict[str, object], folder: Path) -> None:
    edit(folder, **fields)
    refused(folder, "config.json")


def test_groups_that_a_layer_cannot_have_are_refused(tmp_path: Path) -> None:
    from test_checkpoint import merge_in_place

    mcsmoe.save(merge_in_place(switch_model()), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for layer in config["mcsmoe"]["layers"].values():
        layer["num_groups"] = 10**12
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / SUMS).unlink()
    with pytest.raises(ValueError, match=r"not described completely|was not written for"):
        mcsmoe.load(tmp_path / "out")


def test_code_beside_a_checkpoint_never_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    edit(folder, model_type="unheard_of", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for reader in READERS.values():
        with contextlib.suppress(ValueError):
            reader(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}})
    )
    with pytest.raises(ValueError, match="tokenizer"):
        mcsmoe.load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()
