"""Malformed checkpoint folders: each is read, or refused in one line; MCSMOE_FUZZ=1: many more."""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_models
from common import ODD, damaged, outcome, rounds

from mcsmoe.checkpoint.load import load_model
from mcsmoe.checkpoint.streaming import Streamed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_models.model("qwen3_moe").save_pretrained(folder)
    return folder


def _config(folder: Path, rng: random.Random) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields[rng.choice(sorted(fields))] = rng.choice(ODD)
    (folder / "config.json").write_text(json.dumps(fields))


def _header(folder: Path, rng: random.Random) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    name = rng.choice(sorted(header))
    if rng.random() < 0.3:
        header[name] = rng.choice(ODD)
    else:
        header[name][rng.choice(("dtype", "shape", "data_offsets", "other"))] = rng.choice(ODD)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _index(folder: Path, rng: random.Random) -> None:
    places = (*ODD, "../model.safetensors", "/etc/passwd", "absent.safetensors", "config.json", "weights.bin")
    index: Any = {"metadata": {}, "weight_map": {"lm_head.weight": rng.choice(places)}}
    if rng.random() < 0.3:
        index = rng.choice(ODD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if rng.random() < 0.5:
        (folder / "model.safetensors").unlink()


def _sums(folder: Path, rng: random.Random) -> None:
    lines = (
        "x",
        "0" * 64 + "  config.json",
        "0" * 64 + "  ../config.json",
        "0" * 64 + "  /etc/passwd",
        "\x00",
        "0" * 64,
    )
    (folder / "SHA256SUMS").write_text("\n".join(rng.choices(lines, k=2)))


def _bytes(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice(("config.json", "model.safetensors", "generation_config.json"))
    if file.is_file():
        file.write_bytes(damaged(file.read_bytes(), rng))


WAYS = (_config, _header, _index, _sums, _bytes)


@pytest.mark.parametrize("seed", rounds(60, 1500))
def test_a_damaged_checkpoint_is_read_or_refused_by_name(whole: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    WAYS[seed % len(WAYS)](folder, rng)
    outcome(lambda: Streamed(folder), "model")
    outcome(lambda: load_model(folder), "model")
