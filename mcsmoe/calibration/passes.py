"""Passes over calibration data: routing statistics, and gradients of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.base import Adapter
from mcsmoe.calibration.observe import observing
from mcsmoe.calibration.streams import streams_after
from mcsmoe.console import progress
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.train import processes
from mcsmoe.train.losses import cross_entropy_sum
from mcsmoe.types import Batch, ExpertWeights, LayerId

if TYPE_CHECKING:
    pass

_INPUTS = ("input_ids", "attention_mask", "labels")


def _inputs(batch: Batch, device: torch.device) -> Batch:
    return {name: batch[name].to(device) for name in _INPUTS if name in batch}


def routing_inputs(model: Any, batch: Batch) -> Batch:
    """What routing depends on. Only an encoder-decoder model needs labels, to shift them into its decoder.

    A head that is not a language model's would compare them with something else.
    """
    shifted = bool(getattr(model.config, "is_encoder_decoder", False))
    return {name: value for name, value in batch.items() if name != "labels" or shifted}


@contextmanager
def padding_known(model: Any) -> Iterator[None]:
    """Classification heads look for the last token by the padding; which one it is changes no routing."""
    config = model.config.get_text_config()
    before = getattr(config, "pad_token_id", None)
    if before is None:
        config.pad_token_id = 0
    try:
        yield
    finally:
        config.pad_token_id = before


@torch.no_grad()
def collect_routing(
    model: nn.Module,
    adapter: Adapter,
    batches: Iterable[Batch],
    total: int,
    statistics: RoutingStatistics,
) -> RoutingStatistics:
    """Add what every sparse layer routes on ``batches``, and what its experts give, to ``statistics``; padding never counts.

    The model is in memory as a whole, and batches may be spread over processes, so they go through it one after another;
    what is taken of each layer is what the layer-major pass takes (``mcsmoe/calibration/layer_major.py``).

    Several processes (``processes.start``) take batches in turn and give the same ``batches``; the main process returns the
    statistics of all, with the counts and the sampled tokens of one process exactly, and its sums to float64 rounding.
    What the others return is their own part.
    """
    device = next(model.parameters()).device
    model.eval()
    layers = adapter.layers(model)
    rank, world = processes.rank(), processes.count()
    rounds = progress(_rounds(batches, world), "routing statistics", total=-(-total // world))
    with ExitStack() as stack:
        captured = stack.enter_context(adapter.capture(model))
        stack.enter_context(padding_known(model))
        seen = {layer: stack.enter_context(observing(layer, model.get_submodule(layer))) for layer in layers}
        streams = stack.enter_context(streams_after(model, layers))
        for batches_of_round in rounds:
            mine = batches_of_round[rank : rank + 1]
            for batch in mine:
                model(**routing_inputs(model, _inputs(batch, device)), use_cache=False)
            found = captured.batches if mine else {}
            if world > 1:
                # Tokens are numbered as in one pass: those of the processes before this one come first.
                counts_L = torch.tensor([int(found[one].valid_T.sum()) if one in found else 0 for one in layers])
                counts_PL = processes.gathered(counts_L.to(device)).cpu()
                statistics.skip(dict(zip(layers, counts_PL[:rank].sum(dim=0).tolist(), strict=True)))
            if mine:
                outputs = {layer: seen[layer].take(batch) for layer, batch in found.items()}
                statistics.update(found, outputs=outputs, stream_square=streams.squares(found))
            if world > 1:
                statistics.skip(dict(zip(layers, counts_PL[rank + 1 :].sum(dim=0).tolist(), strict=True)))
    for tensors in processes.sent_to_main(statistics.tensors()) if world > 1 else ():
        statistics = statistics.merge(RoutingStatistics.from_tensors(tensors))
    return statistics


def _rounds(batches: Iterable[Batch], world: int) -> Iterator[list[Batch]]:
    """One batch for each process; fewer in the last round."""
    stream = iter(batches)
    while some := list(itertools.islice(stream, world)):
        yield some


def collect_gradients(
    model: nn.Module, adapter: Adapter, batches: Iterable[Batch], total: int
) -> tuple[dict[LayerId, ExpertWeights], dict[LayerId, ExpertWeights]]:
    """Mean gradient of the summed label loss per example, and its mean square (diagonal empirical Fisher information).

    ``batches`` must hold one example each: a square of a mean is not a mean of squares.
    """
    device = next(model.parameters()).device
    model.eval()
    sums: dict[LayerId, ExpertWeights] = {}
    squares: dict[LayerId, ExpertWeights] = {}
    examples = 0
    for batch in progress(batches, "gradients", total=total):
        model.zero_grad(set_to_none=True)
        inputs = _inputs(batch, device)
        cross_entropy_sum(model(**inputs, use_cache=False).logits, inputs["labels"]).backward()
        examples += 1
        for layer in adapter.layers(model):
            found = _read_gradients(model, adapter, layer)
            _add(sums, layer, found, lambda tensor: tensor)
            _add(squares, layer, found, torch.square)
    model.zero_grad(set_to_none=True)
    for kept in (sums, squares):
        for layer, weights in kept.items():
            kept[layer] = weights.map(lambda _, tensor: tensor / max(1, examples))
    return sums, squares


def _read_gradients(model: nn.Module, adapter: Adapter, layer: LayerId) -> ExpertWeights:
    """Gradients of a layer's experts, stacked and oriented as their weights; zero where an expert saw no token."""
    parameters = list(model.get_submodule(layer).parameters())
    values = [parameter.data for parameter in parameters]
    # Reading weights is linear in what is stored, so the adapter reads gradients when they stand in the weights' place.
    for parameter in parameters:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    try:
        return adapter.read_experts(model, layer)
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


def _add(
    kept: dict[LayerId, ExpertWeights], layer: LayerId, found: ExpertWeights, change: Callable[[Tensor], Tensor]
) -> None:
    if layer not in kept:
        kept[layer] = found.map(lambda _, tensor: change(tensor).clone())
    else:
        for name, tensor in found.tensors.items():
            kept[layer].tensors[name] += change(tensor)
