"""The paper's figures beside those of a run: which rows may be compared, and what differs between the two.

A method is compared with the published one that has the same settings, whatever it is called, and a run of another model
only for orientation. Scores on generated data are not compared at all: they are of other examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mcsmoe import methods
from mcsmoe.report import published
from mcsmoe.report.drawing import rows_of
from mcsmoe.report.words import join, number, signed
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow.compared_methods import resolve

_NEEDED = (
    "model",
    "data",
    "experts",
    "merge",
    "evaluate",
    "calibration",
    "recover",
    "compress",
    "finetune",
    "per_task",
)
_SETTINGS: dict[str, dict[str, Any]] = {
    "calibration": {"samples": 256},
    "recover": {"distillation_weight": 0.2, "temperature": 2.0},
    "compress": {"rank": 32, "keep": 0.1, "steps": 10000, "initial_fraction": 0.04, "final_fraction": 0.16},
}
"""Settings that the paper prints, by section; batch sizes and learning rates stand in the tasks' own files."""

_KEYS = ["variant", "experts", "seed", "stage"]


def beside(task: str, rows: pd.DataFrame, metrics: pd.DataFrame, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the report shows of the paper for one task; None where there is nothing published or nothing known of the run.

    Args:
        rows: the task's rows of table ``summary``.
        metrics: the task's rows of table ``metrics``.
        config: the whole configuration of the run.

    Returns:
        Either a ``reason``, a sentence why nothing is compared; or, with none, ``rows``, ``differs`` (what is not as
        published, as phrases), ``orientation`` (whether the model is another one), ``paper`` (its setting), ``several``
        (whether there are several seeds), and ``units`` and ``paper_units`` (examples answered).
    """
    if any(key not in config for key in _NEEDED):
        return None
    setting = published.ZERO_SHOT if config.get("zero_shot") else published.FINE_TUNED
    scores = published.scores()
    scores = scores[(scores["setting"] == setting) & (scores["task"] == task)]
    if scores.empty:
        return None
    if config["data"]["source"] == "synthetic":
        return {
            "reason": f"The paper has figures for {task}, but the examples of this run are generated and those of the "
            "paper are not: scores on the two say nothing about each other."
        }
    same_model = model_name(config) == published.MODELS[setting]
    final = metrics.merge(rows[_KEYS].drop_duplicates(), on=_KEYS)
    kept = published.EXPERTS[setting][0]
    known, pairs = resolve(config), matches(config)
    made = []
    for (variant, experts, metric), part in final.groupby(["variant", "experts", "metric"], sort=False):
        merges = known[str(variant)].merge is not None or known[str(variant)].parent is not None
        if same_model and merges and experts != kept:
            continue
        paper = scores[(scores["method"] == pairs.get(str(variant))) & (scores["metric"] == metric)]
        made += [_row(part, row) for row in rows_of(paper)]
    if not made:
        return None
    return {
        "reason": None,
        "rows": made,
        "differs": list(differences(task, config, setting)),
        "orientation": not same_model,
        "paper": f"{published.MODELS[setting]}, {kept} of {published.EXPERTS[setting][1]} experts kept on average",
        "several": rows["seed"].nunique() > 1,
        "units": join(sorted({f"{row['n']:,}" for row in made})),
        "paper_units": f"{int(scores['n'].iloc[0]):,}",
    }


def _row(part: pd.DataFrame, paper: Mapping[str, Any]) -> dict[str, Any]:
    """One line: a metric of a method at one number of experts (mean over seeds), and the published score."""
    value, n = float(part["value"].mean()), int(part["n"].iloc[0])
    # More seeds answer the same examples: they do not make the sample larger.
    here = published.standard_error(str(paper["metric"]), value, n)
    first = rows_of(part)[0]
    return {
        "variant": first["variant"],
        "experts": first["experts"],
        "seeds": len(part),
        "metric": paper["metric"],
        "n": n,
        "here": number(value),
        "here_error": number(here),
        "paper": number(paper["value"]),
        "paper_error": number(paper["standard_error"]),
        "difference": signed(value - paper["value"]),
        "difference_error": number(math.hypot(here, paper["standard_error"])),
        "table": paper["table"],
    }


# -- which method is which ---------------------------------------------------------------------------------------
def model_name(config: Mapping[str, Any]) -> str | None:
    """The configured checkpoint under its hub name if its name, or its folder's, is that of a published model."""
    checkpoint = config["model"]["checkpoint"]
    for name in published.MODELS.values():
        if checkpoint is not None and Path(checkpoint).name == Path(name).name:
            return name
    return str(checkpoint) if checkpoint is not None else None


def matches(config: Mapping[str, Any]) -> dict[str, str]:
    """Published method by the name of the configured one that has the same settings."""
    ours = resolve(config)
    theirs = resolve({**config, "methods": published.ABLATIONS, "variants": []})
    names = [name for name in dict.fromkeys(published.scores()["method"]) if name in theirs]
    by_settings = {_settings(theirs[name], theirs): name for name in names}
    found = {name: by_settings.get(_settings(ours[name], ours)) for name in ours}
    return {name: match for name, match in found.items() if match is not None}


def _settings(method: methods.Method, known: Mapping[str, methods.Method]) -> str:
    """Everything that decides what the method does, its parent's settings in place of the parent's name."""
    fields = {key: value for key, value in methods.as_dict(method).items() if key not in ("name", "description")}
    if method.parent is not None:
        fields["parent"] = _settings(known[method.parent], known)
    if method.distillation_weight is not None:
        fields["distillation_weight"] = float(method.distillation_weight)
    return repr(sorted(fields.items()))


# -- what is not as published ------------------------------------------------------------------------------------
def differences(task: str, config: Mapping[str, Any], setting: str) -> Iterator[str]:
    """Phrases, each of one thing that is not as in the paper."""
    from mcsmoe.data.tasks import load_task

    model, name = config["model"], published.MODELS[setting]
    kept, total = published.EXPERTS[setting]
    if model["checkpoint"] is None:
        number_of = model["architecture"]["num_experts"]
        yield f"the model, a Switch Transformer of {number_of} experts a layer, was built and pre-trained here, not {name}"
    elif model_name(config) != name:
        yield f"the model is {model['checkpoint']}, not {name}"
    if list(config["experts"]) != [kept]:
        yield f"{join([str(count) for count in config['experts']])} experts are kept on average, not {kept} of {total}"
    if model_name(config) == name and tuple(config["merge"]["exclude_layers"]) != published.LEFT_OUT[setting]:
        yield "other layers are left out of merging than the first sparse one of the encoder"
    for rows, what in (("train_rows", "trained"), ("validation_rows", "scored")):
        if config["data"][rows] is not None:
            yield f"it is {what} on {config['data'][rows]:,} rows, not on all"
    if config["evaluate"]["protocol"] != "paper_compat":
        yield (
            "answers are ranked or generated and checkpoints selected on training rows, where the paper reads the "
            "likeliest token at each position of the right answer, on the split that also selected the checkpoint"
        )
    if setting == published.FINE_TUNED:
        choice = load_task(task).published
        wanted = {section: dict(values) for section, values in _SETTINGS.items()}
        chosen = [resolve(config)[variant] for variant in config["variants"]]
        if not any(method.compress for method in chosen):
            del wanted["compress"]
        wanted["finetune"] = {"batch_size": choice.batch_size, "learning_rate": choice.learning_rate}
        for section, values in wanted.items():
            settings = configuration.stage_settings(config, section, task)
            for key, value in values.items():
                if key == "steps" and not settings["steps"]:
                    yield f"{section} takes {settings['epochs']:g} epochs, not {value:g} steps"
                elif value is not None and not math.isclose(settings[key], value):
                    yield f"{section}.{key} is {settings[key]:g}, not {value:g}"
