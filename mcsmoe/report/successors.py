"""Figures of later papers beside those of a run on the same model: which may be set side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mcsmoe.report import published
from mcsmoe.report.drawing import rows_of
from mcsmoe.report.words import number, signed

BENCHMARKS = {"OpenBookQA": "openbookqa", "WinoGrande": "winogrande"}
"""Task of the workflow by the benchmark of the harness that has the same examples."""

_KEYS = ["variant", "experts", "seed", "stage"]


def beside(
    task: str, rows: pd.DataFrame, metrics: pd.DataFrame, config: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """One line for each variant and number of experts that a paper has too; None where there is none.

    Args:
        rows: the task's rows of table ``summary``.
        metrics: the task's rows of table ``metrics``.
        config: the whole configuration of the run.
    """
    checkpoint = (config.get("model") or {}).get("checkpoint")
    if checkpoint is None or task not in BENCHMARKS or (config.get("data") or {}).get("source") == "synthetic":
        return None
    known = published.successors()
    model = known["model"].map(lambda name: Path(name).name) == Path(str(checkpoint)).name
    known = known[model & (known["benchmark"] == BENCHMARKS[task])]
    if known.empty:
        return None
    final = metrics.merge(rows[_KEYS].drop_duplicates(), on=_KEYS)
    final = final[final["metric"] == "accuracy"]
    whole = max(rows[rows["variant"] == "full"]["experts"].tolist(), default=0)
    made = []
    for (variant, _), part in final.groupby(["variant", "experts"], sort=False):
        experts = int(part["experts"].iloc[0])
        removed = 0 if not whole or variant == "full" else round(100 * (1 - experts / whole))
        theirs = known[(known["method"] == variant) & (known["removed_percent"] == removed)]
        value = float(part["value"].mean())
        for row in rows_of(theirs):
            made.append(
                {
                    "variant": variant,
                    "experts": experts,
                    "here": number(value),
                    "paper": number(row["value"]),
                    "deviation": number(row["standard_deviation"]),
                    "difference": signed(value - row["value"]),
                    "calibration": row["calibration"],
                    "source": row["source"],
                }
            )
    return made or None
