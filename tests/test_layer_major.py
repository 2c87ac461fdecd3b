"""The layer-major pass against the model in memory: every family, padding, domains, kills, a changed layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_switch
import torch
from torch import Tensor, nn

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options
from mcsmoe.calibration.states import States
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics

FAMILIES = [*tiny_models.DECODERS, "nllb_moe", "switch"]


def built(family: str) -> nn.Module:
    return tiny_switch.model() if family == "switch" else tiny_models.model(family)


def batches(family: str) -> list[dict[str, Tensor]]:
    if family == "switch":
        return [tiny_switch.batch(), tiny_switch.batch(rows=3, length=9)]
    make = tiny_models.seq2seq_batch if family == "nllb_moe" else tiny_models.batch
    return [make(), make(rows=3, length=8)]


def in_memory(model: Any, inputs: list[dict[str, Tensor]]) -> dict[str, LayerStatistics]:
    """Batch after batch through the whole model, its experts computed as they are."""
    adapter = adapter_for(model)
    found = RoutingStatistics(reservoir=8)
    experts = {layer: adapter.read_experts(model, layer) for layer in adapter.layers(model)}
    activations = {layer: adapter.activation(model, layer) for layer in adapter.layers(model)}
    with torch.no_grad(), adapter.capture(model) as captured:
        for batch in inputs:
            model(**batch, use_cache=False)
            found.update(captured.batches, experts, activations)
    return found.layers


def streamed(folder: Path, inputs: list[dict[str, Tensor]], work: Path, memory: int = 2**30, **more: Any) -> Any:
    major = LayerMajor(
        Streamed(folder),
        [DomainBatch("all", batch) for batch in inputs],
        States(work, memory),
        Options(reservoir=8, cache_memory=memory),
    )
    found: dict[str, LayerStatistics] = {}
    with major.open():
        for block in major.blocks(**more):
            found |= {layer: domains["all"] for layer, domains in block.layers.items()}
    major.states.close()
    return found, major


def assert_equal(left: LayerStatistics, right: LayerStatistics) -> None:
    mine, other = left.tensors(), right.tensors()
    for name in other:
        if mine[name].is_floating_point():
            torch.testing.assert_close(mine[name], other[name], rtol=2e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(mine[name], other[name]), name


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
