"""Routing statistics of real models: capacity, padding, saliency, and the recorded numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_switch
import torch

from mcsmoe.adapters.switch import SwitchAdapter
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import RoutedBatch


def rows(batch: RoutedBatch, index: Any) -> RoutedBatch:
    return RoutedBatch(**{name: tensor[index] for name, tensor in vars(batch).items() if tensor is not None})


# -- real models -------------------------------------------------------------------------------------------------
def test_capacity_and_padding_of_a_switch_model() -> None:
    adapter = SwitchAdapter()
    statistics = {}
    inputs = tiny_switch.batch(rows=6, length=14)
    for capacity in (64, 2):
        model = tiny_switch.model(expert_capacity=capacity)
        statistics[capacity] = RoutingStatistics()
        with torch.no_grad(), adapter.capture(model) as captured:
            model(**inputs)
            statistics[capacity].update(captured.batches)
    real = {"encoder": int(inputs["attention_mask"].sum()), "decoder": int((inputs["labels"] != -100).sum())}
    for capacity, found in statistics.items():
        for layer, one in found.layers.items():
            assert int(one.wanted_E.sum()) == int(one.valid_tokens) == real[layer.split(".")[0]]
            assert torch.equal(one.computed_E + one.dropped_E, one.wanted_E)
            assert (int(one.dropped_E.sum()) > 0) == (capacity == 2)
    first = next(iter(statistics[64].layers))
    # The first sparse layer sees the same inputs whatever the capacity; capped, no expert gains a token.
    assert torch.equal(statistics[64].layers[first].wanted_E, statistics[2].layers[first].wanted_E)
    assert (statistics[2].layers[first].computed_E <= statistics[64].layers[first].computed_E).all()


def test_saliency_is_the_mean_gated_norm_of_outputs() -> None:
    adapter, model, inputs = SwitchAdapter(), tiny_switch.model(expert_capacity=2), tiny_switch.batch()
    layers = adapter.layers(model)
    experts = {layer: adapter.read_experts(model, layer) for layer in layers}
    activations = {layer: adapter.activation(model, layer) for layer in layers}
    statistics, plain, dropped = RoutingStatistics(), RoutingStatistics(), 0
    with torch.no_grad(), adapter.capture(model) as captured:
        model(**inputs)
        statistics.update(captured.batches, experts, activations)
        plain.update(captured.batches)
        for layer in layers:
            batch = captured.batches[layer].only_valid()
            modules = model.get_submodule(layer).experts
            expected = torch.zeros(6, dtype=torch.float64)
            for expert in range(6):
                own = batch.chosen_TK[:, 0] == expert
                if own.any():
                    output_ND = modules[f"expert_{expert}"](batch.inputs_TD[own])
                    expected[expert] = (batch.weights_TK[own, 0] * output_ND.norm(dim=1)).double().mean()
            torch.testing.assert_close(statistics.layers[layer].saliency_E, expected, rtol=1e-5, atol=1e-8)
            dropped += int((batch.chosen_TK < 0).sum())
    assert dropped > 0
    with pytest.raises(ValueError, match="saliency"):
        _ = plain.layers[layers[0]].saliency_E


@pytest.mark.golden
@pytest.mark.parametrize("name", ["full", "pad"])
def test_usage_agrees_with_the_published_implementation(shared: Path, name: str) -> None:
    """Published usage counts padding and forgets the last partial mini-batch; ours rebuilds both, and has neither."""
    from safetensors.torch import load_file
    from transformers import SwitchTransformersForConditionalGeneration

    adapter = SwitchAdapter()
    model = SwitchTransformersForConditionalGeneration.from_pretrained(shared / "golden" / "model").eval()
    every = load_file(shared / "golden" / "batches.safetensors")
    inputs = {key: every[f"{name}.{key}"] for key in ("input_ids", "attention_mask", "labels")}
    usage = load_file(shared / "golden" / "usage.safetensors")
    with torch.no_grad(), adapter.capture(model) as captured:
        model(**inputs)
        batches = dict(captured.batches)
    for kept_rows, key in ((64, name), (48, f"{name}.mb24"), (64, f"{name}.mb32")):
        statistics = RoutingStatistics()
        parts = {}
        for layer, batch in batches.items():
            kept = rows(batch, slice(0, kept_rows * len(batch.valid_T) // 64))
            parts[layer] = RoutedBatch(**{**vars(kept), "valid_T": torch.ones_like(kept.valid_T)})
        statistics.update(parts)
        for layer, found in statistics.layers.items():
            torch.testing.assert_close(found.frequency_E.float(), usage[f"{key}.{layer}"], rtol=0, atol=1e-6)
    ours = RoutingStatistics()
    ours.update(batches)
    differ = max(float((one.frequency_E - usage[f"{name}.{layer}"]).abs().max()) for layer, one in ours.layers.items())
    assert differ < 1e-6 if name == "full" else differ > 0.01
