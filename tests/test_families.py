"""Every Mixture-of-Experts type of the installed transformers obeys the laws of experts, or is refused with the reason."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from every_family import build, every_type, inputs_of, logits_of
from family_laws import LAWS, holds

from mcsmoe.adapters.counts import expert_paths, experts_said, set_experts
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.checkpoint.describe import describe

# One of every kind of structure: softmax, sets with a correction, biases in transposed order, a correction added to
# probabilities, matrices one below the other, scaled inputs, a router that normalises, scores of shared experts, modules of
# their own.
KINDS = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "inkling_text": "InklingForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "nllb-moe": "NllbMoeForConditionalGeneration",
}
REFUSED = {
    "doge": "stores them in a way that no adapter",
    "jetmoe": "stores them in a way that no adapter",
    "longcat_flash": "experts have no weights",
    "diffusion_gemma": "its experts are those of 'model",
    "muse_spark": "experts end in a normalisation",
    "zaya": "not one linear map",
}


@pytest.mark.parametrize("law", list(LAWS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_family_of_every_kind_of_structure_obeys_the_laws(kind: str, law: str, tmp_path: Path) -> None:
    LAWS[law](build(kind, KINDS[kind]), tmp_path)


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_is_listed_of_a_refused_family_says_that_it_is_refused(kind: str, tmp_path: Path) -> None:
    build(kind, every_type()[kind]).save_pretrained(tmp_path)
    assert re.search(REFUSED[kind], describe(tmp_path)["untreated"])


@pytest.mark.families
def test_every_family_obeys_the_laws_or_is_refused(tmp_path: Path) -> None:
    broken, whole, refused = [], [], []
    for kind, cls in every_type().items():
        gc.freeze()  # as between tests: what the families before have left is not looked through again and again
        if kind in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[kind]):
                adapter_for(build(kind, cls))
            continue
        try:
            logits_of(build(kind, cls))
        except Exception:
            continue  # its configuration cannot be made small from its fields' names
        try:
            found = holds(kind, cls, tmp_path / kind, build)
        except Exception as error:
            broken.append(f"{kind}: {type(error).__name__}: {error}")
            continue
        (whole if set(found.values()) == {"yes"} else refused).append(kind)
    assert not broken
    assert len(whole) >= 75
    # First layers that choose experts by a table of tokens; experts for pictures alone.
    assert refused == ["deepseek_v4", "ernie4_5_vl_moe"]


def test_dropping_from_a_table_of_tokens_is_refused_before_any_work() -> None:
    made = build("deepseek_v4", "DeepseekV4ForCausalLM")
    adapter = adapter_for(made)
    first = adapter.layers(made)[0]
    with pytest.raises(ValueError, match=r"by a table of tokens \(tid2eid\)"):
        adapter.check_dropping(made, first, 4)


def test_fewer_experts_than_a_token_chooses_are_refused_before_any_work() -> None:
    made = build("qwen3_moe", KINDS["qwen3_moe"])
    adapter = adapter_for(made)
    with pytest.raises(ValueError, match="left with 1 to choose 2"):
        adapter.check_dropping(made, adapter.layers(made)[0], 1)


def test_layers_with_different_numbers_of_experts_come_back_as_they_were(tmp_path: Path) -> None:
    import mcsmoe

    made = build("qwen3_moe", KINDS["qwen3_moe"])
    adapter = adapter_for(made)
    for number, layer in enumerate(adapter.layers(made)[:2]):
        dropped_E = torch.arange(8) < 3 + number
        kept = adapter.read_experts(made, layer).select((~dropped_E).nonzero()[:, 0])
        table = (torch.arange(8) - 3 - number).clamp(min=0)
        adapter.drop_experts(made, layer, kept, table, dropped_E)
    mcsmoe.save(made, tmp_path / "out")
    back = mcsmoe.load(tmp_path / "out")
    assert [adapter.num_experts(back, layer) for layer in adapter.layers(back)] == [5, 4]
    assert torch.equal(logits_of(back), logits_of(made))


def test_a_router_without_its_weights_never_counts() -> None:
    made = build("deepseek_v3", KINDS["deepseek_v3"])
    adapter = adapter_for(made)
    layer = adapter.layers(made)[0]
    with adapter.capture(made):
        logits_of(made)
        gate = made.get_submodule(layer).gate
        whole = gate.weight
        gate.weight = torch.nn.Parameter(torch.empty_like(whole, device="meta"))
        with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=r"without its weights|meta"):
            made(**inputs_of(made))
        gate.weight = whole


def test_logits_are_compared_with_the_weights_in_every_batch() -> None:
    made = build("deepseek_v3", KINDS["deepseek_v3"])
    adapter = adapter_for(made)
    router = made.get_submodule(adapter.layers(made)[0]).gate
    usual = router.forward
    with adapter.capture(made):
        logits_of(made)
        router.forward = lambda hidden: (usual(hidden)[0] + 1, *usual(hidden)[1:])
        with pytest.raises(ValueError, match="gave other logits than its weights do"):
            logits_of(made)


def test_numbers_of_experts_are_found_inside_a_configuration_and_changed_there() -> None:
    fields = {
        "num_experts": 8,
        "text_config": {"n_routed_experts": 8, "num_experts_per_tok": 8, "hidden_size": 8},
        "ffn_config": {"moe_num_experts": [8, 8]},
        "vision_config": {"num_experts": 8},
    }
    assert experts_said(fields) == [8]
    changed = set_experts(fields, 8, 4)
    assert changed["num_experts"] == changed["text_config"]["n_routed_experts"] == 4
    assert changed["ffn_config"]["moe_num_experts"] == [4, 4]
    assert changed["text_config"]["num_experts_per_tok"] == changed["vision_config"]["num_experts"] == 8
    assert expert_paths(changed, 8) == []
    assert fields["num_experts"] == 8


@pytest.mark.parametrize("kind", ["mixtral", "ernie4_5_moe", "zaya", "deepseek_v4"])
def test_the_table_of_families_says_what_holds(kind: str) -> None:
    import importlib.util

    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location("families_page", root / "docs" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    row = page.row(kind, every_type()[kind])
    assert row in (root / "docs" / "families.md").read_text().splitlines()
