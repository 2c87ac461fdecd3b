"""The report: one HTML file that opens anywhere, with every figure and table inside and nothing to load.

What is said in words follows from the tables by fixed rules (``report_words``): a score is called worse or better only
where the paired test says so, and everything else is "within noise", which is not the same as equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mcsmoe.artefacts.atomic import atomic_file
from mcsmoe.artefacts.layout import TITLES
from mcsmoe.report import language, paper, plots, successors
from mcsmoe.report.drawing import FULL, svg
from mcsmoe.report.tables import UNITS, all_scores, cost_settings, rule_times, seed_means, task_rows
from mcsmoe.report.words import join, scaled, words_for_task

Labelled = tuple[Mapping[str, Any], pd.DataFrame]


@dataclass(frozen=True)
class ReportInputs:
    """Everything the report shows: the tables of ``mcsmoe.artefacts.tables`` by those names, lists with their labels.

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
        caption = f"{join(variants)}: experts of one number are merged; the framed one leads its group."
        made.append(Picture(svg(plots.grouping(frame, title), name), caption))
    return made


def _language_pictures(task: str, rows: pd.DataFrame, metrics: pd.DataFrame) -> list[Picture]:
    """What was lost against what is stored, of all documents and of each domain."""
    made = []
    for domain, table in language.lost(rows, metrics):
        where = {"": "all domains", "worst": "the domain that lost most"}.get(domain, domain)
        caption = (
            f"Nats a token lost to the full model on {where}, beside the bytes of the weights at 16 bits each, rounded ones at "
            "their own. The dashed line is the full model with fewer bits a weight: what lies above it is worth less than that."
        )
        figure = language.against_bytes(table, f"{task}: loss and size, {where}")
        made.append(Picture(svg(figure, f"lost-{task}-{domain or 'all'}"), caption))
    for experts, table in language.by_layer(rows, metrics):
        caption = (
            "Squared change of each layer's output on the full model's own inputs there, over the energy of the residual "
            "stream behind it, on the validation texts; no error of an earlier layer is in it."
        )
        figure = language.layer_errors(table, f"{task}: error by layer, {experts} experts on average")
        made.append(Picture(svg(figure, f"layers-{task}-{experts}"), caption))
    foretold = language.expected(rows, metrics)
    if len(foretold):
        ratio = (foretold["measured"] / foretold["expected"].clip(lower=1e-9)).median()
        caption = (
            "Each point is a layer of a method that says beforehand what a layer will lose: by its sums over calibration tokens "
            f"with every gate as it was, or by the tokens held out of a refit. Measured over expected, median: {ratio:.2f}. "
            "Above the line a layer loses more than was expected: its router shares weight out anew, or the texts are others."
        )
        figure = language.expected_errors(foretold, f"{task}: error by layer, expected and measured")
        made.append(Picture(svg(figure, f"expected-{task}"), caption))
    return made


def _kept_pictures(inputs: ReportInputs, task: str, several: bool) -> list[Picture]:
    made = []
    for experts, seed, groups in language.same_number(_of(inputs.groups, task)):
        title = f"Experts kept, {experts} on average{_seed({'seed': seed}, several)}"
        caption = "A row a method, a column an expert of the full model; dark ones stay, or lead the group they are merged in."
        made.append(Picture(svg(language.kept(groups, title), f"kept-{task}-{experts}-{seed}"), caption))
    return made


def _training_pictures(curves: Sequence[Labelled], name: str) -> list[Picture]:
    made = []
    for stage in dict.fromkeys(str(labels["stage"]) for labels, _ in curves):
        part = [(labels, frame) for labels, frame in curves if labels["stage"] == stage and len(frame)]
        if not part:
            continue
        label = TITLES.get(stage, stage)
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
    metrics = inputs.metrics[inputs.metrics["task"] == task]
    final = rows[["variant", "experts", "seed", "stage"]]
    cost = final.merge(cost, on=list(final.columns), how="left")
    size_caption = f"Measured on {cost_settings(cost)}; the line on a latency is its interquartile range."
    trade_caption = (
        "Score against size. A number is the experts kept per merged layer on average; line and band are the "
        "full model and its interval. Marks of one size are set side by side."
    )
    texts = language.is_language(rows)
    tradeoff = (
        _language_pictures(task, rows, metrics)
        if texts
        else [Picture(svg(plots.tradeoff(rows, f"{task}: score and size"), f"tradeoff-{task}"), trade_caption)]
    )
    return {
        "name": task,
        "domains": language.domain_table(rows, metrics) if texts else [],
        "words": words_for_task(rows),
        "several": several,
        "rows": task_rows(rows),
        "means": seed_means(rows),
        "tests": join(sorted({str(test) for test in rows["test"] if test and test != "none"}) or ["no test"]),
        "metric": rows["metric"].iloc[0],
        "protocol": join(sorted(set(rows["protocol"]))),
        "scores": all_scores(metrics),
        "results": [
            *tradeoff,
            Picture(svg(plots.costs(cost, f"{task}: sizes and times"), f"costs-{task}"), size_caption),
        ],
        "usage": _usage_pictures(inputs, task, several),
        "groups": (_kept_pictures if texts else _grouping_pictures)(inputs, task, several),
        "similarity": [
            Picture(
                svg(plots.similarity(frame, f"Similarity by {frame['base'].iloc[0]}"), f"similarity-{task}-{place}"),
                f"How alike two experts of a layer are, by {frame['base'].iloc[0]}.",
            )
            for place, (_, frame) in enumerate(_of(inputs.similarity, task))
        ],
        "training": _training_pictures(_of(curves, task), f"training-{task}"),
        "paper": paper.beside(task, rows, metrics, inputs.config),
        "successors": successors.beside(task, rows, metrics, inputs.config),
    }


def with_experts(inputs: ReportInputs) -> ReportInputs:
    """``inputs`` with the experts of a model that came from the hub, which the workflow lists as 0: it cannot ask there."""
    unknown = inputs.cost[inputs.cost["experts"] == 0]
    counts = {
        (task, variant): max(map(int, layers))
        for task, variant, layers in unknown[["task", "variant", "experts_per_layer"]].itertuples(index=False)
        if len(layers)
    }

    def told(table: pd.DataFrame) -> pd.DataFrame:
        pairs = zip(table["task"], table["variant"], table["experts"], strict=True)
        return table.assign(experts=[experts or counts.get((task, name), 0) for task, name, experts in pairs])

    def labelled(labels: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            **labels,
            "experts": labels.get("experts") or counts.get((labels.get("task"), labels.get("variant")), 0),
        }

    return replace(
        inputs,
        summary=told(inputs.summary),
        metrics=told(inputs.metrics),
        cost=told(inputs.cost),
        training=[(labelled(labels), frame) for labels, frame in inputs.training],
    )


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
    inputs = with_experts(inputs)
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
        rules = rule_times(benchmarks)
        caption = (
            "Snakemake's own measurements, start of the interpreter included. Jobs that ran side by side both count."
        )
        time_picture = Picture(svg(plots.time_spent(benchmarks, "Where the time goes"), "time-spent"), caption)
    return environment.get_template("report.html.j2").render(
        title=inputs.title,
        tasks=[_task(inputs, task, curves) for task in dict.fromkeys(inputs.summary["task"])],
        comparisons=int((inputs.summary["variant"] != FULL).sum()),
        pretraining=_training_pictures(shared, "training-shared"),
        cost_names=[label for _, label, _ in UNITS],
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
