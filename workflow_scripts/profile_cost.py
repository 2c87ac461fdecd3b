"""Measure what a checkpoint costs: parameters, bytes, memory, FLOPs and time, all in this process."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/profile_cost.py --model recovered --task SST-2 --variant msmoe --experts 4 "
    "--stage recovered --table cost.parquet"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, stock or compact")
    parser.add_argument("--task", required=True, help="task name, or path of a task file, for the table")
    parser.add_argument("--dense", action="store_true", help="the model has no experts")
    parser.add_argument("--bits", type=int, help="bits that the weights of its experts were rounded to, if they were")
    options.add_labels(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--table", type=Path, required=True, help="written: one row")
    options.add_section(parser, "cost")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.compress.bits import bits_a_weight
    from mcsmoe.data.tasks import load_task
    from mcsmoe.evaluate.cost import Settings, measure_in_this_process

    task = load_task(arguments.task).name
    settings = options.settings(arguments, "cost")
    repeats = settings.pop("repeats")
    if arguments.device == "auto":
        from mcsmoe.device import pick

        device = str(pick("auto"))
    else:
        device = arguments.device
    at = Settings(device=device, **settings)
    bits = None if arguments.bits is None else bits_a_weight(arguments.bits)
    measured = measure_in_this_process(arguments.model, at, repeats, arguments.dense, bits)

    # Not before: what the table needs is no part of the memory that is measured.
    from mcsmoe.artefacts.tables import write_rows

    write_rows(arguments.table, [{**options.labels(arguments, task), **measured}], "cost")
    console.log.info(
        "%.2f M parameters, %.2f MB on disk, %.1f ms",
        measured["parameters"] / 1e6,
        measured["bytes_on_disk"] / 1e6,
        measured["latency_ms"],
    )


if __name__ == "__main__":
    console.run(main, parse())
