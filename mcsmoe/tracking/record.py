"""What is published of a run, and its content as MLflow takes it: flat names, points of curves, files."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mcsmoe.workflow.provenance import code_digest

_LONGEST_VALUE = 6000  # characters; MLflow refuses longer parameters

FigureSource = Any
"""A matplotlib Figure, a function that draws one (called only if the run is logged), or the path of a picture.

A ``functools.partial`` of a drawing function over data frames is drawn once for all runs with the same data.
"""


@dataclass(frozen=True)
class RunRecord:
    """All that is published of one variant at one number of experts and one seed.

    ``parameters`` may be nested (flattened with dots); ``metrics`` are final values; ``curves`` gives per stage a table
    ``training``, logged step by step as ``<stage>/<column>``; ``tables`` become CSV, ``figures`` PNG artefacts.
    """

    task: str
    variant: str
    experts: int
    seed: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, FigureSource] = field(default_factory=dict)
    files: Sequence[Path] = ()

    @property
    def key(self) -> str:
        """What identifies the run in its workflow."""
        return f"{self.task}/{self.variant}/{self.experts}e/seed{self.seed}"

    @property
    def name(self) -> str:
        """The run's name in the UI."""
        return f"{self.variant} {self.experts}e seed {self.seed}"


def plain_name(name: str) -> str:
    """``name`` with what MLflow does not allow in one replaced by an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as flat names and text: ``{"a": {"b": 1}}`` is ``{"a.b": "1"}``; lists are JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, default=str) if isinstance(value, list | tuple) else str(value)
            flat[plain_name(f"{prefix}{name}")] = text[:_LONGEST_VALUE]
    return flat


def final_metrics(summary: Mapping[str, Any], metrics: pd.DataFrame, cost: Mapping[str, Any]) -> dict[str, float]:
    """The final values of a run under names that are the same for every variant, so that runs can be compared.

    Args:
        summary: the run's row of table ``summary``.
        metrics: the run's rows of table ``metrics``; those of the final stage are named ``metrics/<metric>``, others
            ``metrics/<stage>/<metric>``; a protocol other than the summary's is named too.
        cost: the run's row of table ``cost``; its numbers are named ``cost/<column>``.
    """
    found: dict[str, Any] = {"score": summary["value"]}
    found |= {f"score_{end}": summary[end] for end in ("ci_low", "ci_high")}
    found |= {f"score_{name}": summary[name] for name in ("n", "difference", "p_value")}
    for row in metrics.to_dict("records"):
        parts = ["metrics"]
        parts += [row["stage"]] if row["stage"] != summary["stage"] else []
        parts += [row["protocol"]] if row["protocol"] != summary["protocol"] else []
        name = "/".join([*parts, row["metric"]])
        found[name] = row["value"]
        if not math.isnan(row["ci_low"]):  # what was only expected has no interval
            found |= {f"{name}_ci_low": row["ci_low"], f"{name}_ci_high": row["ci_high"]}
    settings = {"experts", "seed", "batch_size", "input_tokens", "label_tokens", "threads"}
    for name, value in cost.items():
        if name not in settings and (isinstance(value, int | float) or getattr(value, "ndim", None) == 0):
            found[f"cost/{name}"] = value
    return {plain_name(name): float(value) for name, value in found.items()}


def _table_bytes(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()


def content_digest(record: RunRecord) -> str:
    """SHA-256 of everything a run of ``record`` would hold; pictures by how they are drawn, files by content."""
    digest = hashlib.sha256()

    def add(kind: str, name: str, content: bytes) -> None:
        digest.update(f"{kind}\0{name}\0{len(content)}\0".encode() + content)

    add("key", record.key, b"")
    for kind, values in (("parameter", record.parameters), ("tag", record.tags), ("metric", record.metrics)):
        for name, text in sorted(flatten(values).items()):
            add(kind, name, text.encode())
    for kind, tables in (("curve", record.curves), ("table", record.tables)):
        for name, frame in sorted(tables.items()):
            add(kind, name, _table_bytes(frame))
    for name, figure in sorted(record.figures.items()):
        add("figure", name, _figure_content(figure))
    for file in sorted(record.files):
        add("file", Path(file).name, Path(file).read_bytes())
    if record.figures:
        add("code", "plots", code_digest(Path(__file__).parents[1] / "report" / "plots.py").encode())
    return digest.hexdigest()


def points(stage: str, curve: pd.DataFrame, start: int) -> list[tuple[str, float, int, int]]:
    """(name, value, time in ms, step) of every number of a training curve that is one."""
    seconds = curve["seconds"].fillna(0.0).cumsum() if "seconds" in curve else pd.Series(0.0, index=curve.index)
    times = [start + int(second * 1000) for second in seconds]
    steps = [int(step) for step in curve["step"]]
    made: list[tuple[str, float, int, int]] = []
    for column in curve.columns.drop(["step", "epoch"], errors="ignore"):  # the epoch is the step in other words
        values = curve[column].astype(float).tolist()
        name = plain_name(f"{stage}/{column}")
        made += [(name, v, at, step) for v, at, step in zip(values, times, steps, strict=True) if not math.isnan(v)]
    return made


def write_artefacts(record: RunRecord, folder: Path, pictures: dict[str, bytes]) -> None:
    """Write tables, figures and files into ``folder``; ``pictures`` keeps drawings that the next run may share."""
    for name, frame in record.tables.items():
        (folder / "tables").mkdir(exist_ok=True)
        (folder / "tables" / f"{name}.csv").write_bytes(_table_bytes(frame))
    for name, source in record.figures.items():
        (folder / "figures").mkdir(exist_ok=True)
        if isinstance(source, str | Path):
            shutil.copy(source, folder / "figures" / f"{name}{Path(source).suffix}")
        else:
            (folder / "figures" / f"{name}.png").write_bytes(_picture(source, pictures))
    for file in record.files:
        shutil.copy(file, folder / Path(file).name)


def _drawing_key(source: Any) -> str:
    """What a drawing of data frames follows from; empty where that is not known."""
    if not isinstance(source, partial) or not all(isinstance(each, pd.DataFrame) for each in source.args):
        return ""
    contents = b"".join(hashlib.sha256(_table_bytes(frame)).digest() for frame in source.args)
    return f"{source.func.__name__} {source.keywords} {contents.hex()}"


def _figure_content(source: Any) -> bytes:
    """What decides whether a figure has changed, without drawing it where that can be avoided."""
    if isinstance(source, str | Path):
        return Path(source).read_bytes()
    key = _drawing_key(source)
    return key.encode() if key else _picture(source, {})


def _picture(source: Any, pictures: dict[str, bytes]) -> bytes:
    key = _drawing_key(source)
    if key in pictures:
        return pictures[key]
    target = io.BytesIO()
    figure = source() if callable(source) else source
    figure.savefig(target, format="png", dpi=110, facecolor="white")
    if key:
        pictures[key] = target.getvalue()
    return target.getvalue()
