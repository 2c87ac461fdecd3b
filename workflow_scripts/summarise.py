"""Join scores, paired tests and costs of every run into one table, and draw the report."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console

EXAMPLE = (
    "python workflow_scripts/summarise.py --results results --runs @results/runs.json "
    "--configuration @results/config.json --summary results/summary.parquet --report results/report.html"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    console.add_runs(parser)
    parser.add_argument("--benchmarks", type=Path, help="folder of the workflow's benchmark files")
    parser.add_argument("--summary", type=Path, required=True, help="written: joined table of results")
    parser.add_argument("--report", type=Path, required=True, help="written: report, one HTML file")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.report import page as report
    from mcsmoe.results.read import Results
    from mcsmoe.results.summary import summarise

    found = Results.read(arguments.results, arguments.runs, arguments.configuration)
    summary = summarise(found.final, found.configuration["evaluate"]["bootstrap"])
    report.write(arguments.report, found.report_inputs(summary, arguments.benchmarks))
    write_table(arguments.summary, summary, "summary")


if __name__ == "__main__":
    console.run(main, parse())
