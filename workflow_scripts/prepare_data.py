"""Turn the raw rows of a task into prompts, targets and choices, and set a selection slice aside."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/prepare_data.py --task SST-2 --train-file sst2/train.parquet "
    "--validation-file sst2/validation.parquet --train train.parquet --selection selection.parquet "
    "--validation validation.parquet"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--task", required=True, help="task name, or path of a task file")
    parser.add_argument("--train-file", type=Path, help="raw training rows: parquet, jsonl or csv")
    parser.add_argument("--validation-file", type=Path, help="raw validation rows")
    parser.add_argument("--hub", action="store_true", help="read the task's data set from the hub instead")
    parser.add_argument("--seed", type=int, default=0, help="which rows are set aside")
    parser.add_argument("--train", type=Path, required=True, help="written: training examples")
    parser.add_argument("--selection", type=Path, required=True, help="written: selection slice of the training set")
    parser.add_argument("--validation", type=Path, required=True, help="written: validation examples")
    options.add_section(parser, "data", only=("train_rows", "validation_rows", "selection_rows"))
    options.add_section(parser, "evaluate", only=("protocol",))
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.data import sources
    from mcsmoe.data.tasks import load_task

    task = load_task(arguments.task)
    limits = {"train_rows": arguments.train_rows, "validation_rows": arguments.validation_rows}
    source: dict[str, object] = {key: value for key, value in limits.items() if value is not None}
    if arguments.hub:
        source |= {"kind": "hub"}
    else:
        files = {"train": str(arguments.train_file), "validation": str(arguments.validation_file)}
        source |= {"kind": "files", "files": files}
    compat = arguments.protocol == "paper_compat"
    train, validation = (
        task.examples(sources.load_split(source, task, split, arguments.seed), split, file, compat=compat)
        for split, file in (("train", arguments.train_file), ("validation", arguments.validation_file))
    )
    if compat:
        console.log.warning("paper_compat: checkpoints are selected on the split that is reported, as the paper did")
        selection = validation
    else:
        together = not task.is_language
        train, selection = sources.split_selection(train, arguments.selection_rows, arguments.seed, together=together)
    written = ((arguments.train, train), (arguments.selection, selection), (arguments.validation, validation))
    for path, examples in written:
        write_table(path, examples, "examples")
    console.log.info(
        "%s: %d training, %d selection, %d validation examples", task.name, len(train), len(selection), len(validation)
    )


if __name__ == "__main__":
    console.run(main, parse())
