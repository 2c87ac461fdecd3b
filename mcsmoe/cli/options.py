"""Options that several commands have, and what is refused before anything heavy starts."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write; appears only once complete")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The text to calibrate on."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text: a line each (.txt), or rows with text, messages, prompt and completion, input and target, or "
        "input_ids (.jsonl, .parquet)",
    )
    group.add_argument("--samples", type=int, default=256, help="rows drawn from the file")
    group.add_argument("--batch-size", type=int, default=32, help="rows per forward pass")
    group.add_argument("--max-tokens", type=int, default=256, help="tokens of a row, per side")


def add_statistics(parser: argparse.ArgumentParser) -> None:
    """The text to calibrate on, or statistics that were collected before."""
    add_calibration(parser)
    group = parser.add_argument_group("statistics")
    group.add_argument("--statistics", type=Path, metavar="FILE", help="routing statistics saved before, instead")
    group.add_argument("--save-statistics", type=Path, metavar="FILE", help="keep the statistics for other runs")
    group.add_argument("--reservoir", type=int, default=64, help="tokens kept per expert, where they are compared")


def add_excluded(parser: argparse._ActionsContainer) -> None:
    """Layers that a command passes over."""
    parser.add_argument("--exclude-layers", nargs="*", default=[], metavar="LAYER", help="layers that stay as they are")


def prepare(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything heavy starts; set the threads of the numerical library.

    Raises:
        ValueError: the result would replace something, or a number is out of range; names the option.
    """
    out = arguments.out
    if out.exists() and not arguments.overwrite:
        raise ValueError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    if out.resolve() == Path(arguments.model).resolve():
        raise ValueError(f"{out}: is the checkpoint that is read; give another --out")
    for name in ("samples", "batch_size", "max_tokens", "reservoir"):
        if getattr(arguments, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    import torch

    torch.set_num_threads(arguments.threads)
