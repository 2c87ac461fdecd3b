"""``mcsmoe export``: a checkpoint in another form."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mcsmoe.cli import options

if TYPE_CHECKING:
    from torch import Tensor

    from mcsmoe.calibration.text import Batch
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.types import LayerId

NAME = "export"
HELP = """Write a checkpoint in another form.

exact  the compact form again, every file checked
dense  the same function in the base architecture, for any consumer; as large as the model before merging
stock  as small as the merged model and in the base architecture, with routers of as many outputs as there are groups,
       so for any consumer including serving engines; choices and weights change, and how much is measured and printed
"""
EXAMPLE = "mcsmoe export merged --form stock --calibration text.txt --recover 100 --out small"
FORMS = ("exact", "dense", "stock")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder, merged or compressed")
    parser.add_argument("--form", choices=FORMS, required=True, help="what to write")
    options.add_out(parser)
    options.add_prediction(parser)
    options.add_calibration(parser)
    group = parser.add_argument_group("form stock")
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


def run(arguments: argparse.Namespace) -> None:
    """Write a checkpoint in another form, and say what changes."""
    options.prepare(arguments)
    from mcsmoe.calibration.passes import padding_known
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._outputs import copy_groups, say_engines, say_size
    from mcsmoe.console import log
    from mcsmoe.export.change import gives_logits, logits_change, require_logits, states_change
    from mcsmoe.export.forms import dense, exact, stock, uniform_groups
    from mcsmoe.export.recovery import RouterRecovery

    source = Streamed(arguments.model)
    source.keeps_prediction = arguments.mtp == "keep"
    if arguments.form == "exact":
        exact(source, arguments.out)
        copy_groups(source.folder, arguments.out)
        say_size(source.folder, arguments.out, "the same function, bit for bit; ")
        return
    if arguments.recover and arguments.calibration is None:
        raise ValueError("--recover trains routers on text; give --calibration FILE")
    if arguments.form == "stock":
        require_logits(source.model, source.folder, "the stock form is chosen and measured by them")
        frequency = _frequency(source, arguments)
        say_engines(source, [uniform_groups(source)])
    probe = _probe(source, arguments)
    if arguments.form == "dense":
        dense(source, arguments.out)
        made = Streamed(arguments.out)
        with source.runnable() as one, made.runnable() as two:
            if gives_logits(one):
                log.info("dense: %s", logits_change(one, two, probe[:4]))
            else:
                with padding_known(one), padding_known(two):
                    difference = states_change(one, two, probe[:4])
                log.info("dense: outputs of a %s change by %.3g of the largest", type(one).__name__, difference)
        say_size(source.folder, arguments.out)
        return
    recovery = RouterRecovery(arguments.recover, arguments.learning_rate, arguments.seed)
    report = stock(source, arguments.out, probe, arguments.fold, frequency, recovery)
    if not source.compact:
        log.info("no experts of %s are merged: the stock form is the same function", source.folder)
    for kind, change in report.folds.items():
        log.info("routers folded by %s%s: %s", kind, " (chosen)" if kind == report.chosen else "", change)
    if report.recovered is not None:
        log.info("after training the routers, on batches kept for it: %s", report.recovered)
    say_size(source.folder, arguments.out)


def _probe(source: Streamed, arguments: argparse.Namespace) -> list[Batch]:
    """Tokens to compare logits on: the calibration text, or seeded random ones."""
    from mcsmoe.cli._calibration import batches
    from mcsmoe.evaluate.cost import Settings, batch

    if arguments.calibration is not None:
        return batches(source, arguments)
    length = max(1, arguments.max_tokens // 4)
    return [batch(source.model, Settings(arguments.batch_size, length, length, arguments.threads, "cpu", "float32"))]


def _frequency(source: Streamed, arguments: argparse.Namespace) -> dict[LayerId, Tensor] | None:
    """By layer, the share each expert has in its group, from the table that merging left beside the model."""
    import torch

    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.cli._outputs import GROUPS

    file = arguments.groups or source.folder / GROUPS
    if arguments.groups is None and not file.is_file():
        return None
    rows = read_table(file, "groups")
    return {
        str(layer): torch.tensor(part.sort_values("expert")["weight"].tolist(), dtype=torch.float64)
        for layer, part in rows.groupby("layer", sort=False)
    }
