"""What is published of each run: parameters, scores, costs, curves, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mcsmoe import methods
from mcsmoe.artefacts.tables import read_table
from mcsmoe.report import plots
from mcsmoe.results.read import Results
from mcsmoe.tracking.record import RunRecord, final_metrics
from mcsmoe.workflow.compared_methods import resolve

_KEYS = ("task", "variant", "experts", "seed")
_LEFT_OUT = ("tasks", "seeds", "experts", "variants", "methods", "results")


def records(found: Results, summary: pd.DataFrame) -> list[RunRecord]:
    """One record per method, number of experts and seed."""
    known = resolve(found.configuration)
    rows: dict[tuple[Any, ...], Any] = {tuple(row[key] for key in _KEYS): row for row in summary.to_dict("records")}
    made = []
    for run in found.final:
        key = tuple(getattr(run, name) for name in _KEYS)
        mine = [one for one in found.runs if tuple(getattr(one, name) for name in _KEYS) == key]
        metrics = pd.concat([read_table(one.table("metrics"), "metrics") for one in mine], ignore_index=True)
        cost = {str(name): value for name, value in read_table(run.table("cost"), "cost").iloc[0].items()}
        routing = read_table(Path(run.places.routing), "routing")
        tables = {"metrics": metrics, "routing": routing}
        figures: dict[str, Any] = {"usage": partial(plots.usage, routing)}
        if run.groups is not None:
            tables["groups"] = read_table(run.groups, "groups")
            figures["groups"] = partial(plots.grouping, tables["groups"])
            similarity = Path(run.places.similarity(run.variant, run.experts))
            # Pruning, and what is reduced in sequence, compares no experts of the whole model.
            if known[run.variant].merge in methods.MERGES and not known[run.variant].in_sequence:
                tables["similarity"] = read_table(similarity, "similarity")
                figures["similarity"] = partial(plots.similarity, tables["similarity"])
        made.append(
            RunRecord(
                task=run.task,
                variant=run.variant,
                experts=run.experts,
                seed=run.seed,
                parameters={"method": methods.as_dict(known[run.variant]), **_settings(found.configuration)},
                tags={"stage": run.stage, "verdict": rows[key]["verdict"]},
                metrics=final_metrics(rows[key], metrics, cost),
                curves=found.curves(run),
                tables=tables,
                figures=figures,
            )
        )
    return made


def _settings(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in configuration.items() if key not in _LEFT_OUT}
