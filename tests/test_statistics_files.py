"""Statistics say what weights they were taken on, and are refused for all others."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused, rows, run
from tiny_switch import model

import mcsmoe
from mcsmoe.artefacts.tensors import TensorFolder, read_sealed, write_sealed
from mcsmoe.calibration.files import load_statistics


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, text, and statistics that a merge of it has saved."""
    mcsmoe.save(model(), tmp_path / "full")
    (tmp_path / "tokens.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    kept = ("--calibration", tmp_path / "tokens.jsonl", "--save-statistics", tmp_path / "kept.safetensors")
    run("merge", tmp_path / "full", *kept, "--experts", 3, "--alignment", "none", "--out", tmp_path / "first")
    return tmp_path


def changed(folder: Path, out: Path, name: str) -> Path:
    """A copy of a checkpoint with one tensor moved a little, as a step of training moves it."""
    shutil.copytree(folder, out)
    (out / "SHA256SUMS").unlink(missing_ok=True)
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_statistics_of_other_weights_are_refused_in_every_command(
    place: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = place / "kept.safetensors"
    router = next(name for name in TensorFolder(place / "full").where if "router" in name)
    trained = changed(place / "full", place / "trained", router)
    for words in (("merge", trained, "--experts", 3), ("compress", trained, "--rank", 2)):
        told = refused(capfd, caplog, *words, "--statistics", file, "--out", place / "out")
        assert "kept.safetensors: these statistics were taken on another model" in told
    assert not (place / "out").exists()
    shards = place / "shards"
    shutil.copytree(place / "full", shards)
    run("merge", shards, "--statistics", file, "--experts", 3, "--alignment", "none", "--out", place / "same")
    one, two = ((place / name / "model.safetensors").read_bytes() for name in ("first", "same"))
    assert one == two


def test_a_fingerprint_follows_from_the_tensors_alone(place: Path) -> None:
    mcsmoe.save(model(), place / "again")
    wanted = TensorFolder(place / "full").fingerprint
    tensors = load_file(place / "full" / "model.safetensors")
    shutil.copytree(place / "full", place / "sharded")
    (place / "sharded" / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, place / "sharded" / f"{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    (place / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert TensorFolder(place / "sharded").fingerprint == wanted
    seen = {wanted}
    for number, name in enumerate(names):
        if tensors[name].is_floating_point():
            seen.add(TensorFolder(changed(place / "full", place / f"c{number}", name)).fingerprint)
    assert len(seen) == 1 + sum(tensor.is_floating_point() for tensor in tensors.values())


def test_statistics_that_do_not_say_what_of_are_accepted_with_a_warning(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, _ = read_sealed(place / "kept.safetensors")
    tensors.pop("@model")
    write_sealed(place / "old.safetensors", tensors)
    with caplog.at_level(logging.WARNING):
        found = load_statistics(place / "old.safetensors", "0" * 64)
    assert "does not say what model it was taken on" in caplog.text
    assert found.layers.keys() == load_statistics(place / "kept.safetensors").layers.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("settings"), "settings are missing"),
        (lambda tensors: tensors.update(settings=torch.zeros(2)), "settings are missing"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("wanted_E")], "wanted_E"),
        (
            lambda tensors: tensors.update({n: t[:0] for n, t in tensors.items() if n.endswith("gate_sum_E")}),
            "gate_sum_E",
        ),
        (lambda tensors: tensors.update({n: t[0] for n, t in tensors.items() if n.endswith("wanted_E")}), "kept"),
        (
            lambda tensors: tensors.update({n: t - 1000 for n, t in tensors.items() if n.endswith("computed_E")}),
            "computed_E",
        ),
        (lambda tensors: tensors.update({n: t * torch.nan for n, t in tensors.items() if n.endswith("_ED")}), "nan"),
    ],
)
def test_statistics_that_cannot_be_are_refused_by_file(place: Path, change: object, message: str) -> None:
    tensors, _ = read_sealed(place / "kept.safetensors")
    change(tensors)  # type: ignore[operator]
    write_sealed(place / "kept.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"kept\.safetensors: .*{message}|kept\.safetensors: "):
        load_statistics(place / "kept.safetensors")


def test_options_that_exclude_each_other_are_refused(
    place: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    common = (
        "merge",
        place / "full",
        "--experts",
        3,
        "--out",
        place / "out",
        "--statistics",
        place / "kept.safetensors",
    )
    told = refused(capfd, caplog, *common, "--calibration", place / "tokens.jsonl")
    assert "--calibration and --statistics are given" in told
    told = refused(capfd, caplog, *common, "--save-statistics", place / "more.safetensors")
    assert "--save-statistics keeps what --calibration FILE collects" in told
