"""The same statistics twice: of a model in memory, and of its checkpoint, a block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options
from mcsmoe.calibration.states import States
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics


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
