"""Join scores, paired tests and costs of every run into one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console

EXAMPLE = (
    "python workflow_scripts/summarise.py --results results --runs @results/runs.json "
    "--configuration @results/config.json --summary results/summary.parquet"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    console.add_runs(parser)
    parser.add_argument("--summary", type=Path, required=True, help="written: joined table of results")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.results.read import Results
    from mcsmoe.results.summary import summarise

    found = Results.read(arguments.results, arguments.runs, arguments.configuration)
    summary = summarise(found.final, found.configuration["evaluate"]["bootstrap"])
    write_table(arguments.summary, summary, "summary")


if __name__ == "__main__":
    console.run(main, parse())
