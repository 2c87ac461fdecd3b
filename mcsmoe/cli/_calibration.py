"""What the commands that calibrate share: batches of text, and routing statistics collected or read."""

from __future__ import annotations

import argparse

from mcsmoe.calibration import text
from mcsmoe.calibration.files import load_statistics, save_statistics
from mcsmoe.calibration.folder import FolderLayers
from mcsmoe.checkpoint.load import load_tokenizer
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli._beside import collect_beside
from mcsmoe.statistics.routing import RoutingStatistics


def batches(source: Streamed, arguments: argparse.Namespace) -> list[text.Batch]:
    """Batches of the text in the file ``calibration``."""
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
        pack=getattr(arguments, "pack", None),
    )


def statistics(source: Streamed, arguments: argparse.Namespace) -> RoutingStatistics:
    """Routing statistics: from a file or folder, or from a pass that holds one block of the model at a time.

    Raises:
        ValueError: there is neither, or the file is of another model.
    """
    if arguments.statistics is not None:
        with source.naming_the_quantiser():
            found = load_statistics(arguments.statistics, source.lineage)
        try:
            found.check_layers(source.layers)
            _check_experts(found, source)
        except ValueError as error:
            raise ValueError(f"{arguments.statistics}: {error}") from error
        return found
    if arguments.calibration is None:
        raise ValueError(
            "routing statistics are needed: give --calibration FILE, or --statistics PATH collected before"
        )
    found = collect_beside(source, arguments)
    if arguments.save_statistics is not None:
        save_statistics(arguments.save_statistics, found, source.tensors.fingerprint)
    return found


def _check_experts(found: RoutingStatistics, source: Streamed) -> None:
    """Raise ValueError, naming a layer, unless its router chooses among as many experts as the statistics are of."""
    for layer in source.layers:
        layers, experts = found.layers, source.adapter.num_experts(source.model, layer)
        # A folder's layers are large, and each is read when its turn comes.
        have = layers.num_experts(layer) if isinstance(layers, FolderLayers) else layers[layer].num_experts
        if have not in (experts, None):
            raise ValueError(
                f"layer {layer!r}: the statistics are of {have} experts, the layer has {experts}: they were taken before "
                "experts were dropped, or on another model; collect them on this one"
            )
