"""Statistics say what weights they were taken on, and are refused for all others."""

from __future__ import annotations

import json
import logging
import math
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_calibration_text
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused, rows, run
from tiny_switch import model

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.tensors import TensorFolder, read_sealed, write_sealed
from mcsmoe.calibration.files import load_statistics
from mcsmoe.checkpoint.format import layer_specs
from mcsmoe.checkpoint.lineage import lineage
from mcsmoe.transform.compress import CompressSettings, compress_layers
from mcsmoe.transform.layers import ModelLayers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, and statistics that a merge of it has saved."""
    folder = tmp_path_factory.mktemp("statistics")
    mcsmoe.save(model(), folder / "full")
    (folder / "tokens.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    kept = ("--calibration", folder / "tokens.jsonl", "--save-statistics", folder / "kept.safetensors")
    run("merge", folder / "full", *kept, "--experts", 3, "--alignment", "none", "--out", folder / "first")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of them, to be changed."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def changed(folder: Path, out: Path, name: str) -> Path:
    """A copy of a checkpoint with one tensor moved a little, as a step of training moves it."""
    shutil.copytree(folder, out)
    (out / "SHA256SUMS").unlink(missing_ok=True)
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_statistics_of_other_weights_are_refused_in_every_command(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = place / "kept.safetensors"
    router = next(name for name in TensorFolder(place / "full").where if "router" in name)
    trained = changed(place / "full", place / "trained", router)
    for words in (("merge", trained, "--experts", 3), ("compress", trained, "--rank", 2)):
        told = refused(caplog, *words, "--statistics", file, "--out", place / "out")
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
        found = load_statistics(place / "old.safetensors", ["0" * 64])
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
        (lambda tensors: tensors.update({n: t[0] for n, t in tensors.items() if n.endswith("wanted_E")}), "wanted_E"),
        (
            lambda tensors: tensors.update({n: t - 1000 for n, t in tensors.items() if n.endswith("computed_E")}),
            "computed_E",
        ),
        (lambda tensors: tensors.update({n: t[:1] for n, t in tensors.items() if n.endswith("gate_ES")}), "gate_ES"),
        (lambda tensors: tensors.update({n: t * torch.nan for n, t in tensors.items() if n.endswith("_ED")}), "nan"),
    ],
)
def test_statistics_that_cannot_be_are_refused_by_file(place: Path, change: object, message: str) -> None:
    tensors, _ = read_sealed(place / "kept.safetensors")
    change(tensors)  # type: ignore[operator]
    write_sealed(place / "kept.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"(?i)kept\.safetensors: .*{message}"):
        load_statistics(place / "kept.safetensors")


def test_options_that_exclude_each_other_are_refused(place: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    told = refused(caplog, *common, "--calibration", place / "tokens.jsonl")
    assert "--calibration and --statistics are given" in told
    told = refused(caplog, *common, "--save-statistics", place / "more.safetensors")
    assert "--save-statistics keeps what --calibration FILE collects" in told


# -- models made from the one the statistics were taken on -------------------------------------------------------
def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_statistics_of_the_full_model_serve_all_that_is_made_from_it_with_its_experts(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, full, merged = place / "kept.safetensors", place / "full", place / "first"
    run("collect", full, "--calibration", place / "tokens.jsonl", "--out", place / "folder")
    run("export", merged, "--form", "exact", "--out", place / "again")
    run("export", merged, "--form", "dense", "--out", place / "dense")
    settings = CompressSettings(rank=2, keep=0.5)
    wanted = mcsmoe.load(merged)
    merged_layers = [name for name in load_statistics(file).layers if name in layer_specs(merged)]
    compress_layers(
        ModelLayers(wanted, adapter_for(wanted)), settings, load_statistics(file), only=merged_layers or None
    )
    state = wanted.state_dict()
    for number, (source, statistics) in enumerate([(merged, file), (place / "again", file), (place / "dense", file)]):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run(
                "compress", source, "--statistics", statistics, "--rank", 2, "--keep", 0.5, "--out", place / f"{number}"
            )
        assert "taken on weights that this model was made from" in told(caplog)
        if source != place / "dense":  # its groups are experts of their own, of the same tokens each
            found = mcsmoe.load(place / f"{number}").state_dict()
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], state[name]) for name in state)
    run("compress", merged, "--statistics", place / "folder", "--rank", 2, "--keep", 0.5, "--out", place / "by-folder")
    own = TensorFolder(full).fingerprint
    assert lineage(place / "0") == [TensorFolder(place / "0").fingerprint, TensorFolder(merged).fingerprint, own]
    assert lineage(place / "1")[-1] == lineage(place / "dense")[-1] == own
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run("merge", full, "--statistics", file, "--experts", 3, "--alignment", "none", "--out", place / "same")
    assert "made from" not in told(caplog)


def test_statistics_are_refused_where_experts_were_dropped_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mcsmoe.save(tiny_models.model("mixtral"), tmp_path / "full")
    text = [{"input_ids": list(range(2, 12 + row))} for row in range(8)]
    (tmp_path / "tokens.jsonl").write_text("\n".join(json.dumps(row) for row in text))
    calibrate = ("--calibration", tmp_path / "tokens.jsonl")
    run("collect", tmp_path / "full", *calibrate, "--out", tmp_path / "folder")
    run("prune", tmp_path / "full", *calibrate, "--experts", 2, "--out", tmp_path / "fewer")
    assert lineage(tmp_path / "fewer")[1:] == [TensorFolder(tmp_path / "full").fingerprint]
    words = ("--statistics", tmp_path / "folder", "--out", tmp_path / "out")
    for command in (("compress", tmp_path / "fewer", "--rank", 2), ("merge", tmp_path / "fewer", "--experts", 1)):
        message = refused(caplog, *command, *words)
        assert re.search(r"folder: layer '.*': the statistics are of \d experts, the layer has 2", message)
        assert "collect them on this one" in message
    assert not (tmp_path / "out").exists()


def test_what_a_result_says_it_was_made_from_holds_for_its_own_weights_alone(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = place / "kept.safetensors"
    run("export", place / "first", "--form", "dense", "--out", place / "dense")
    trained = changed(place / "dense", place / "trained", "shared.weight")
    words = ("--statistics", file, "--rank", 2, "--out", place / "out")
    message = refused(caplog, "compress", trained, *words)
    assert "does not say that it was made from that" in message
    assert "provenance.json: was written for other weights" in told(caplog)
    (place / "dense" / "provenance.json").write_text("[")
    (place / "dense" / "SHA256SUMS").unlink()
    assert "another model" in refused(caplog, "compress", place / "dense", *words)
    assert "provenance.json: not readable" in told(caplog)
    mcsmoe.save(model(seed=5), place / "other")
    calibrate = ("--calibration", place / "tokens.jsonl")
    run("merge", place / "other", *calibrate, "--experts", 3, "--alignment", "none", "--out", place / "sibling")
    assert "another model" in refused(caplog, "compress", place / "sibling", *words)


def stage(patch: pytest.MonkeyPatch, script: str, *words: object) -> None:
    """Run a script of the workflow in this process."""
    file = Path(__file__).resolve().parent.parent / "workflow_scripts" / f"{script}.py"
    patch.setattr("sys.argv", [str(file), *map(str, words)])
    module = runpy.run_path(str(file))
    module["main"](module["parse"]())


def test_stages_take_the_statistics_of_their_own_chain_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("full", 0), ("other", 7)):
        mcsmoe.save(model(seed), place / name, tokenizer=test_calibration_text.tokenizer())
    ours, theirs = place / "ours.safetensors", place / "theirs.safetensors"
    for name, file in (("full", ours), ("other", theirs)):
        kept = ("--calibration", place / "tokens.jsonl", "--save-statistics", file)
        run("merge", place / name, *kept, "--experts", 3, "--alignment", "none", "--out", place / f"by-{name}")
    permuted, moved = place / "permuted", ("--permutation", place / "permutation.parquet")

    def permute(routing: Path) -> None:
        how = ("--alignment", "activation", "--routing", routing)
        stage(monkeypatch, "permute", "--model", place / "full", *how, "--out", permuted, *moved)

    def group(routing: Path) -> None:
        tables = ("--similarity-table", place / "similarity.parquet", "--groups", place / "groups.parquet")
        given = ("--model", permuted, "--routing", routing, *moved)
        stage(monkeypatch, "group", *given, "--experts", 3, *tables)

    def merge(routing: Path) -> None:
        given = ("--model", permuted, "--routing", routing, "--groups", place / "groups.parquet", *moved)
        stage(monkeypatch, "merge", *given, "--out", place / "merged")

    for step in (permute, group, merge):
        with pytest.raises(ValueError, match=r"theirs\.safetensors: these statistics were taken on another model"):
            step(theirs)
        step(ours)
    wanted = [TensorFolder(place / name).fingerprint for name in ("merged", "permuted", "full")]
    assert lineage(place / "merged") == wanted


WRONG_PAGES: list[tuple[str, Any]] = [
    *((key, value) for key in ("layers", "domains", "settings") for value in (None, [], "x", {})),
    *(("layers", {"decoder": name}) for name in ("../layer-00000.safetensors", "/etc/passwd", 3, None, "")),
    *(("domains", {"one": {"weight": weight}}) for weight in (-1, "x", [], True, 1e13)),
    *(("domains", {"one": value}) for value in (None, 3, [], {})),
    *(("settings", {"reservoir": count, "seed": 0}) for count in (-1, 1.5, "64", None, 2**64)),
    *(("settings", {"reservoir": 64, "seed": seed}) for seed in (-1, None, "0", 2**64)),
]


@pytest.fixture(scope="module")
def collected(made: Path) -> Path:
    """A folder of statistics."""
    run("collect", made / "full", "--calibration", made / "tokens.jsonl", "--out", made / "folder")
    return made / "folder"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_folder_that_holds_no_numbers_is_refused(collected: Path, tmp_path: Path, value: float) -> None:
    told = json.loads((collected / "statistics.json").read_text())
    told["domains"] = {"one": {"weight": value}}
    (tmp_path / "statistics.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"no folder of statistics \(it holds -?(NaN|Infinity)\)"):
        load_statistics(tmp_path)


@pytest.mark.parametrize(("key", "value"), WRONG_PAGES, ids=str)
def test_a_folder_that_does_not_say_what_it_holds_is_refused(collected: Path, key: str, value: Any) -> None:
    page = collected / "statistics.json"
    told = page.read_text()
    try:
        page.write_text(json.dumps(json.loads(told) | {key: value}))
        with pytest.raises(ValueError, match=rf"statistics\.json: .*{key}.*; restore the file, or collect"):
            load_statistics(collected)
    finally:
        page.write_text(told)
    assert len(load_statistics(collected).layers) == len(json.loads(told)["layers"])
