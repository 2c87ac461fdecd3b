"""Layers reduced in sequence by a process that is killed: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import refused, run
from safetensors.torch import load_file

import mcsmoe.calibration.collect as collecting
import mcsmoe.transform.merge as merging
from mcsmoe.calibration.layer_major import Block
from mcsmoe.transform.reduce import Reduced
from mcsmoe.transform.unfinished import Unfinished


class Killed(BaseException):
    """Ends a run as a kill does: nothing is tidied up that a kill would leave."""


def kill_after(blocks: int, patch: pytest.MonkeyPatch) -> None:
    before = Unfinished.commit

    def commit(self: Unfinished, block: str, reduced: Mapping[str, Reduced]) -> None:
        before(self, block, reduced)
        if len(self.order) == blocks:
            raise Killed

    patch.setattr(Unfinished, "commit", commit)


WAYS = {
    "prune": ("prune", "--criterion", "gram"),
    "refit": ("prune", "--criterion", "gram", "--refit"),
    "stream": ("prune", "--criterion", "gram", "--refit", "--refit-target", "stream"),
    "novices": ("prune", "--dropped", "affine", "--rank", "2"),
    "ream": ("merge", "--method", "ream"),
}
ONE_PASS = {
    "merge": ("merge", "--method", "frequency"),
    "budget": ("prune", "--criterion", "gram", "--budget", "predicted"),
}
"""Ways that take statistics of the whole model first."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfinished")
    tiny_models.model("qwen3_moe", num_hidden_layers=4).save_pretrained(folder / "full")
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(2, 96, (12,), generator=draw).tolist()} for _ in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "full"


def words(full: Path, way: str, out: Path, *more: object) -> list[str]:
    command, *options = (WAYS | ONE_PASS)[way]
    given = [command, full, "--calibration", full.parent / "rows.jsonl", "--experts", 4, "--out", out]
    return [str(word) for word in [*given, "--batch-size", 4, "--threads", 1, *options, *more]]


def killed(blocks: int, *given: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_after(blocks, patch)
        with pytest.raises(Killed):
            run(*given)


def same(one: Path, two: Path) -> None:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in ("experts.json", "groups.parquet"):
        assert not (one / name).exists() or (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("way", list(WAYS))
def test_a_killed_run_goes_on_after_its_last_block(way: str, full: Path, tmp_path: Path) -> None:
    run(*words(full, way, tmp_path / "whole"))
    killed(2, *words(full, way, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert len(json.loads((tmp_path / "out.partial" / "progress.json").read_text())["order"]) == 2
    run(*words(full, way, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()
    same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("way", list(ONE_PASS))
@pytest.mark.parametrize("blocks", [2, 4])
def test_statistics_that_a_killed_run_has_taken_are_not_taken_again(
    way: str, blocks: int, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*words(full, way, tmp_path / "whole"))
    out, taken = tmp_path / "out", []
    before, ended = collecting._Run.commit, collecting._Run.finish

    def commit(self: collecting._Run, block: Block) -> None:
        before(self, block)
        taken.append(block.path)
        if len(taken) == blocks < 4:
            raise Killed

    def finish(self: collecting._Run, say_request: bool) -> None:
        ended(self, say_request)
        if len(taken) == 4 == blocks:
            raise Killed

    monkeypatch.setattr(collecting._Run, "commit", commit)
    monkeypatch.setattr(collecting._Run, "finish", finish)
    with pytest.raises(Killed):
        run(*words(full, way, out))
    assert not out.exists()
    monkeypatch.setattr(collecting._Run, "finish", ended)
    # Asked to replace what is not there yet, it goes on all the same.
    run(*words(full, way, out, "--overwrite"))
    assert len(taken) == len(set(taken)) == 4
    same(tmp_path / "whole", out)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_who_presses_ctrl_c_finds_no_statistics_left(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_given: object) -> None:
        raise KeyboardInterrupt

    for place in ((collecting._Run, "commit"), (merging, "merge_layer")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupt)
            with pytest.raises((SystemExit, KeyboardInterrupt)):
                run(*words(full, "merge", tmp_path / "out"))
        assert not list(tmp_path.iterdir())


def test_statistics_taken_for_other_text_are_not_used(
    full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "merge_layer", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(*words(full, "merge", tmp_path / "out"))
    monkeypatch.undo()
    said = refused(caplog, *words(full, "merge", tmp_path / "out", "--samples", 8))
    assert "had another domains" in said
    run(*words(full, "merge", tmp_path / "out", "--samples", 8, "--overwrite"))
    run(*words(full, "merge", tmp_path / "whole", "--samples", 8))
    same(tmp_path / "whole", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_stopped_run_of_another_request_is_not_gone_on_with(
    full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(1, *words(full, "prune", tmp_path / "out"))
    said = refused(caplog, *words(full, "refit", tmp_path / "out"))
    assert "had another method" in said
    assert "--overwrite" in said
    run(*words(full, "refit", tmp_path / "out", "--overwrite"))
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.skipif("MCSMOE_KILLS" not in os.environ, reason="set MCSMOE_KILLS to the number of kills (20: 5 minutes)")
@pytest.mark.parametrize("way", ["refit", "ream", "merge"])
def test_kills_at_random_moments_change_no_bit(way: str, full: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mcsmoe"]
    started = time.monotonic()
    subprocess.run([*command, *words(full, way, tmp_path / "whole")], stderr=subprocess.DEVNULL, check=True)
    seconds, draw, stopped = time.monotonic() - started, random.Random(0), 0
    for _ in range(int(os.environ["MCSMOE_KILLS"])):
        process = subprocess.Popen([*command, *words(full, way, tmp_path / "out")], stderr=subprocess.DEVNULL)
        try:
            assert process.wait(draw.uniform(0.3, 1.0) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stopped += 1
        if (tmp_path / "out").exists():
            same(tmp_path / "whole", tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
    assert stopped
    subprocess.run([*command, *words(full, way, tmp_path / "out")], stderr=subprocess.DEVNULL, check=True)
    same(tmp_path / "whole", tmp_path / "out")
