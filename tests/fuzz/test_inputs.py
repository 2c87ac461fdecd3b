"""Malformed texts, task files, tables and statistics: each is read rightly, or refused in one line; MCSMOE_FUZZ=1: many."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_calibration_text
import test_values
from common import ODD, damaged, outcome, rounds

from mcsmoe.artefacts.tables import read_table
from mcsmoe.artefacts.tensors import write_sealed
from mcsmoe.calibration.files import load_statistics, save_statistics
from mcsmoe.calibration.folder import layer_file, write_layer
from mcsmoe.calibration.rows import Row, read_rows
from mcsmoe.calibration.text import batches
from mcsmoe.data import sources
from mcsmoe.data.tasks import load_task

TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
ROWS: tuple[dict[str, Any], ...] = (
    {"text": "old miller"},
    {"input": "old", "target": "miller"},
    {"prompt": "old", "completion": "miller"},
    {"prompt": TALK[:1], "completion": TALK[1:]},
    {"messages": TALK},
    {"messages": TALK, "tools": [{"name": "add"}]},
    {"input_ids": [5, 6, 7], "labels": [8]},
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]},
)
TASK: dict[str, Any] = {
    "name": "T",
    "description": "d",
    "columns": {"sentence": "string", "verdict": "string", "words": ["string"], "number": "int64"},
    "prompt": "review: {{ sentence }}",
    "choices": ["negative", "positive"],
    "label": "verdict",
    "label_values": ["bad", "good"],
    "protocol": "rank",
    "metrics": ["accuracy"],
}
EXAMPLES = [
    {"sentence": f"film {number}", "verdict": "good", "words": ["a", "b"], "number": number} for number in range(4)
]


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with one thing somewhere inside replaced, removed, or put in."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        way = rng.random()
        if way < 0.1:
            return {key: one for key, one in value.items() if key != name}
        if way < 0.2:
            return value | {rng.choice(["meta", "text", "input", "", "labels", "idx"]): rng.choice(ODD)}
        return value | {name: changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], file: Path) -> bool:
    """Write rows as parquet, if they can be."""
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), file)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return False
    return True


# -- texts -------------------------------------------------------------------------------------------------------
def check_rows(found: list[Row]) -> None:
    for row in found:
        for name, value in row.fields.items():
            if name in ("text", "input", "target", "prompt", "completion"):
                assert isinstance(value, str)
                value.encode()
            elif name in ("input_ids", "labels"):
                assert all(type(token) is int for token in value)


@pytest.mark.parametrize("seed", rounds(60, 4000))
def test_texts(seed: int, tmp_path: Path) -> None:
    rng, tokenizer = random.Random(seed), test_calibration_text.tokenizer()
    row = rng.choice(ROWS)
    rows = [row, row, row]
    rows[rng.randrange(3)] = changed(row, rng)
    file = tmp_path / f"rows{rng.choice(['.jsonl', '.jsonl', '.parquet', '.txt'])}"
    if file.suffix == ".parquet":
        if not table([one if isinstance(one, dict) else {"text": one} for one in rows], file):
            return
        if rng.random() < 0.3:
            file.write_bytes(damaged(file.read_bytes(), rng))
    elif file.suffix == ".txt":
        file.write_bytes(damaged(b"old miller\ncounts\x0cgrain\nfor birds\n", rng))
    else:
        file.write_bytes(damaged(lines(rows), rng) if rng.random() < 0.5 else lines(rows))

    def read() -> list[Row]:
        found = read_rows(file)
        for encoder_decoder in (False, True):
            batches(found, tokenizer, encoder_decoder, 99, 2, 16, 0, vocabulary=98)
        return found

    found = outcome(read, file.name)
    if found is not None:
        check_rows(found)
        if file.suffix == ".txt":
            texts = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode().split("\n")
            assert [row.fields["text"] for row in found] == [text.removesuffix("\r") for text in texts if text.strip()]


# -- task files --------------------------------------------------------------------------------------------------
def read_task(task: Path, rows: Path) -> list[str]:
    described = load_task(task)
    source = {"kind": "files", "files": {"train": rows, "validation": rows}}
    sources.check(source, described)
    made = described.examples(sources.load_split(source, described, "train", 0), "train", rows)
    return [str(text) for text in made["input"]]


@pytest.mark.parametrize("seed", rounds(50, 3000))
def test_task_files(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    task, rows = tmp_path / "task.yaml", tmp_path / "rows.jsonl"
    rows.write_bytes(lines(EXAMPLES))
    text = yaml.safe_dump(changed(TASK, rng), allow_unicode=True).encode("utf-8", "replace")
    task.write_bytes(damaged(text, rng) if rng.random() < 0.4 else text)
    outcome(lambda: read_task(task, rows), str(tmp_path))


@pytest.mark.parametrize("seed", rounds(50, 3000))
def test_rows_of_tasks(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    suffix = rng.choice([".jsonl", ".parquet", ".csv"])
    task, file = tmp_path / "task.yaml", tmp_path / f"rows{suffix}"
    described = dict(TASK)
    if suffix == ".csv":
        described["columns"] = {name: kind for name, kind in TASK["columns"].items() if name != "words"}
    task.write_text(yaml.safe_dump(described))
    examples = [dict(row) for row in EXAMPLES]
    place = rng.randrange(len(examples))
    made = changed(examples[place], rng)
    examples[place] = made if isinstance(made, dict) else {"sentence": made}
    if suffix == ".jsonl":
        file.write_bytes(lines(examples))
    elif suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(described["columns"]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(examples)
        file.write_bytes(text.getvalue().encode("utf-8", "replace"))
    elif not table(examples, file):
        return
    if rng.random() < 0.3:
        file.write_bytes(damaged(file.read_bytes(), rng))
    found = outcome(lambda: read_task(task, file), "rows")
    assert found is None or all(text.startswith("review:") for text in found)


# -- tables and statistics ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", rounds(50, 3000))
def test_tables(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    name = rng.choice(list(test_values.ROWS))
    rows, file = test_values.ROWS[name](), tmp_path / "t.parquet"
    place = rng.randrange(len(rows))
    rows[place] = changed(rows[place], rng)
    if not isinstance(rows[place], dict) or rng.random() < 0.2:
        rows.pop(place)
    try:
        test_values.write(file, rows, name)
    except (pa.ArrowException, KeyError, ValueError, TypeError, OverflowError):
        if not table(rows, file):
            return
    if rng.random() < 0.3:
        file.write_bytes(damaged(file.read_bytes(), rng))
    found = outcome(lambda: read_table(file, name), "t.parquet")
    if found is not None:
        for _, part in found.groupby("layer"):
            assert sorted(part["expert"]) == list(range(len(part)))


@pytest.mark.parametrize("seed", rounds(40, 2000))
def test_statistics(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    file = tmp_path / "s.safetensors"
    torch.manual_seed(0)
    made = test_values.statistics()
    if rng.random() < 0.5:
        save_statistics(file, made, "0" * 64)
        file.write_bytes(damaged(file.read_bytes(), rng))
    else:
        tensors = made.tensors()
        name = rng.choice(list(tensors))
        one = tensors[name]
        odd = (
            one.float() * torch.nan,
            one - 10**6,
            one.flatten(),
            one[None],
            one.bool(),
            one.double() + 0.5,
            one.to(torch.int8),
        )
        tensors[name] = rng.choice(odd)
        if rng.random() < 0.2:
            tensors.pop(name)
        write_sealed(file, tensors)
    outcome(lambda: load_statistics(file), "s.safetensors")


@pytest.mark.parametrize("seed", rounds(40, 2000))
def test_folders_of_statistics(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "gathered"
    folder.mkdir()
    torch.manual_seed(0)
    layers = {layer: layer_file(number) for number, layer in enumerate(test_values.statistics().layers)}
    for layer, file in layers.items():
        write_layer(folder / file, layer, {"one": test_values.statistics().layers[layer]})
    told: dict[str, Any] = {
        "version": 1,
        "model": "0" * 64,
        "layers": layers,
        "domains": {"one": {"rows": 1, "tokens": 3, "weight": None}},
        "settings": {"reservoir": 2, "seed": 0},
    }
    if rng.random() < 0.8:
        here: dict[str, Any] = told
        key = rng.choice(sorted(here))
        while isinstance(here[key], dict) and rng.random() < 0.7:
            here = here[key]
            key = rng.choice(sorted(here))
        here[key] = rng.choice(ODD)
        (folder / "statistics.json").write_text(json.dumps(told))
    else:
        (folder / "statistics.json").write_bytes(damaged(json.dumps(told).encode(), rng))

    def read() -> None:
        statistics = load_statistics(folder)
        for layer in statistics.layers:
            assert statistics.layers[layer].num_experts == test_values.EXPERTS

    outcome(read, "gathered")
