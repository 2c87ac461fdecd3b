"""``mcsmoe compress``: experts as low-rank factors and the strongest rows of what they leave."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe.cli import options
from mcsmoe.workflow.options import record

NAME = "compress"
HELP = """Split every expert into low-rank factors and the strongest rows of what they leave, one layer at a time.

Nothing is trained: rows are kept by magnitude, or, with --calibration or --statistics, by what they add to the outputs.
The workflow prunes rows while it trains on, with distillation, and loses less. Layers that merging left alone stay so.
"""
EXAMPLE = "mcsmoe compress merged --rank 32 --keep 0.1 --out compressed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder, merged or not")
    parser.add_argument("--rank", type=int, default=32, help="rank of the low-rank part")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the residual's rows that are kept")
    options.add_excluded(parser)
    options.add_out(parser)
    options.add_statistics(parser)


def run(arguments: argparse.Namespace) -> None:
    """Split experts into low-rank factors and the strongest rows of what they leave, without training."""
    options.prepare(arguments)
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._beside import forget_beside
    from mcsmoe.cli._calibration import statistics
    from mcsmoe.cli._outputs import copy_groups, say_size
    from mcsmoe.console import log
    from mcsmoe.transform.compress import CompressSettings, compress_layers
    from mcsmoe.transform.on_disk import CheckpointLayers, Output

    splitting = record(CompressSettings, arguments)
    source = Streamed(arguments.model)
    splitting.check(CheckpointLayers(source))
    specs = source.specs
    if any(spec.compression is not None for spec in specs.values()):
        raise ValueError(f"{source.folder}: is compressed already")
    calibrated = arguments.calibration is not None or arguments.statistics is not None
    found = statistics(source, arguments) if calibrated else None
    settings = {"rank": arguments.rank, "keep": arguments.keep, "activation_aware": calibrated}
    provenance = {"stage": "compress", "tool": "mcsmoe compress", "settings": settings, **source.origin}
    # A layer that merging left alone is left alone here too.
    compress_layers(
        CheckpointLayers(source, Output(arguments.out, provenance)), splitting, found, only=list(specs) or None
    )
    forget_beside(arguments.out)
    copy_groups(source.folder, arguments.out)
    say_size(source.folder, arguments.out)
    log.info("nothing was trained: the workflow's compress stage prunes rows while training, and loses less")
