"""Publish every run to MLflow, once and from one process; publishing again replaces."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console

EXAMPLE = (
    "python workflow_scripts/publish.py --results results --summary results/summary.parquet "
    "--configuration @results/config.json --runs @results/runs.json --marker results/published.json"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    console.add_runs(parser)
    parser.add_argument("--summary", type=Path, required=True, help="joined table of results")
    parser.add_argument("--marker", type=Path, required=True, help="written: what was published, and where")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.artefacts.atomic import write_json
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.results.read import Results
    from mcsmoe.tracking import store as tracking
    from mcsmoe.tracking.address import store_of, without_credentials
    from mcsmoe.tracking.build import records

    found = Results.read(arguments.results, arguments.runs, arguments.configuration)
    made = records(found, read_table(arguments.summary, "summary"))
    done = tracking.publish(None, arguments.results, made)
    write_json(
        arguments.marker,
        {"store": without_credentials(store_of(arguments.results)), "runs": [vars(one) for one in done]},
    )
    counts = {action: sum(one.action == action for one in done) for action in ("created", "replaced", "unchanged")}
    console.log.info("published: %s", ", ".join(f"{count} {action}" for action, count in counts.items()))


if __name__ == "__main__":
    console.run(main, parse())
