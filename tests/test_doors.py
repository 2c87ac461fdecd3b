"""Every door of transformers to a compact checkpoint gives the same model, or says which one does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_checkpoint_faithful import merge
from tiny_models import batch, logits, model
from torch import nn

import mcsmoe
from mcsmoe.checkpoint.format import is_compact
from mcsmoe.checkpoint.streaming import Streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("doors")
    model("qwen3_moe").save_pretrained(place / "model")
    merge(Streamed(place / "model"), place / "merged", groups=3)
    return place / "merged"


@pytest.fixture(scope="module")
def truth(folder: Path) -> torch.Tensor:
    return logits(mcsmoe.load(folder), batch())


def test_the_concrete_class_gives_the_merged_experts(folder: Path, truth: torch.Tensor) -> None:
    from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

    assert torch.equal(logits(Qwen3MoeForCausalLM.from_pretrained(folder), batch()), truth)
    assert torch.equal(logits(Qwen3MoeForCausalLM.from_pretrained(str(folder), dtype="auto"), batch()), truth)
    with pytest.raises(ValueError, match="holds a Qwen3MoeForCausalLM, not a MixtralForCausalLM"):
        MixtralForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu"), {"": torch.device("cpu")}])
def test_one_device_however_it_is_written(device_map: object, folder: Path, truth: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), batch()), truth)


def test_several_devices_and_unknown_options_are_refused(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"one device.*lm_head"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "cpu"})
    with pytest.raises(ValueError, match="takes no ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_the_way_of_attention_is_passed_on(how: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

    for door in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
        assert door.from_pretrained(folder, attn_implementation=how).config._attn_implementation == how


def test_what_was_loaded_can_be_asked_for(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())


def test_a_configuration_alone_is_refused(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with pytest.raises(ValueError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("twice", [False, True])
def test_save_pretrained_of_a_loaded_model_keeps_the_experts(
    twice: bool, folder: Path, truth: torch.Tensor, tmp_path: Path
) -> None:
    loaded: nn.Module = mcsmoe.load(folder)
    made = copy.deepcopy(loaded) if twice else loaded
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    made.save_pretrained(tmp_path / "out", state_dict=made.state_dict(), max_shard_size=20_000)
    made.save_pretrained(tmp_path / "out")
    assert is_compact(tmp_path / "out")
    assert torch.equal(logits(mcsmoe.load(tmp_path / "out"), batch()), truth)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors*")} == {"model.safetensors"}
    changed = copy.deepcopy(made)
    with torch.no_grad():
        changed.lm_head.weight.zero_()
    changed.save_pretrained(tmp_path / "changed")
    assert not logits(mcsmoe.load(tmp_path / "changed"), batch()).any()
    assert torch.equal(logits(made, batch()), truth)


def test_a_trainer_saves_it(folder: Path, truth: torch.Tensor, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    made = mcsmoe.load(folder)
    settings = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    Trainer(model=made, args=settings).save_model(str(tmp_path / "out"))
    assert torch.equal(logits(mcsmoe.load(tmp_path / "out"), batch()), truth)
