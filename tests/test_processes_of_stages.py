"""The stages of training and of routing statistics, by one process and by two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from faults import loaded
from safetensors.torch import load_file
from test_processes import LOSSES, WEIGHTS, largest_difference
from torch import Tensor

from mcsmoe.artefacts.tables import read_table, write_table
from mcsmoe.calibration.files import load_statistics
from mcsmoe.checkpoint.load import load_model
from mcsmoe.checkpoint.save import save_model
from mcsmoe.data.collate import Tokenised
from mcsmoe.data.sources import load_split
from mcsmoe.data.tasks import load_task
from mcsmoe.train.pretrain import build_switch
from mcsmoe.train.tokenizer import train_tokenizer
from mcsmoe.workflow import options

ROOT = Path(__file__).resolve().parents[1]

ARCHITECTURE = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "expert_capacity": 64,
    "router_jitter_noise": 0.0,
    "dropout_rate": 0.0,
}


class Place:
    """A model, its examples, and the stage scripts run on them by one or two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        task = load_task("COPA")
        source = {"kind": "synthetic", "train_rows": 49, "validation_rows": 16}
        texts: list[str] = []
        for name, split in (("train", "train"), ("selection", "validation")):
            examples = task.examples(load_split(source, task, split, 0), split, None)
            write_table(folder / f"{name}.parquet", examples, "examples")
            texts += examples["input"].tolist() + examples["target"].tolist()
        tokenizer = train_tokenizer(texts, 300, 8, True)
        save_model(build_switch(ARCHITECTURE, len(tokenizer), 0), folder / "base", tokenizer)

    def command(self, processes: int, script: str, *arguments: str) -> list[str]:
        launch = [*loaded.LAUNCH, "--processes", str(processes)]
        return [*launch, str(ROOT / "workflow_scripts" / f"{script}.py"), *map(str, arguments)]

    def run_forked(self, script: str, *arguments: str) -> None:
        """Two processes told of each other as the launcher tells them, but forked of the loaded process where there is one."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        started = [
            subprocess.Popen(
                self.command(1, script, *arguments),
                env={**self.environment(), **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                text=True,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in (0, 1)
        ]
        shown = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], "\n".join(shown)[-4000:]

    def run(self, processes: int, script: str, *arguments: str, expect: int = 0) -> str:
        done = subprocess.run(
            *(self.command(processes, script, *arguments),),
            env=self.environment(),
            text=True,
            timeout=300,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == expect, done.stdout[-4000:]
        return done.stdout

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def pretraining(self, name: str) -> list[str]:
        place = self.folder / name
        words = "--corpus synthetic --steps 8 --batch-size 8 --window 24 --vocab-size 300 --sentinels 8 --balance-weight 0.05"
        words += " --device cpu --save-every 3 --dropout --learning-rate 0.001 --warmup-steps 2"
        words += f" --model {place}/model --training {place}/training.parquet --state {place}/state"
        return ["--architecture", json.dumps(ARCHITECTURE), *words.split()]

    def training(self, name: str, model: str, **settings: Any) -> list[str]:
        """Command line of a training stage that writes below ``name``."""
        place = self.folder / name
        common = {
            "model": self.folder / model,
            "task": "COPA",
            "train": self.folder / "train.parquet",
            "selection": self.folder / "selection.parquet",
            "device": "cpu",
            "out": place / "model",
            "training": place / "training.parquet",
            "selected": place / "selected.parquet",
            "state": place / "state",
            "tokens": self.folder / "tokens",
            "log": place / "log",
            "max_input": 64,
            "max_label": 16,
            "steps": 8,
            "batch_size": 8,
            "learning_rate": 1.0e-3,
            "warmup_steps": 2,
            "select_every": 4,
            "save_every": 3,
            "dropout": True,
        }
        return options.as_flags({**common, **settings}).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("stages"))
    everything(made)
    return made


def everything(made: Place) -> None:
    """Every stage by one process and by two; those of fine-tuning are started by the launcher, as users start them."""
    run: Callable[..., object]
    for processes, run in ((1, partial(made.run, 1)), (2, made.run_forked)):
        run("prepare", *made.pretraining(f"based{processes}"))
        pruning = {"experts": 2, "groups": f"pruned{processes}/groups.parquet", "balance_weight": 0.05}
        run("prune", *made.training(f"pruned{processes}", "base", **pruning))
        made.run(processes, "finetune", *made.training(f"full{processes}", "base", balance_weight=0.05))
    limits = ("--max-input", "64", "--max-label", "16", "--tokens", "tokens")
    made.run(1, "cache_teacher", *f"--model full1/model --train train.parquet --out teacher {' '.join(limits)}".split())
    for processes, run in ((1, partial(made.run, 1)), (2, made.run_forked)):
        run("recover", *made.training(f"recovered{processes}", "full1/model", teacher="teacher"))
        compression = {"teacher": "teacher", "rank": 2, "keep": 0.25, "initial_fraction": 0.2, "final_fraction": 0.3}
        run("compress", *made.training(f"compressed{processes}", "full1/model", **compression))
        files = f"--table routing{processes}.parquet --statistics routing{processes}.safetensors"
        # Three batches: the second process has none in the last round.
        settings = "--samples 40 --batch-size 16 --reservoir 8 --whiten --device cpu"
        words = f"--model full1/model --train train.parquet {files} {settings} {' '.join(limits)}"
        run("collect_routing", *words.split())


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in load_model(folder).named_parameters()}


@pytest.mark.workflow
@pytest.mark.parametrize("stage", ["full", "pruned", "recovered", "compressed"])
def test_a_stage_gives_the_same_with_one_process_and_with_two(place: Place, stage: str) -> None:
    one, two = (place.folder / f"{stage}{processes}" for processes in (1, 2))
    assert largest_difference(weights(one / "model"), weights(two / "model")) < WEIGHTS
    curves = [read_table(folder / "training.parquet", "training").drop(columns="seconds") for folder in (one, two)]
    pd.testing.assert_frame_equal(*curves, rtol=0, atol=LOSSES)
    pd.testing.assert_frame_equal(*(read_table(folder / "selected.parquet", "selection") for folder in (one, two)))
    assert not (two / "state").exists()
    assert (two / "log").read_text().count("kept the state after step") == 1


@pytest.mark.workflow
def test_two_processes_pre_train_like_one(place: Place) -> None:
    one, two = (place.folder / f"based{processes}" for processes in (1, 2))
    assert largest_difference(weights(one / "model"), weights(two / "model")) < WEIGHTS
    curves = [read_table(folder / "training.parquet", "training").drop(columns="seconds") for folder in (one, two)]
    pd.testing.assert_frame_equal(*curves, rtol=0, atol=LOSSES)


@pytest.mark.workflow
def test_the_same_experts_fall_in_the_stage(place: Place) -> None:
    one, two = (read_table(place.folder / f"pruned{count}" / "groups.parquet", "groups") for count in (1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert (one.groupby("layer")["group"].nunique() == 2).all()


@pytest.mark.workflow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["recovered", "compressed"])
def test_recovery_and_compression_leave_routers_as_they_were(place: Place, stage: str, processes: int) -> None:
    before, after = (weights(place.folder / name / "model") for name in ("full1", f"{stage}{processes}"))
    routers = [name for name in before if ".router." in name]
    assert len(routers) == 2
    assert all(torch.equal(before[name], after[name]) for name in routers)
    assert any(not torch.equal(before[name], after[name]) for name in set(before) & set(after) - set(routers))


@pytest.mark.workflow
def test_two_processes_keep_the_rows_that_one_keeps(place: Place) -> None:
    one, two = (load_file(place.folder / f"compressed{count}" / "model" / "model.safetensors") for count in (1, 2))
    masks = {name: tensor for name, tensor in one.items() if name.endswith("row_index_N")}
    assert sum(len(rows) for rows in masks.values()) > 20
    assert all(torch.equal(rows, two[name]) for name, rows in masks.items())


@pytest.mark.workflow
def test_statistics_over_two_processes_are_those_of_one_pass(place: Place) -> None:
    one, two = (load_statistics(place.folder / f"routing{processes}.safetensors") for processes in (1, 2))
    assert list(one.layers) == list(two.layers)
    exact = {"valid_tokens", "wanted_E", "computed_E", "dropped_E", "saliency_tokens_E", "position"}
    for name, tensor in one.tensors().items():
        other = two.tensors()[name]
        if name == "settings" or name.rpartition("/")[2] in exact or "reservoir" in name:
            assert torch.equal(tensor, other), name
        else:
            assert tensor.dtype == torch.float64, name
            torch.testing.assert_close(other, tensor, rtol=1e-12, atol=1e-12, msg=name)
    tables = [read_table(place.folder / f"routing{processes}.parquet", "routing") for processes in (1, 2)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-12)


@pytest.mark.workflow
def test_a_split_is_tokenised_once(place: Place) -> None:
    kept = list((place.folder / "tokens").iterdir())
    assert [file.suffix for file in kept] == [".npz"]
    assert len(Tokenised.load(kept[0])) == 49


@pytest.mark.workflow
def test_two_killed_processes_end_with_their_launcher_and_resume_to_the_same(place: Place) -> None:
    settings = {"steps": 40, "save_every": 2, "balance_weight": 0.05}
    whole, killed = (place.training(name, "base", **settings) for name in ("whole", "killed"))
    place.run_forked("finetune", *whole)
    state = place.folder / "killed" / "state"
    with (place.folder / "killed.txt").open("w") as shown:
        process = subprocess.Popen(
            *(place.command(2, "finetune", *killed),), env=place.environment(), stdout=shown, stderr=shown
        )
        deadline = time.monotonic() + 120
        while not list(state.glob("step-*.safetensors")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        (together,) = children(process.pid)
        workers = children(together)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}/status").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(worker) for worker in workers)
    assert not (place.folder / "killed" / "model").exists()
    place.run_forked("finetune", *killed)
    assert "resuming after step" in (place.folder / "killed" / "log").read_text()
    for name in ("whole", "killed"):
        assert not (place.folder / name / "state").exists()
    one, other = weights(place.folder / "whole" / "model"), weights(place.folder / "killed" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.workflow
def test_an_error_is_one_message_and_ends_both(place: Place) -> None:
    shown = place.run(2, "finetune", *place.training("bad", "base", max_label=2), expect=1)
    assert "more than max_label (2)" in shown
    assert not (place.folder / "bad" / "model").exists()
