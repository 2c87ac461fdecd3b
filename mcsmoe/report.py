"""The report: one HTML file that opens anywhere, with every figure and table inside and nothing to load.

What is said in words follows from the tables by the rules in this module: a score is called worse or better only where
the paired test says so, and everything else is "within noise", which is not the same as equal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mcsmoe import plots
from mcsmoe.artefacts import atomic_file
from mcsmoe.drawing import FULL, colours, rows_of, svg

_STAGE_NAMES = {
    "pretrain": "pre-training",
    "finetune": "fine-tuning of the full model",
    "recover": "recovery after merging",
    "compress": "compression of the recovered model",
}
Labelled = tuple[Mapping[str, Any], pd.DataFrame]


@dataclass(frozen=True)
class ReportInputs:
    """Everything the report shows: the tables of ``mcsmoe.tables`` by those names, lists with their labels.

    Labels have ``task``, ``seed`` and, where they apply, ``variant``, ``experts`` and ``stage``. ``benchmarks`` has the
    columns rule, wildcards, seconds and max_rss (MB), one row per job.
    """

    summary: pd.DataFrame
    metrics: pd.DataFrame
    cost: pd.DataFrame
    training: Sequence[Labelled] = ()
    routing: Sequence[Labelled] = ()
    groups: Sequence[Labelled] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    benchmarks: pd.DataFrame | None = None
    similarity: Sequence[Labelled] = ()
    title: str = "Merged and compressed experts"


@dataclass(frozen=True)
class Picture:
    """A figure in the page: the SVG and the words under it."""

    svg: str
    caption: str


# -- words -------------------------------------------------------------------------------------------------------
def number(value: float, digits: int = 3) -> str:
    """A score with fixed digits, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def scaled(value: float, unit: float) -> str:
    """A quantity in a unit, three significant digits, never in powers of ten."""
    if value is None or math.isnan(value):
        return "–"
    shown = value / unit
    if shown == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(shown))))
    return f"{shown:,.{decimals}f}"


def signed(value: float) -> str:
    """A difference of two scores with its sign, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.3f}".replace("-", "−") if abs(value) >= 0.0005 else "0.000"


def p_text(value: float) -> str:
    """A p value as text."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def words_for_task(rows: pd.DataFrame) -> list[str]:
    """What one task's rows of table ``summary`` say, as sentences; a method with several seeds is judged over all."""
    reference, others = rows[rows["variant"] == FULL], rows[rows["variant"] != FULL]
    if reference.empty:
        return ["There is no full model to compare with: the scores stand alone."]
    first, seeds = rows_of(reference)[0], len(reference)
    size, n = float(reference["bytes_on_disk"].mean()), f"{first['n']:,}"
    low, high = number(reference["value"].min()), number(reference["value"].max())
    spread = f"[{number(first['ci_low'])}, {number(first['ci_high'])}]"
    if seeds > 1:
        spread = f"({low} to {high} over {seeds} seeds)"
    said = [
        f"The full model scores {number(reference['value'].mean())} {first['metric']} {spread} on {n} examples "
        f"and takes {scaled(size, 1e6)} MB on disk."
    ]
    methods = [_judged(part) for _, part in others.groupby(["variant", "experts"], sort=False)]
    if not methods:
        return said
    kept = sorted(
        (each for each in methods if each["verdict"] in ("Better", "Within noise")),
        key=lambda each: float(each["bytes"]),
    )
    if kept:
        small = kept[0]
        said.append(
            f"The smallest checkpoint that is not measurably worse is {small['name']}: {number(small['value'])} "
            f"({signed(small['difference'])}) at {scaled(small['bytes'], 1e6)} MB, {100 * small['bytes'] / size:.0f} % "
            "of the full size."
        )
    else:
        said.append("No variant was found to be as good as the full model.")
    for phrase in ("Better", "Within noise", "Worse", "Worse with some seeds", "Not compared"):
        found = [f"{each['name']} ({signed(each['difference'])})" for each in methods if each["verdict"] == phrase]
        if found:
            said.append(f"{phrase}: {_join(found)}.")
    half = float(((reference["ci_high"] - reference["ci_low"]) / 2).mean())
    said.append(
        f"With {n} examples the full model's own score is only known to ±\u00a0{number(half)}, "
        "so “within noise” means that no difference was shown, not that there is none."
    )
    return said


