"""Draw the report: one HTML file with the figures and tables of every run."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console

EXAMPLE = (
    "python workflow_scripts/draw_report.py --results results --runs @results/runs.json "
    "--configuration @results/config.json --summary results/summary.parquet --report results/report.html"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    console.add_runs(parser)
    parser.add_argument("--benchmarks", type=Path, help="folder of the workflow's benchmark files")
    parser.add_argument("--summary", type=Path, required=True, help="joined table of results")
    parser.add_argument("--report", type=Path, required=True, help="written: report, one HTML file")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.report import page
    from mcsmoe.results.read import Results
    from mcsmoe.results.report import report_inputs

    found = Results.read(arguments.results, arguments.runs, arguments.configuration)
    summary = read_table(arguments.summary, "summary")
    page.write(arguments.report, report_inputs(found, summary, arguments.benchmarks))


if __name__ == "__main__":
    console.run(main, parse())
