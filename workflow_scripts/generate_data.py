"""Write the data set of a task from the generator or from installed packages, in the hub's own schema."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = "python workflow_scripts/generate_data.py --task SST-2 --train train.parquet --validation validation.parquet"


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--task", required=True, help="task name")
    parser.add_argument("--train", type=Path, required=True, help="written: training rows")
    parser.add_argument("--validation", type=Path, required=True, help="written: validation rows")
    parser.add_argument("--sources", type=json.loads, help="packages, texts and characters of sources, JSON")
    options.add_section(parser, "data", only=("seed", "train_rows", "validation_rows"))
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.data import sources
    from mcsmoe.data.tasks import load_task

    task = load_task(arguments.task)
    limits = {"train_rows": arguments.train_rows, "validation_rows": arguments.validation_rows}
    source: dict[str, object] = {"kind": "sources", **arguments.sources} if arguments.sources else {"kind": "synthetic"}
    source |= {key: value for key, value in limits.items() if value is not None}
    for split, path in (("train", arguments.train), ("validation", arguments.validation)):
        rows = sources.load_split(source, task, split, arguments.seed)
        sources.write_rows(path, rows, task)
        console.log.info("%s: %d %s rows", task.name, len(rows), split)


if __name__ == "__main__":
    console.run(main, parse())