def _judged(part: pd.DataFrame) -> dict[str, Any]:
    """One method at one number of experts: means over its seeds, and a verdict that holds for all of them."""
    row, verdicts = rows_of(part)[0], list(part["verdict"])
    worse = verdicts.count("worse")
    verdict = "Within noise"
    if worse:
        verdict = "Worse" if worse == len(verdicts) else "Worse with some seeds"
    elif any(each not in ("better", "within noise") for each in verdicts):
        verdict = "Not compared"
    elif verdicts.count("better") == len(verdicts):
        verdict = "Better"
    return {
        "name": f"{row['variant']} with {row['experts']} expert{'' if row['experts'] == 1 else 's'}",
        "verdict": verdict,
        "value": float(part["value"].mean()),
        "difference": float(part["difference"].mean()),
        "bytes": float(part["bytes_on_disk"].mean()),
    }


# -- tables ------------------------------------------------------------------------------------------------------
_UNITS: tuple[tuple[str, str, float], ...] = (
    ("parameters", "parameters (M)", 1e6),
    ("bytes_on_disk", "on disk (MB)", 1e6),
    ("flops", "one pass (GFLOP)", 1e9),
    ("latency_ms", "latency (ms)", 1.0),
    ("peak_memory_bytes", "peak memory (MB)", 1e6),
)


def _task_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
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
                "costs": [scaled(float(row[name]), unit) for name, _, unit in _UNITS],
            }
        )
    return made


def _means(rows: pd.DataFrame) -> list[dict[str, Any]]:
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


def _all_scores(metrics: pd.DataFrame) -> list[dict[str, Any]]:
    made = []
    for row in rows_of(metrics):
        interval = f"{number(row['ci_low'])} to {number(row['ci_high'])}"
        made.append({**row, "value": number(row["value"]), "interval": interval, "n": f"{row['n']:,}"})
    return made


def _settings(cost: pd.DataFrame) -> str:
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


def _rules(benchmarks: pd.DataFrame) -> list[dict[str, Any]]:
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


# -- pictures ----------------------------------------------------------------------------------------------------
def _of(items: Sequence[Labelled], task: str) -> list[Labelled]:
    return [(labels, frame) for labels, frame in items if labels.get("task") == task]


def _digest(frame: pd.DataFrame) -> str:
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()


def _seed(labels: Mapping[str, Any], several: bool) -> str:
    return f", seed {labels.get('seed')}" if several else ""


def _usage_pictures(inputs: ReportInputs, task: str, several: bool) -> list[Picture]:
    made = []
    for labels, frame in _of(inputs.routing, task):
        least = 100 * float(frame["frequency"].min())
        even = 100 * frame.groupby("layer")["expert"].size().rdiv(1).min()
        made.append(
            Picture(
                svg(plots.usage(frame, f"Expert usage{_seed(labels, several)}"), f"usage-{task}-{labels.get('seed')}"),
                "Share of the calibration tokens that each expert of the full model computes. "
                f"The least used expert gets {least:.1f} % of its layer's tokens; an even share is {even:.3g} %.",
            )
        )
    return made


def _grouping_pictures(inputs: ReportInputs, task: str, several: bool) -> list[Picture]:
    """One picture per grouping; methods that share one are named together."""
    same: dict[str, list[Labelled]] = {}
    for labels, frame in _of(inputs.groups, task):
        key = f"{labels['experts']}-{labels.get('seed')}-{_digest(frame[['layer', 'expert', 'group', 'dominant']])}"
        same.setdefault(key, []).append((labels, frame))
    made = []
    for members in same.values():
        labels, frame = members[0]
        variants = list(dict.fromkeys(str(each["variant"]) for each, _ in members))
        title = f"Groups, {labels['experts']} experts on average{_seed(labels, several)}"
        name = f"groups-{task}-{labels['variant']}-{labels['experts']}-{labels.get('seed')}"
        caption = f"{_join(variants)}: experts of one number are merged; the framed one leads its group."
        made.append(Picture(svg(plots.grouping(frame, title), name), caption))
    return made


