"""Malformed texts, statistics and tables given to the commands: done, or exit status 1, one line and nothing written."""

from __future__ import annotations

import logging
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_calibration_text
import tiny_models
from common import damaged, rounds
from test_inputs import ROWS, changed, lines, table

import mcsmoe
from mcsmoe.artefacts.tensors import read_sealed, write_sealed
from mcsmoe.cli import main as cli

TEXT = b"old miller\ncounts grain\nfor birds\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the statistics of it, a folder of them, and a merged model with its table of groups."""
    folder = tmp_path_factory.mktemp("commands")
    mcsmoe.save(tiny_models.model("mixtral"), folder / "full", tokenizer=test_calibration_text.tokenizer())
    (folder / "text.txt").write_bytes(TEXT)
    text = ("--calibration", folder / "text.txt")
    run("merge", folder / "full", *text, "--save-statistics", folder / "s.safetensors", *merged(folder / "merged"))
    run("collect", folder / "full", *text, "--out", folder / "collected")
    return folder


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def merged(out: Path) -> tuple[object, ...]:
    return ("--experts", 2, "--alignment", "none", "--out", out)


def given_text(rng: random.Random, place: Path, work: Path) -> tuple[Path, tuple[object, ...]]:
    file = work / rng.choice(["rows.jsonl", "rows.jsonl", "rows.parquet", "rows.txt"])
    rows: list[Any] = [rng.choice(ROWS)] * 3
    rows[rng.randrange(3)] = changed(rows[0], rng)
    if file.suffix == ".txt":
        file.write_bytes(damaged(TEXT, rng))
    elif file.suffix == ".jsonl" or not table([row if isinstance(row, dict) else {"text": row} for row in rows], file):
        file = work / "rows.jsonl"
        file.write_bytes(damaged(lines(rows), rng) if rng.random() < 0.3 else lines(rows))
    command = rng.choice([("merge", *merged(work / "out")), ("compress", "--rank", 2, "--out", work / "out")])
    return file, (command[0], place / "full", "--calibration", file, *command[1:])


def given_statistics(rng: random.Random, place: Path, work: Path) -> tuple[Path, tuple[object, ...]]:
    if rng.random() < 0.4:
        file = work / "collected"
        shutil.copytree(place / "collected", file)
        inner = rng.choice(sorted(one for one in file.iterdir() if one.is_file()))
        inner.write_bytes(damaged(inner.read_bytes(), rng))
    else:
        file = work / "s.safetensors"
        tensors, _ = read_sealed(place / "s.safetensors")
        if rng.random() < 0.6:
            name = rng.choice(sorted(tensors))
            one = tensors[name]
            tensors[name] = rng.choice([one.float() * float("nan"), one - 10**6, one.flatten(), one[None], one.bool()])
        else:
            tensors.pop(rng.choice(sorted(tensors)))
        write_sealed(file, tensors)
    command = rng.choice([("merge", *merged(work / "out")), ("compress", "--rank", 2, "--out", work / "out")])
    return file, (command[0], place / "full", "--statistics", file, *command[1:])


def given_groups(rng: random.Random, place: Path, work: Path) -> tuple[Path, tuple[object, ...]]:
    import pyarrow.parquet as pq

    file = work / "g.parquet"
    rows = pq.read_table(place / "merged" / "groups.parquet").to_pylist()
    row = rng.randrange(len(rows))
    rows[row] = changed(rows[row], rng)
    if not isinstance(rows[row], dict):
        rows.pop(row)
    if not table(rows, file) or rng.random() < 0.3:
        file.write_bytes(damaged((place / "merged" / "groups.parquet").read_bytes(), rng))
    return file, ("export", place / "merged", "--form", "stock", "--groups", file, "--out", work / "out")


@pytest.mark.parametrize("given", [given_text, given_statistics, given_groups])
@pytest.mark.parametrize("seed", rounds(4, 300))
def test_a_command_is_done_or_refuses_in_one_line(
    given: Any, seed: int, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, words = given(random.Random(seed), place, tmp_path)
    before = sorted(tmp_path.iterdir())
    caplog.clear()
    status = 0
    try:
        with caplog.at_level(logging.INFO):
            run(*words)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    if status:
        assert status == 1
        assert len(errors) == 1
        assert "\n" not in errors[0]
        assert file.name in errors[0]
        assert sorted(tmp_path.iterdir()) == before  # neither a result nor half of one
    else:
        assert not errors
        assert (tmp_path / "out" / "config.json").is_file()
