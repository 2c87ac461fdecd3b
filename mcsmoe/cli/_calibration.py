"""What the commands that calibrate share: batches of text, and routing statistics collected or read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from mcsmoe.calibration import text
from mcsmoe.calibration.files import load_statistics, save_tensors
from mcsmoe.checkpoint.load import load_tokenizer
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.console import progress
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import ExpertWeights, LayerId


def batches(source: Streamed, arguments: argparse.Namespace) -> list[text.Batch]:
    """Batches of the text that ``--calibration`` names."""
    rows = text.read_rows(arguments.calibration)
    tokenizer = load_tokenizer(source.folder) if text.needs_tokenizer(rows) else None
    return text.batches(
        rows,
        tokenizer,
        encoder_decoder=bool(source.model.config.is_encoder_decoder),
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        vocabulary=text.vocabulary_of(source.model),
    )


class _Experts(Mapping[LayerId, ExpertWeights]):
    """The experts of each layer, read when asked for."""

    def __init__(self, source: Streamed) -> None:
        self.source = source

    def __getitem__(self, layer: LayerId) -> ExpertWeights:
        return self.source.experts(layer)

    def __iter__(self) -> Iterator[LayerId]:
        return iter(self.source.layers)

    def __len__(self) -> int:
        return len(self.source.layers)


def statistics(source: Streamed, arguments: argparse.Namespace, saliency: bool) -> RoutingStatistics:
    """Routing statistics: from a file, or from a forward pass that reads experts as they are called.

    Raises:
        ValueError: there is neither, or the file is of another model.
    """
    if arguments.statistics is not None:
        found = load_statistics(arguments.statistics)
        found.check_layers(source.layers)
        return found
    if arguments.calibration is None:
        raise ValueError("routing statistics are needed: give --calibration FILE, or --statistics FILE saved before")
    found = RoutingStatistics(reservoir=arguments.reservoir, seed=arguments.seed)
    taken = batches(source, arguments)
    adapter = source.adapter
    experts = _Experts(source) if saliency else None
    activations = {layer: adapter.activation(source.model, layer) for layer in source.layers} if saliency else None
    with source.runnable() as model, adapter.capture(model) as captured:
        for inputs in progress(taken, "routing statistics", total=len(taken)):
            model(**inputs, use_cache=False)
            found.update(captured.batches, experts=experts, activations=activations)
    if arguments.save_statistics is not None:
        save_tensors(arguments.save_statistics, found.tensors())
    return found
