"""What of the vLLM plugin needs no vLLM: the configuration of a merged checkpoint, and what is not served."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_faithful import config_of, merge
from tiny_models import model

from mcsmoe.checkpoint.streaming import Streamed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins" / "vllm"))
from mcsmoe_vllm import ARCHITECTURES, PREFIX
from mcsmoe_vllm.config import CompactConfig, Layer, layers_of, number_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plugin")
    model("qwen3_moe").save_pretrained(place / "model")
    merge(Streamed(place / "model"), place / "merged", groups=3)
    return place / "merged"


@pytest.fixture
def config(folder: Path) -> dict[str, Any]:
    return copy.deepcopy(config_of(folder))


def test_layers_are_those_of_the_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    specs = Streamed(folder).specs
    assert layers_of(config["mcsmoe"]) == {
        number_of(name): Layer(name, spec.num_groups, tuple(spec.expert_to_group)) for name, spec in specs.items()
    }


def test_the_configuration_is_the_base_models_with_an_architecture_of_the_plugin(config: dict[str, Any]) -> None:
    made = CompactConfig.from_dict(config)
    assert made.model_type == "qwen3_moe"
    assert made.architectures == [f"{PREFIX}Qwen3MoeForCausalLM"]
    assert made.num_experts == 6
    assert made.mcsmoe == config["mcsmoe"]
    assert "Qwen3MoeForCausalLM" in ARCHITECTURES
    assert "mcsmoe" in config, "what was given stays as it is"


def test_what_is_not_served_is_refused_with_the_remedy(config: dict[str, Any]) -> None:
    layer = next(iter(config["mcsmoe"]["layers"]))
    for key, value, said in (
        ("compression", {"rank": 2, "kept_rows": {}}, "is compressed"),
        ("novices", {"count": 2, "rank": 0}, "extended by novices"),
    ):
        changed = copy.deepcopy(config)
        changed["mcsmoe"]["layers"][layer][key] = value
        with pytest.raises(ValueError, match=f"{layer} {said}|{layer} is {said}.*--form dense"):
            CompactConfig.from_dict(changed)
    with pytest.raises(ValueError, match="format_version is 9"):
        CompactConfig.from_dict(config | {"mcsmoe": config["mcsmoe"] | {"format_version": 9}})
    with pytest.raises(ValueError, match=r"GptOssForCausalLM.*is not served.*--form dense"):
        CompactConfig.from_dict(config | {"architectures": ["GptOssForCausalLM"]})
    with pytest.raises(ValueError, match="lies in no numbered layer"):
        number_of("model.embed_tokens")
