"""The layer-major pass against the model in memory: every family, padding, domains, kills, a changed layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import every_family
import pytest
import tiny_models
import tiny_switch
import torch
from torch import Tensor, nn
from two_passes import assert_equal, in_memory, streamed

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options
from mcsmoe.calibration.observe import observing
from mcsmoe.calibration.replay import block_of
from mcsmoe.calibration.states import States
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.statistics.layer import LayerStatistics

FAMILIES = [*tiny_models.DECODERS, "nllb_moe", "switch"]


def built(family: str) -> nn.Module:
    return tiny_switch.model() if family == "switch" else tiny_models.model(family)


def batches(family: str) -> list[dict[str, Tensor]]:
    if family == "switch":
        return [tiny_switch.batch(), tiny_switch.batch(rows=3, length=9)]
    make = tiny_models.seq2seq_batch if family == "nllb_moe" else tiny_models.batch
    return [make(), make(rows=3, length=8)]


@pytest.mark.filterwarnings("ignore:transformers 5.23 lets experts")
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_in_memory(family: str, tmp_path: Path) -> None:
    model, inputs = built(family), batches(family)
    model.save_pretrained(tmp_path / "full")
    expected = in_memory(model, inputs)
    # Once with all states in memory, once with all of them in the mapped file.
    for memory in (2**30, 0):
        found, major = streamed(tmp_path / "full", inputs, tmp_path / "work", memory)
        assert list(found) == list(expected)
        for layer, one in expected.items():
            assert_equal(found[layer], one)
        assert all(parameter.is_meta for parameter in major.source.model.parameters())


def opened(folder: Path, work: Path, inputs: list[dict[str, Tensor]], **options: Any) -> LayerMajor:
    given = [DomainBatch("all", batch) for batch in inputs]
    return LayerMajor(Streamed(folder), given, States(work, 2**30), Options(reservoir=4, **options))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "switch"])
def test_a_layer_that_is_changed_changes_what_the_next_one_sees(family: str, tmp_path: Path) -> None:
    """In sequence: the statistics of each layer are those of a model whose earlier layers are changed already."""
    model, inputs = built(family), batches(family)
    model.save_pretrained(tmp_path / "full")
    adapter = adapter_for(model)
    major = opened(tmp_path / "full", tmp_path / "work", inputs)
    found: dict[str, LayerStatistics] = {}

    def halve(made: Any, layer: str) -> None:
        weights = adapter.read_experts(made, layer)
        adapter.write_experts(made, layer, weights.map(lambda _, tensor: tensor * 0.5))

    def reduce(layer: str, statistics: Any, tokens: Any) -> None:
        found[layer] = statistics["all"]
        seen = list(tokens.batches())
        assert sum(batch.inputs_TD.shape[0] for batch in seen) == int(statistics["all"].valid_tokens)
        # What the experts gave together, as the sums know it.
        total = sum(float(batch.target_TD.double().square().sum()) for batch in seen)
        assert total == pytest.approx(float(statistics["all"].outputs.layer_square_sum), rel=1e-4)
        for batch, again in zip(seen, tokens.batches(), strict=True):
            assert torch.equal(batch.inputs_TD, again.inputs_TD)
        halve(major.source.model, layer)

    with major.open():
        for _ in major.blocks(reduce):
            pass
    expected: dict[str, LayerStatistics] = {}
    for layer in adapter.layers(model):
        expected[layer] = in_memory(model, inputs)[layer]
        halve(model, layer)
    assert list(found) == list(expected)
    for layer, one in expected.items():
        for name in ("wanted_E", "computed_E"):
            assert torch.equal(getattr(found[layer], name), getattr(one, name))
        torch.testing.assert_close(found[layer].saliency_sum_E, one.saliency_sum_E, rtol=2e-4, atol=1e-6)


def test_a_tenth_of_the_rows_is_held_out(tmp_path: Path) -> None:
    model = built("mixtral")
    model.save_pretrained(tmp_path / "full")
    inputs = [tiny_models.batch(rows=6, length=8), tiny_models.batch(rows=6, length=8)]
    held: list[int] = []

    def reduce(layer: str, statistics: Any, tokens: Any) -> None:
        held.append(sum(batch.inputs_TD.shape[0] for batch in tokens.batches() if batch.held_out))

    major = opened(tmp_path / "full", tmp_path / "work", inputs)
    with major.open():
        for _ in major.blocks(reduce):
            pass
    # Row 9 of 12 is row 3 of the second batch: 3 of its 8 tokens are padding.
    assert held == [5] * len(major.source.layers)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nllb_moe", "switch"])
@pytest.mark.filterwarnings("ignore:transformers 5.23 lets experts")
def test_outputs_are_what_the_experts_give(family: str, tmp_path: Path) -> None:
    """Of stock, merged and compressed experts: combined by their weights they are what the experts module returned."""
    import fused_forms

    for form in ("stock", "merged", "compressed"):
        model = built(family)
        adapter = adapter_for(model)
        layers = adapter.layers(model)
        if form != "stock":
            fused_forms.merge(model, adapter, layers)
        if form == "compressed":
            fused_forms.compress(model, adapter, layers)
        inputs = batches(family)[0]
        returned: list[Tensor] = []
        with torch.no_grad(), adapter.capture(model) as captured:
            plain = model(**inputs, use_cache=False).logits
            for layer in layers:
                experts: Any = model.get_submodule(f"{layer}.experts")
                hook = experts.register_forward_hook(lambda *call, returned=returned: returned.append(call[-1]))
                with observing(layer, model.get_submodule(layer)) as seen:
                    torch.testing.assert_close(model(**inputs, use_cache=False).logits, plain, rtol=1e-4, atol=1e-4)
                    batch = captured.batches[layer]
                    outputs = seen.take(batch)
                hook.remove()
                kept = (batch.chosen_TK >= 0)[:, :, None]
                summed = (outputs.outputs_TKD * outputs.weights_TK[:, :, None]).where(kept, 0.0).sum(dim=1)
                torch.testing.assert_close(summed, returned.pop().reshape(summed.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("model.layers.3.mlp", "model.layers.3"),
        ("encoder.block.1.layer.1.mlp", "encoder.block.1"),  # a list inside the block is part of it
        ("model.layers.0", "model.layers.0"),  # the block holds router and experts itself
        ("model.mlp", None),
    ],
)
def test_the_block_of_a_layer_is_a_member_of_the_outermost_list(layer: str, expected: str | None) -> None:
    lists = {"model.layers", "encoder.block", "encoder.block.1.layer"}
    assert block_of(layer, lists) == expected


def test_a_weight_that_no_file_holds_is_refused_where_it_is_called(tmp_path: Path) -> None:
    """A product with a tensor without memory would give numbers all the same."""
    built("mixtral").save_pretrained(tmp_path / "full")
    major = opened(tmp_path / "full", tmp_path / "work", batches("mixtral"))
    with major.open():
        major.residency._below["model.layers.1"].remove("model.layers.1.input_layernorm.weight")
        with pytest.raises(ValueError, match=r"layers\.1.*input_layernorm.*no such tensor"):
            list(major.blocks())


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_model_that_reads_earlier_blocks_again_goes_on_where_it_stopped(blocks: int, tmp_path: Path) -> None:
    """What has to be kept of blocks that have not run yet is known after a kill too."""
    model = every_family.build("inkling2_text", "Inkling2ForCausalLM")
    whole = every_family.inputs_of(model)
    inputs = [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 2), slice(2, 3))]
    model.save_pretrained(tmp_path / "full")
    expected = in_memory(model, inputs)
    given = [DomainBatch("all", batch) for batch in inputs]
    found: dict[str, LayerStatistics] = {}
    states = States(tmp_path / "work", 2**30, durable=True)
    order: list[str] = []
    for last in (False, True):
        major = LayerMajor(Streamed(tmp_path / "full"), given, states, Options(reservoir=8), order, list(found))
        with major.open():
            for block in major.blocks():
                found |= {layer: domains["all"] for layer, domains in block.layers.items()}
                order.append(block.path)
                if not last and len(order) == blocks:
                    break
        kept = states.manifest()
        states = States(tmp_path / "work", 2**30, durable=True)
        states.restore(kept)
    assert list(found) == list(expected)
    for layer, one in expected.items():
        assert_equal(found[layer], one)
