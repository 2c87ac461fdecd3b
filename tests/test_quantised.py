"""Quantised checkpoints: read as plain numbers, written as they were stored but for what changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import quantised_forms as forms
import tiny_models
import torch
from command_line import refused, run
from safetensors.torch import load_file, save_file
from torch import Tensor

import mcsmoe
from mcsmoe.checkpoint.describe import describe
from mcsmoe.checkpoint.quantised import mxfp4
from mcsmoe.checkpoint.quantised.settings import renumbered, settings_of
from mcsmoe.checkpoint.slicing import leave_experts
from mcsmoe.checkpoint.streaming import Streamed

ROUNDING = {"nf4-twice": 2**-7}  # two products of float32 may round to the other bfloat16 neighbour


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    tiny_models.model("qwen3_moe", intermediate_size=40).bfloat16().save_pretrained(folder / "plain")
    rows = [{"input_ids": [2 + (7 * row + 5 * place) % 90 for place in range(9)]} for row in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "plain"


@pytest.fixture(scope="module")
def made(plain: Path) -> Any:
    """By form, a quantised checkpoint and the same in closed form."""

    def pair(form: str) -> tuple[Path, Path]:
        folder = plain.parent / form
        if not folder.exists():
            forms.write(plain, folder, form, plain.parent / f"{form}-truth")
        return folder, plain.parent / f"{form}-truth"

    return pair


def same(left: Any, right: Any, tolerance: float = 0.0) -> None:
    mine, other = left.state_dict(), right.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=tolerance, atol=0)


@pytest.mark.parametrize("form", list(forms.FORMS))
def test_numbers_are_those_of_the_closed_form(form: str, made: Any) -> None:
    folder, truth = made(form)
    mine, other = Streamed(folder), Streamed(truth)
    assert mine.own_names() == other.own_names()
    for name in other.own_names():
        torch.testing.assert_close(mine.read(name), other.read(name), rtol=ROUNDING.get(form, 0.0), atol=0)
    said = describe(folder)
    assert said["total"]["parameters"] == describe(truth)["total"]["parameters"]
    assert said["quantisation"] == forms.FORMS[form][1]["quant_method"]
    stored = load_file(folder / "model.safetensors")
    assert said["total"]["bytes"] == sum(tensor.nbytes for tensor in stored.values())


def test_a_loaded_model_is_plain_and_is_saved_so(made: Any, tmp_path: Path) -> None:
    folder, truth = made("fp8")
    mcsmoe.save(mcsmoe.load(folder), tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    same(mcsmoe.load(tmp_path / "saved"), mcsmoe.load(truth))


@pytest.mark.parametrize("form", ["gptq"])
def test_a_pass_sees_the_model_in_closed_form(form: str, made: Any, tmp_path: Path) -> None:
    folders = made(form)
    for number, folder in enumerate(folders):
        rows = folder.parent / "rows.jsonl"
        run("collect", folder, "--calibration", rows, "--out", tmp_path / str(number))
    run("evaluate", folders[0], "--text", rows, "--reference", folders[1], "--out", tmp_path / "0.parquet")
    for file in (tmp_path / "0").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "1" / file.name).read_bytes()
    documents = pd.read_parquet(tmp_path / "0.parquet")
    assert (documents["nats"] == documents["reference_nats"]).all()


@pytest.mark.parametrize("form", ["ct-w4a16", "fp8"])
def test_merged_experts_are_plain_and_all_else_as_it_was_stored(form: str, made: Any, tmp_path: Path) -> None:
    folder, truth = made(form)
    for source, out in ((folder, "merged"), (truth, "expected")):
        run("merge", source, "--calibration", folder.parent / "rows.jsonl", "--experts", 3, "--out", tmp_path / out)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    others = [name for name in before if ".experts." not in name]
    assert any(before[name].dtype != torch.bfloat16 for name in others)
    assert all(same_bytes(before[name], after[name]) for name in others)
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in after.items() if ".projections." in name)
    same(mcsmoe.load(tmp_path / "merged"), mcsmoe.load(tmp_path / "expected"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "model.layers.0.mlp.experts" in json.dumps(config["mcsmoe"]["quantization"]).replace("\\", "")


def test_compressed_experts_are_those_of_the_closed_form(made: Any, tmp_path: Path) -> None:
    folder, truth = made("nf4")
    run("compress", folder, "--rank", 4, "--keep", 0.5, "--out", tmp_path / "compressed")
    run("compress", truth, "--rank", 4, "--keep", 0.5, "--out", tmp_path / "compressed-expected")
    same(mcsmoe.load(tmp_path / "compressed"), mcsmoe.load(tmp_path / "compressed-expected"))


def same_bytes(left: Tensor, right: Tensor) -> bool:
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


# -- gpt-oss -----------------------------------------------------------------------------------------------------
def test_four_bit_floats_of_stacked_experts(tmp_path: Path) -> None:
    model = tiny_models.model("gpt_oss", hidden_size=32, intermediate_size=64, num_attention_heads=4).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    stored, truth = {}, {}
    draw = torch.Generator().manual_seed(0)
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        stored[name] = truth[name] = tensor
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, inputs, outputs = tensor.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs), generator=draw)
        exponents = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=draw)
        stored.pop(name)
        pairs = codes.reshape(experts, outputs, inputs // 32, 16, 2)
        stored[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        stored[f"{name}_scales"] = exponents.to(torch.uint8)
        values = torch.from_numpy(forms.FOUR_BIT_FLOATS)[codes] * 2.0 ** (exponents - 127).repeat_interleave(32, dim=2)
        truth[name] = values.transpose(1, 2).bfloat16().contiguous()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    for folder, tensors, more in (
        (tmp_path / "four", stored, {"quantization_config": {"quant_method": "mxfp4"}}),
        (tmp_path / "truth", truth, {}),
    ):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | more))
    same(mcsmoe.load(tmp_path / "four"), mcsmoe.load(tmp_path / "truth"))


def test_the_library_decodes_four_bit_floats_alike() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=draw).to(torch.uint8)
    scales = torch.randint(110, 130, (3, 8, 2), generator=draw).to(torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    mine = torch.stack([mxfp4.decoded({"blocks": blocks[one], "scales": scales[one]}) for one in range(3)])
    assert torch.equal(mine.bfloat16(), expected)


def test_the_library_decodes_whole_blocks_alike() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    from mcsmoe.checkpoint.quantised import fp8

    weight = torch.randn(64, 48).to(torch.float8_e4m3fn)
    scale = torch.rand(4, 3)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(fp8.decoded({"weight": weight, "scale": scale}, [16, 16]), expected)


# -- what is refused ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("form", "gone", "match"),
    [
        ("fp8", "weight_scale_inv", "no .*weight_scale_inv or .*weight_scale beside it"),
        ("ct-w4a16", "weight_shape", "weight_shape beside it"),
        ("gptq", "qzeros", "has no .*qzeros beside it"),
        ("nf4", "weight.quant_map", "is not in the files"),
        ("bnb-int8", "SCB", "no .*SCB beside it"),
    ],
)
def test_a_part_that_is_missing_is_named(form: str, gone: str, match: str, made: Any, tmp_path: Path) -> None:
    folder, _ = made(form)
    tensors = load_file(folder / "model.safetensors")
    first = next(name for name in tensors if name.endswith(gone))
    del tensors[first]
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text((folder / "config.json").read_text())
    for reader in (mcsmoe.load, Streamed):
        with pytest.raises(ValueError, match=match) as error:
            reader(tmp_path / "model")
        assert str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quant_method": "aqlm"}, "quantised (aqlm)"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size is [0, 1]"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24'"),
        ({"quant_method": "awq", "version": "gemv"}, "'gemv'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "mxfp4"}, "no tensor in the files is"),
    ],
)
def test_other_kinds_are_refused_by_name(
    settings: dict[str, Any], match: str, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    message = refused(caplog, "compress", folder, "--rank", 4, "--out", tmp_path / "out")
    assert match in message
    assert not (tmp_path / "out").exists()


# -- settings ----------------------------------------------------------------------------------------------------
def test_experts_named_by_number_get_their_new_ones() -> None:
    fields = {
        "ignore": ["lm_head", "m.1.experts.0.up", "m.1.experts.3.up", "m.11.experts.3.up", "re:.*gate$"],
        "groups": {"one": {"targets": ["m.1.experts.5"], "bits": 4}},
    }
    found = renumbered(fields, {"m.1.experts": [3, 5]})
    assert found["ignore"] == ["lm_head", "m.1.experts.0.up", "m.11.experts.3.up", "re:.*gate$"]
    assert found["groups"] == {"one": {"targets": ["m.1.experts.1"], "bits": 4}}


@pytest.mark.parametrize("form", list(forms.FORMS))
def test_what_is_plain_is_named_as_its_readers_match_names(form: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    settings = settings_of({"quantization_config": forms.FORMS[form][1]})[0]
    assert settings.format is not None
    before = json.dumps(settings.fields)
    said = settings.format.with_plain(settings.fields, ["model.layers.1.mlp.experts"])
    assert json.dumps(settings.fields) == before
    inside, outside = "model.layers.1.mlp.experts.3.up_proj", "model.layers.11.mlp.experts.3.up_proj"
    field = next(name for name in said if said[name] != settings.fields.get(name))
    if settings.method in ("fp8", "awq", "bitsandbytes"):
        assert not should_convert_module(inside, said[field])
        assert should_convert_module(outside, said[field])
        return
    expressions = [one[3:] if settings.method != "gptq" else one[2:] for one in said[field] if ":" in one]
    assert any(re.match(one, inside) for one in expressions)
    assert not any(re.match(one, outside) for one in expressions if "gate" not in one)


# -- experts left out ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["nf4", "gptq"])
def test_experts_that_stay_are_the_bytes_that_they_were(form: str, made: Any, tmp_path: Path) -> None:
    folder, truth = made(form)
    rows = folder.parent / "rows.jsonl"
    for source, out in ((folder, "pruned"), (truth, "expected")):
        run("prune", source, "--calibration", rows, "--experts", 4, "--criterion", "frequency", "--out", tmp_path / out)
    same(mcsmoe.load(tmp_path / "pruned"), mcsmoe.load(tmp_path / "expected"))
    kept = json.loads((tmp_path / "pruned" / "experts.json").read_text())["layers"]
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "pruned" / "model.safetensors")
    for name, tensor in after.items():
        place = re.match(r"(.*\.mlp)\.experts\.(\d+)\.(.*)", name)
        if place:
            old = kept[place[1]]["kept"][int(place[2])]
            assert same_bytes(tensor, before[f"{place[1]}.experts.{old}.{place[3]}"])
        elif name.endswith("mlp.gate.weight"):
            assert same_bytes(tensor, before[name][kept[name.removesuffix(".gate.weight")]["kept"]])
        else:
            assert same_bytes(tensor, before[name])
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["quantization_config"] == forms.FORMS[form][1]
    assert {layer["experts"] for layer in describe(tmp_path / "pruned")["layers"]} == {4}


def test_refitted_experts_are_plain_and_said_to_be(made: Any, tmp_path: Path) -> None:
    folder, truth = made("fp8")
    rows = folder.parent / "rows.jsonl"
    for source, out in ((folder, "refitted"), (truth, "expected")):
        run("prune", source, "--calibration", rows, "--experts", 4, "--refit", "--out", tmp_path / out)
    after = load_file(tmp_path / "refitted" / "model.safetensors")
    assert {one.dtype for name, one in after.items() if ".experts." in name} == {torch.bfloat16}
    assert after["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    said = json.loads((tmp_path / "refitted" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    same(mcsmoe.load(tmp_path / "refitted"), mcsmoe.load(tmp_path / "expected"))


@pytest.mark.parametrize("family", sorted(tiny_models.DECODERS))
def test_leaving_out_in_the_files_is_leaving_out_in_memory(family: str, tmp_path: Path) -> None:
    changes = {"n_group": 2, "topk_group": 1} if family == "deepseek_v3" else {}
    tiny_models.model(family, **changes).save_pretrained(tmp_path / "full")
    source = Streamed(tmp_path / "full")
    kept = {}
    for number, layer in enumerate(source.layers):
        experts, sets = source.adapter.num_experts(source.model, layer), source.adapter.expert_sets(source.model, layer)
        each = experts // sets
        kept[layer] = torch.tensor([one for one in range(experts) if one % each != number % each])
    if not leave_experts(source, tmp_path / "files", kept, {}):
        pytest.skip("this family's experts are not left out in its files")
    source = Streamed(tmp_path / "full")

    def leave(layer: str) -> None:
        experts, kept_K = source.adapter.num_experts(source.model, layer), kept[layer]
        group_E = torch.zeros(experts, dtype=torch.int64).index_put_((kept_K,), torch.arange(len(kept_K)))
        dropped_E = torch.ones(experts, dtype=torch.bool).index_fill_(0, kept_K, False)
        weights = source.adapter.read_experts(source.model, layer).select(kept_K)
        source.adapter.drop_experts(source.model, layer, weights, group_E, dropped_E)

    source.rewrite(tmp_path / "memory", leave, {})
    for name in ("files", "memory"):
        assert json.loads((tmp_path / name / "config.json").read_text()) == json.loads(
            (tmp_path / "memory" / "config.json").read_text()
        )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "memory"))
    assert one.keys() == two.keys()
    assert all(same_bytes(one[name], two[name]) for name in one)
