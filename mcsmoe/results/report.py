"""What the report shows, read from the results folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mcsmoe.artefacts.tables import read_table
from mcsmoe.report.page import ReportInputs
from mcsmoe.results.read import Results


def report_inputs(found: Results, summary: pd.DataFrame, benchmarks: Path | None) -> ReportInputs:
    """Everything that the report shows.

    Args:
        summary: table ``summary`` of what was found.
        benchmarks: folder of the workflow's benchmark files.
    """
    training = []
    for run in found.final:
        for stage, curve in found.curves(run).items():
            training.append(({**run.labels, "stage": stage}, curve))
    places = {(run.task, run.seed): run for run in found.final}
    return ReportInputs(
        summary=summary,
        metrics=pd.concat([read_table(run.table("metrics"), "metrics") for run in found.runs], ignore_index=True),
        cost=pd.concat([read_table(run.table("cost"), "cost") for run in found.runs], ignore_index=True),
        training=training,
        routing=[
            ({"task": task, "seed": seed}, read_table(Path(run.places.routing), "routing"))
            for (task, seed), run in places.items()
        ],
        groups=[(run.labels, read_table(run.groups, "groups")) for run in found.final if run.groups is not None],
        config=found.configuration,
        versions=found.versions(),
        benchmarks=None if benchmarks is None else read_benchmarks(benchmarks),
    )


def read_benchmarks(folder: Path) -> pd.DataFrame:
    """What each job used, in the form of Snakemake's benchmark files: rule, job, wall and processor seconds, and peak resident memory in MB."""
    rows = []
    for file in sorted(folder.rglob("*.tsv")):
        table = pd.read_csv(file, sep="\t", na_values=["-", "NA"])
        place = file.relative_to(folder)
        rows.append(
            {
                "rule": place.parts[0],
                "wildcards": "/".join(place.with_suffix("").parts[1:]),
                "seconds": float(table["s"].iloc[-1]),
                "cpu_seconds": float(table["cpu_time"].iloc[-1]),
                "max_rss": float(table["max_rss"].iloc[-1]),
            }
        )
    return pd.DataFrame(rows, columns=["rule", "wildcards", "seconds", "cpu_seconds", "max_rss"])
