"""``mcsmoe collect``: all statistics of a checkpoint in one pass, for every method afterwards."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe.cli import options

NAME = "collect"
HELP = """Collect the statistics of a checkpoint on calibration text, once for every method.

All rows go through one block of the model, then through the next: the weights of each are read once, and memory holds one
block and the next, whatever the size of the model. Every domain is kept apart, so that a merge can weigh them anew. A run
that is killed goes on after its last block when the same command is given again, and ends with the same bits.
"""
EXAMPLE = "mcsmoe collect full --calibration code=code.jsonl:0.5 --calibration prose=prose.parquet:0.5 --out statistics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder, or a model on the hub")
    options.add_out(parser)
    options.add_domain_files(parser.add_argument_group("calibration"), required=True)
    options.add_pass(parser)


def run(arguments: argparse.Namespace) -> None:
    """Collect the statistics of a checkpoint into a folder."""
    options.prepare(arguments)
    from mcsmoe.calibration.collect import collect
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._domains import domains

    passing = options.pass_options(arguments)
    source = Streamed(arguments.model)
    collect(source, domains(source, arguments), arguments.out, passing, overwrite=arguments.overwrite)
