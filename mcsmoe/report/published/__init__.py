"""The figures of the paper (MC-SMoE, arXiv 2310.01334v2) and of its successors, as data to set beside results measured here.

What each file holds and how far its numbers can be trusted: ``README.md`` beside this module.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent
FINE_TUNED, ZERO_SHOT = "fine-tuned", "zero-shot"

MODELS = {FINE_TUNED: "google/switch-base-32", ZERO_SHOT: "fairseq-moe-15b"}
"""The model of each setting."""

EXPERTS = {FINE_TUNED: (8, 32), ZERO_SHOT: (16, 512)}
"""Experts kept per merged layer on average, and experts of a layer."""

LEFT_OUT = {FINE_TUNED: ("encoder.block.1.layer.1.mlp",), ZERO_SHOT: ()}
"""Sparse layers that keep all their experts."""

PROPORTIONS = ("accuracy", "exact_match")
"""Metrics that are a share of examples, so that they have a binomial standard error."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "budget-uniform": {"base": "msmoe", "budget": "uniform"},
    "similarity-random": {"base": "msmoe", "similarity": "random"},
    "similarity-weight": {"base": "msmoe", "similarity": "weight"},
    "similarity-weight-feature": {"base": "msmoe", "similarity": "weight-feature"},
    "similarity-gradient": {"base": "msmoe", "similarity": "gradient"},
    "similarity-feature": {"base": "msmoe", "similarity": "feature"},
    "similarity-feature.abs": {"base": "msmoe", "similarity": "feature.abs"},
    "similarity-router-weight": {"base": "msmoe", "similarity": "router-weight"},
    "no-distillation": {"base": "msmoe", "distillation_weight": 0},
    "no-alignment": {"base": "msmoe", "alignment": "none"},
    "weights-uniform": {"base": "msmoe", "merge": "uniform"},
}
"""Methods of tables 3 to 8 that are not built in, as ``methods`` of a configuration."""


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(FOLDER / name, dtype={"table": str})


@cache
def scores() -> pd.DataFrame:
    """Published scores, one row per setting, method, task and metric.

    Returns:
        columns setting (``fine-tuned`` or ``zero-shot``), table (the first that prints the score), method, task and
        metric (names of this project), value (0 to 1), n (examples of the validation split) and standard_error
        (binomial; NaN for metrics that are no proportion).
    """
    made = _read("scores.csv").drop_duplicates(["setting", "method", "task", "metric"])
    made = made.merge(_read("examples.csv").rename(columns={"examples": "n"}), on="task", how="left")
    made["value"] = made.pop("percent") / 100
    made["standard_error"] = [
        standard_error(metric, value, n) for metric, value, n in made[["metric", "value", "n"]].itertuples(index=False)
    ]
    return made


def sizes() -> pd.DataFrame:
    """Published sizes: setting, table, method, parameters_m (millions), tflops (of the sparse layers, one batch)."""
    return _read("sizes.csv")


def latency() -> pd.DataFrame:
    """Published latencies of table A10: method, batch_size, tflops, seconds (BF16, SQuAD inference)."""
    return _read("latency.csv")


@cache
def successors() -> pd.DataFrame:
    """Figures of later papers on language models from the hub.

    Returns:
        columns model (hub name), source, removed_percent (share of the experts), calibration, method (names of this project;
        ``ean`` prunes by activation norm), benchmark (names of lm-evaluation-harness where it has them; ``mean_of_eight`` of the
        eight multiple-choice tasks), value (0 to 1) and standard_deviation (over the paper's runs; NaN where none is printed).
    """
    return _read("successors.csv")


def standard_error(metric: str, value: float, n: int) -> float:
    """Binomial standard error of a score between 0 and 1 over ``n`` examples; NaN where the metric is no proportion."""
    return math.sqrt(value * (1 - value) / n) if metric in PROPORTIONS and n > 0 else math.nan
