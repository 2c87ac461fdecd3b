"""One small specimen of every kind of artefact: how it is written, how it is read, and what was read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_results
import numpy as np
import pandas as pd
import torch
from tiny_switch import batch, model
from torch import Tensor, nn

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.tables import read_table, write_table
from mcsmoe.calibration.files import gradient_tensors, load_statistics, load_tensors, save_tensors
from mcsmoe.calibration.passes import collect_gradients, collect_routing
from mcsmoe.checkpoint.load import load_model, load_tokenizer
from mcsmoe.checkpoint.save import save_model
from mcsmoe.data.collate import Tokenised
from mcsmoe.data.files import read_rows
from mcsmoe.data.sources import load_split, write_rows
from mcsmoe.data.tasks import load_task
from mcsmoe.report.page import ReportInputs
from mcsmoe.report.page import write as write_report
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.train.state import StateStore
from mcsmoe.train.teacher import TeacherCache, cache_teacher
from mcsmoe.train.tokenizer import train_tokenizer
from mcsmoe.types import ExpertWeights

WORDS = [f"word{place} and another sentence of it" for place in range(40)]
TABLE = torch.tensor([0, 1, 0, 2, 1, 0])


@dataclass(frozen=True)
class Specimen:
    """A kind of artefact.

    Attributes:
        name: file or folder, relative to the place it is written to.
        write: (place, version): writes version 0 or 1, which differ, under ``name``.
        read: what a reader makes of it, as bytes that are equal exactly if the content is.
        optional: without it work begins anew, which is no error.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], bytes]
    optional: bool = False


# -- writing and reading -----------------------------------------------------------------------------------------
def _tokenizer() -> Any:
    return train_tokenizer(WORDS, 96, 4, lowercase=True)


def _model(version: int) -> nn.Module:
    return model(version, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2, num_sparse_decoder_layers=1)


def _merged(version: int) -> nn.Module:
    made = _model(version)
    adapter = adapter_for(made)
    for layer in adapter.layers(made):
        weights = adapter.read_experts(made, layer)
        kept = [weights.tensors[name][:3] for name in weights.tensors]
        adapter.write_experts(
            made, layer, ExpertWeights(dict(zip(weights.tensors, kept, strict=True)), weights.roles), TABLE
        )
    return made


def _tensors(found: dict[str, Tensor]) -> bytes:
    parts = sorted((name, tensor.detach().contiguous()) for name, tensor in found.items())
    return b"".join(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in parts)


def _frame(frame: pd.DataFrame) -> bytes:
    return frame.to_csv().encode()


def _read_model(path: Path) -> bytes:
    made = load_model(path)
    tokenizer = load_tokenizer(path)
    settings = json.dumps(made.config.to_dict(), sort_keys=True, default=str).replace(str(path.parent), "")
    return _tensors(dict(made.state_dict())) + settings.encode() + str(tokenizer(WORDS)["input_ids"]).encode()


def _write_statistics(path: Path, version: int) -> None:
    made = _model(version)
    statistics = RoutingStatistics(reservoir=8)
    collect_routing(made, adapter_for(made), [batch()], 1, statistics)
    save_tensors(path, statistics.tensors())


def _write_gradients(path: Path, version: int) -> None:
    made = _model(version)
    found = collect_gradients(made, adapter_for(made), [batch(rows=1)], 1)
    save_tensors(path, gradient_tensors(*found))


def _write_teacher(path: Path, version: int) -> None:
    made, one = _model(version), batch()
    counts = (one["labels"] != -100).sum(dim=1).tolist()
    cache_teacher(made, [list(range(5))], lambda _: one, counts, path, {"examples": "these"}, torch.device("cpu"))


def _read_teacher(path: Path) -> bytes:
    cache = TeacherCache(path, "these")
    logits_NV: Any = cache.logits(torch.arange(5), torch.device("cpu"))
    return logits_NV.numpy().tobytes()


def _write_tokens(path: Path, version: int) -> None:
    ids = np.arange(2000, dtype=np.int32) % (90 + version)
    offsets = np.arange(0, 2001, 100, dtype=np.int64)
    Tokenised(ids, offsets, ids[::10].copy(), offsets // 10, pad=0).save(path)


def _read_tokens(path: Path) -> bytes:
    return Tokenised.load(path).digest.encode()


def _write_state(path: Path, version: int) -> None:
    generator = torch.Generator().manual_seed(version)
    tensors = {f"model/{name}": torch.randn(30, 40, generator=generator) for name in "abc"}
    StateStore(path.parent, "signed").save(7, tensors, {"rows": [], "best_step": version})


def _read_state(path: Path) -> bytes:
    with _warnings() as told:
        found = StateStore(path.parent, "signed").load()
    if told:
        raise ValueError("; ".join(told))
    if found is None:
        raise LookupError("no state")
    return _tensors(found[1]) + json.dumps([found[0], found[2]], sort_keys=True).encode()


@contextmanager
def _warnings() -> Iterator[list[str]]:
    told: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logger, handler = logging.getLogger("mcsmoe"), Keep(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)


def _write_rows(path: Path, version: int) -> None:
    task = load_task("COPA")
    write_rows(path, load_split({"kind": "synthetic", "train_rows": 200}, task, "train", version), task)


def _write_report(path: Path, version: int) -> None:
    summary = fake_results.summary(tasks=("sst2",), variants=("full", "msmoe"))
    write_report(
        path,
        ReportInputs(
            summary=summary,
            metrics=fake_results.metrics(summary),
            cost=fake_results.cost(summary),
            training=[],
            routing=[({"task": "sst2", "seed": 0}, fake_results.routing(version))],
            groups=[],
            config={"version": version},
            versions={},
        ),
    )


def _save(made: nn.Module, path: Path, **options: Any) -> None:
    save_model(made, path, _tokenizer(), {"stage": "test"}, **options)


SPECIMENS: dict[str, Specimen] = {
    "table": Specimen(
        "groups.parquet",
        lambda path, version: write_table(path, fake_results.groups(3, version, experts=200), "groups"),
        lambda path: _frame(read_table(path, "groups")),
    ),
    "data set": Specimen("train.parquet", _write_rows, lambda path: _frame(read_rows(path, load_task("COPA")))),
    "routing statistics": Specimen(
        "routing.safetensors", _write_statistics, lambda path: _tensors(load_statistics(path).tensors())
    ),
    "gradients": Specimen("gradients.safetensors", _write_gradients, lambda path: _tensors(load_tensors(path))),
    "teacher": Specimen("teacher", _write_teacher, _read_teacher),
    "stock checkpoint": Specimen("full", lambda path, version: _save(_model(version), path), _read_model),
    "compact checkpoint": Specimen("merged", lambda path, version: _save(_merged(version), path), _read_model),
    "compact checkpoint in shards": Specimen(
        "sharded", lambda path, version: _save(_merged(version), path, shard_bytes=20_000), _read_model
    ),
    "stock checkpoint in shards": Specimen(
        "full-sharded", lambda path, version: _save(_model(version), path, shard_bytes=20_000), _read_model
    ),
    "tokens": Specimen("tokens.npz", _write_tokens, _read_tokens),
    "training state": Specimen("state/step-000000007.safetensors", _write_state, _read_state, optional=True),
    "report": Specimen("report.html", _write_report, lambda path: path.read_bytes()),
}


def content(specimen: Specimen, place: Path) -> str:
    """Digest of what a reader makes of the specimen."""
    return hashlib.sha256(specimen.read(place / specimen.name)).hexdigest()
