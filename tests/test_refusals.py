"""Places that two processes want, interruptions at every moment, and errors that are told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcsmoe import refusals
from mcsmoe.artefacts import atomic
from mcsmoe.tracking.address import embedded_uri, store_name, without_credentials

ROOT = Path(__file__).resolve().parents[1]


def started(code: str, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


CLAIM = """
import sys, time
from mcsmoe.artefacts.atomic import claimed
with claimed(sys.argv[1]):
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_claim_keeps_others_out_and_goes_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    holder = started(CLAIM, out)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "claimed\n"
    with pytest.raises(ValueError, match=r"out: another command is writing there"), atomic.claimed(out):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with atomic.claimed(out):  # the lock file of a killed process holds nobody up
        pass
    assert not list(out.parent.iterdir()) if out.parent.exists() else True
    with atomic.claimed(tmp_path / "new" / "folder" / "out"):
        pass
    assert not (tmp_path / "new").exists(), "a claim that came to nothing leaves no folder"


def test_a_place_below_a_file_or_of_an_endless_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"cannot be written"), atomic.claimed(out):
            pass


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with atomic.atomic_directory(out) as folder:
            (folder / "mine").write_text("mine")
            out.mkdir()
            (out / "theirs").write_text("theirs")

    with pytest.raises(ValueError, match=r"has appeared or changed"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_an_interruption_between_the_two_moves_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    real, moves = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt), atomic.atomic_directory(out) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_what_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    import socket

    gone = started("pass")
    gone.wait()
    assert gone.stdout is not None
    gone.stdout.close()
    aside = tmp_path / f".out.replaced-{socket.gethostname()}-{gone.pid}"
    aside.mkdir()
    (aside / "old").write_text("old")
    with atomic.claimed(tmp_path / "out"):
        assert (tmp_path / "out" / "old").read_text() == "old"


STAGE = """
import argparse, sys, time
from pathlib import Path
from mcsmoe import console
from mcsmoe.artefacts.atomic import atomic_directory
def stage(arguments):
    try:
        with atomic_directory(sys.argv[1]) as folder:
            (folder / "half").write_text("x")
            print("working", flush=True)
            time.sleep(60)
    except BaseException:
        if "translated" in sys.argv:
            raise RuntimeError("a library made this of it") from None
        raise
console.run(stage, argparse.Namespace(threads=1, log=None))
"""


@pytest.mark.parametrize("more", [[], ["translated"]])
def test_an_interruption_is_one_line_and_leaves_nothing(tmp_path: Path, more: list[str]) -> None:
    process = started(STAGE, tmp_path / "out", *more)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert text.strip().endswith("interrupted")
    assert len(text.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_interruption_while_libraries_load_is_one_line() -> None:
    code = "from mcsmoe import console\nconsole.parser('p', 'e')\nprint('loading', flush=True)\nimport time\ntime.sleep(60)"
    process = started(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert text == "interrupted\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("samples", 0), ("batch_size", -1), ("keep", float("nan")), ("keep", 1.5), ("learning_rate", float("inf"))),
        *(("seed", -1), ("seed", 2**31), ("rank", 0), ("threads", 10**11), ("recover", -5), ("anything", 10**30)),
    ],
)
def test_numbers_that_no_option_can_be(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} is "):
        refusals.check_numbers({name: value})


def test_errors_of_what_was_read_are_the_users() -> None:
    import jinja2
    import safetensors

    assert refusals.users_error(ValueError("a\nb")) == "a b"
    assert refusals.users_error(IsADirectoryError(21, "Is a directory", "x")) == "x: Is a directory"
    for error in (RecursionError(), MemoryError(), safetensors.SafetensorError("x"), jinja2.UndefinedError("x")):
        assert "\n" not in str(refusals.users_error(error))
        assert refusals.users_error(error)
    for defect in (TypeError("x"), KeyError("x"), RuntimeError("x"), AssertionError()):
        assert refusals.users_error(defect) is None


def test_the_store_of_runs_is_named_without_what_is_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_name(tmp_path) == "embedded"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", embedded_uri(tmp_path))
    assert store_name(tmp_path) == "embedded"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host:8/ml?token=secret")
    assert store_name(tmp_path) == "https://host:8/ml"
    assert without_credentials("sqlite:////a/b c.db") == "sqlite:////a/b c.db"
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI is not an address"):
        without_credentials("http://[")
