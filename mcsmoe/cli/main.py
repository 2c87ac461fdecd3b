"""The command line: merge, compress, inspect and export checkpoints without the workflow.

Imports nothing heavy, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcsmoe import console, methods

_FORMS = ("exact", "dense", "stock")
_ALIGNMENTS = ("none", "weight", "weight-input", "activation", "weight-dominant", "activation-dominant")
_LATER = "mcsmoe.cli.steps"

MERGE = """Merge the experts of a Mixture-of-Experts checkpoint by its routing statistics.

Layers are read, merged and written one at a time: peak memory is that of one sparse layer and its copies. For the
statistics, what is not an expert stays in memory and experts are read from the files as they are called (--statistics
skips that pass). Nothing is trained: the workflow recovers what merging loses.
"""
COMPRESS = """Split every expert into low-rank factors and the strongest rows of what they leave, one layer at a time.

Nothing is trained: rows are kept by magnitude, or, with --calibration or --statistics, by what they add to the outputs.
The workflow prunes rows while it trains on, with distillation, and loses less. Layers that merging left alone stay so.
"""
INSPECT = "Show the layers, groups, ranks and bytes of a checkpoint, from its headers alone."
EXPORT = """Write a checkpoint in another form.

exact  the compact form again, every file checked
dense  the same function in the base architecture, for any consumer; as large as the model before merging
stock  as small as the merged model and in the base architecture, with routers of as many outputs as there are groups,
       so for any consumer including serving engines; choices and weights change, and how much is measured and printed
"""


def _command(commands: Any, name: str, purpose: str, example: str, run: str) -> argparse.ArgumentParser:
    base = console.parser(purpose, example)
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=[base],
        add_help=False,
        help=purpose.strip().splitlines()[0],
        description=purpose,
        epilog=base.epilog,
        formatter_class=base.formatter_class,
    )
    made.set_defaults(run=run)
    return made


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write; appears only once complete")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")


def _add_calibration(parser: argparse.ArgumentParser, statistics: bool = True) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text: a line each (.txt), or rows with text, or input and target, or input_ids (.jsonl, .parquet)",
    )
    if statistics:
        group.add_argument("--statistics", type=Path, metavar="FILE", help="routing statistics saved before, instead")
        group.add_argument("--save-statistics", type=Path, metavar="FILE", help="keep the statistics for other runs")
        group.add_argument("--reservoir", type=int, default=64, help="tokens kept per expert, where they are compared")
    group.add_argument("--samples", type=int, default=256, help="rows drawn from the file")
    group.add_argument("--batch-size", type=int, default=32, help="rows per forward pass")
    group.add_argument("--max-tokens", type=int, default=256, help="tokens of a row, per side")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = argparse.ArgumentParser(prog="mcsmoe", description=(__doc__ or "").splitlines()[0])
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    merge = _command(
        commands,
        "merge",
        MERGE,
        "mcsmoe merge full --calibration train.jsonl --experts 8 --out merged",
        f"{_LATER}:merge",
    )
    merge.add_argument("model", type=Path, help="stock checkpoint folder, or a model on the hub")
    merge.add_argument("--experts", type=int, required=True, help="experts to keep per layer, on average")
    _add_out(merge)
    _add_calibration(merge)
    group = merge.add_argument_group("method")
    group.add_argument("--similarity", choices=methods.SIMILARITIES, default="router-logits", help="similarity base")
    group.add_argument("--grouping", choices=methods.GROUPINGS, default="dominant", help="how groups are formed")
    group.add_argument("--budget", choices=("adaptive", "uniform"), default="adaptive", help="spread over the layers")
    group.add_argument("--alignment", choices=_ALIGNMENTS, default="weight", help="how neurons are aligned first")
    group.add_argument("--method", choices=methods.MERGES, default="frequency", help="how a group becomes one expert")
    group.add_argument("--exclude-layers", nargs="*", default=[], metavar="LAYER", help="layers that stay as they are")
    group.add_argument("--capacity", type=int, help="most experts in a group")
    group.add_argument("--linkage", default="average", help="of hierarchical grouping")

    compress = _command(
        commands,
        "compress",
        COMPRESS,
        "mcsmoe compress merged --rank 32 --keep 0.1 --out compressed",
        f"{_LATER}:compress",
    )
    compress.add_argument("model", type=Path, help="checkpoint folder, merged or not")
    compress.add_argument("--rank", type=int, default=32, help="rank of the low-rank part")
    compress.add_argument("--keep", type=float, default=0.1, help="share of the residual's rows that are kept")
    compress.add_argument(
        "--exclude-layers", nargs="*", default=[], metavar="LAYER", help="layers that stay as they are"
    )
    _add_out(compress)
    _add_calibration(compress)

    inspect = _command(commands, "inspect", INSPECT, "mcsmoe inspect compressed", "mcsmoe.cli.inspect:inspect")
    inspect.add_argument("model", type=Path, help="checkpoint folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    export = _command(
        commands,
        "export",
        EXPORT,
        "mcsmoe export merged --form stock --calibration text.txt --recover 100 --out small",
        f"{_LATER}:export_form",
    )
    export.add_argument("model", type=Path, help="checkpoint folder, merged or compressed")
    export.add_argument("--form", choices=_FORMS, required=True, help="what to write")
    _add_out(export)
    _add_calibration(export, statistics=False)
    group = export.add_argument_group("form stock")
    group.add_argument(
        "--fold",
        choices=("auto", "mean", "frequency", "dominant"),
        default="auto",
        help="how the router rows of a group become one; auto takes what changes the logits least",
    )
    group.add_argument(
        "--groups", type=Path, metavar="FILE", help="groups.parquet of the merge, if not beside the model"
    )
    group.add_argument(
        "--recover",
        type=int,
        default=0,
        metavar="STEPS",
        help="train the folded routers this long; holds both models in memory",
    )
    group.add_argument("--learning-rate", type=float, default=1e-3, help="of that training")
    return made


def _run(arguments: argparse.Namespace) -> None:
    module, _, name = arguments.run.partition(":")
    getattr(importlib.import_module(module), name)(arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``mcsmoe``; exit status 1 for an error of the user's, with one message."""
    console.run(_run, parser().parse_args(argv))
