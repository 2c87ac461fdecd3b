"""The tables of the report: rows of text from the tables of a run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mcsmoe.artefacts.names import EXPECTED_ERROR, LAYER_ERROR
from mcsmoe.report.drawing import FULL, colours, rows_of
from mcsmoe.report.words import number, p_text, scaled, signed

UNITS: tuple[tuple[str, str, float], ...] = (
    ("parameters", "parameters (M)", 1e6),
    ("bytes_on_disk", "on disk (MB)", 1e6),
    ("flops", "one pass (GFLOP)", 1e9),
    ("latency_ms", "latency (ms)", 1.0),
    ("peak_memory_bytes", "peak memory (MB)", 1e6),
)


def task_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    colour = colours(rows["variant"])
    made = []
    for row in rows_of(rows):
        made.append(
            {
                **row,
                "colour": colour[row["variant"]],
                "is_full": row["variant"] == FULL,
                "value": number(row["value"]),
                "interval": f"{number(row['ci_low'])} to {number(row['ci_high'])}",
                "n": f"{row['n']:,}",
                "difference": "–" if row["variant"] == FULL else signed(row["difference"]),
                "p": p_text(row["p_value"]),
                "costs": [scaled(float(row[name]), unit) for name, _, unit in UNITS],
            }
        )
    return made


def seed_means(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean and range over seeds, where there are several."""
    if rows["seed"].nunique() < 2:
        return []
    made = []
    for (variant, experts), part in rows.groupby(["variant", "experts"], sort=False):
        spread = f"{number(part['value'].min())} to {number(part['value'].max())}"
        mean, lost = float(part["value"].mean()), float(part["difference"].mean())
        difference = "–" if variant == FULL else signed(lost)
        made.append(
            {
                "variant": variant,
                "experts": experts,
                "seeds": len(part),
                "mean": number(mean),
                "spread": spread,
                "difference": difference,
            }
        )
    return made


def all_scores(metrics: pd.DataFrame) -> list[dict[str, Any]]:
    made = []
    for row in rows_of(
        metrics[~metrics["metric"].str.startswith((f"{LAYER_ERROR}/", f"{EXPECTED_ERROR}/"))]
    ):  # figures show them
        interval = f"{number(row['ci_low'])} to {number(row['ci_high'])}"
        made.append({**row, "value": number(row["value"]), "interval": interval, "n": f"{row['n']:,}"})
    return made


def cost_settings(cost: pd.DataFrame) -> str:
    """How the costs were measured, in words; the settings must be the same for all, else all are named."""
    names = ["batch_size", "input_tokens", "label_tokens", "threads", "device", "dtype"]
    found = []
    for row in rows_of(cost[names].drop_duplicates()):
        threads = f"{row['threads']} thread" + ("" if row["threads"] == 1 else "s")
        found.append(
            f"{row['batch_size']} examples of {row['input_tokens']} input and {row['label_tokens']} label tokens, "
            f"{row['dtype']} on {str(row['device']).replace('cpu', 'the CPU')} with {threads}"
        )
    return "; ".join(found)


def rule_times(benchmarks: pd.DataFrame) -> list[dict[str, Any]]:
    total = float(benchmarks["seconds"].sum())
    made = []
    for rule, part in benchmarks.groupby("rule"):
        seconds = float(part["seconds"].sum())
        made.append(
            {
                "rule": rule,
                "jobs": len(part),
                "order": -seconds,
                "seconds": scaled(seconds, 1.0),
                "share": f"{100 * seconds / total:.0f} %" if total else "–",
                "longest": scaled(float(part["seconds"].max()), 1.0),
                "memory": scaled(float(part["max_rss"].max()), 1.0),
            }
        )
    return sorted(made, key=lambda row: float(row["order"]))