def _training_pictures(curves: Sequence[Labelled], name: str) -> list[Picture]:
    made = []
    for stage in dict.fromkeys(str(labels["stage"]) for labels, _ in curves):
        part = [(labels, frame) for labels, frame in curves if labels["stage"] == stage and len(frame)]
        if not part:
            continue
        label = _STAGE_NAMES.get(stage, stage)
        seconds = sum(float(frame["seconds"].sum()) for _, frame in part)
        longest = max(len(frame) for _, frame in part)
        caption = f"Training loss during {label}, smoothed; up to {longest:,} steps, {scaled(seconds, 1.0)} s of training in all."
        made.append(Picture(svg(plots.training(part, label.capitalize()), f"{name}-{stage}"), caption))
    return made


def _shared_curves(inputs: ReportInputs) -> tuple[list[Labelled], list[Labelled]]:
    """Curves of pre-training, each once although every task lists it, and all others."""
    shared = {_digest(frame): (labels, frame) for labels, frame in inputs.training if labels["stage"] == "pretrain"}
    return list(shared.values()), [each for each in inputs.training if each[0]["stage"] != "pretrain"]


def _task(inputs: ReportInputs, task: str, curves: Sequence[Labelled]) -> dict[str, Any]:
    rows = inputs.summary[inputs.summary["task"] == task]
    several = rows["seed"].nunique() > 1
    cost = inputs.cost[inputs.cost["task"] == task]
    final = rows[["variant", "experts", "seed", "stage"]]
    cost = final.merge(cost, on=list(final.columns), how="left")
    size_caption = f"Measured on {_settings(cost)}; the line on a latency is its interquartile range."
    trade_caption = (
        "Score against size. A number is the experts kept per merged layer on average; line and band are the "
        "full model and its interval. Marks of one size are set side by side."
    )
    return {
        "name": task,
        "words": words_for_task(rows),
        "several": several,
        "rows": _task_rows(rows),
        "means": _means(rows),
        "tests": _join(sorted({str(test) for test in rows["test"] if test and test != "none"}) or ["no test"]),
        "metric": rows["metric"].iloc[0],
        "protocol": _join(sorted(set(rows["protocol"]))),
        "scores": _all_scores(inputs.metrics[inputs.metrics["task"] == task]),
        "results": [
            Picture(svg(plots.tradeoff(rows, f"{task}: score and size"), f"tradeoff-{task}"), trade_caption),
            Picture(svg(plots.costs(cost, f"{task}: sizes and times"), f"costs-{task}"), size_caption),
        ],
        "usage": _usage_pictures(inputs, task, several),
        "groups": _grouping_pictures(inputs, task, several),
        "similarity": [
            Picture(
                svg(plots.similarity(frame, f"Similarity by {frame['base'].iloc[0]}"), f"similarity-{task}-{place}"),
                f"How alike two experts of a layer are, by {frame['base'].iloc[0]}.",
            )
            for place, (_, frame) in enumerate(_of(inputs.similarity, task))
        ],
        "training": _training_pictures(_of(curves, task), f"training-{task}"),
    }


# -- page --------------------------------------------------------------------------------------------------------
def render(inputs: ReportInputs) -> str:
    """The page as text; the same inputs give the same text.

    Raises:
        ValueError: a summary without rows.
    """
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if inputs.summary.empty:
        raise ValueError("summary has no rows; evaluate at least one checkpoint before the report is made")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # our own SVG, the only text that is not escaped
    shared, curves = _shared_curves(inputs)
    benchmarks = inputs.benchmarks
    time_picture, rules = None, []
    if benchmarks is not None and not benchmarks.empty:
        rules = _rules(benchmarks)
        caption = (
            "Snakemake's own measurements, start of the interpreter included. Jobs that ran side by side both count."
        )
        time_picture = Picture(svg(plots.time_spent(benchmarks, "Where the time goes"), "time-spent"), caption)
    return environment.get_template("report.html.j2").render(
        title=inputs.title,
        tasks=[_task(inputs, task, curves) for task in dict.fromkeys(inputs.summary["task"])],
        comparisons=int((inputs.summary["variant"] != FULL).sum()),
        pretraining=_training_pictures(shared, "training-shared"),
        cost_names=[label for _, label, _ in _UNITS],
        rules=rules,
        time_picture=time_picture,
        config=yaml.safe_dump(dict(inputs.config), sort_keys=False, allow_unicode=True, width=100),
        versions=dict(inputs.versions),
    )


def write(path: str | Path, inputs: ReportInputs) -> None:
    """Render and write the page atomically."""
    text = render(inputs)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
