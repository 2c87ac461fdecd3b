"""How jobs are started: a fork of the loaded process behaves as a process of its own, and ends with those it serves."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from faults import loaded

from mcsmoe.workflow import forkserver

pytestmark = pytest.mark.workflow
ROOT = Path(__file__).resolve().parents[1]

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="jobs are forked on Linux only")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Name of a process with the libraries loaded."""
    patch = pytest.MonkeyPatch()
    patch.delenv("MCSMOE_FORKSERVER", raising=False)
    forkserver.start()
    yield os.environ["MCSMOE_FORKSERVER"]
    forkserver.stop()
    assert "MCSMOE_FORKSERVER" not in os.environ
    patch.undo()


@pytest.fixture(params=["forked", "own"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Environment of a job, once with a loaded process to be forked from and once without."""
    if request.param == "own":
        return os.environ | {"MCSMOE_FORKSERVER": ""}
    if not sys.platform.startswith("linux"):
        pytest.skip("jobs are forked on Linux only")
    return os.environ | {"MCSMOE_FORKSERVER": request.getfixturevalue("server")}


def run(script: Path | str, *words: str, env: dict[str, str], **more: object) -> subprocess.CompletedProcess[str]:
    command = [*loaded.LAUNCH, *words[: words.index("--") if "--" in words else 0], str(script)]
    command += words[words.index("--") + 1 if "--" in words else 0 :]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload, no-any-return]


def script(folder: Path, text: str) -> Path:
    path = folder / "job.py"
    path.write_text(text)
    return path


def parent_is_loaded(env: dict[str, str]) -> bool:
    return bool(env["MCSMOE_FORKSERVER"])


def test_a_job_gets_the_words_folder_environment_and_streams_of_its_launcher(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    job = script(
        tmp_path,
        "import json, os, sys\n"
        "sys.stderr.write('to error')\n"
        "known = 'transformers' in sys.modules\n"
        "import beside\n"
        "print(json.dumps([sys.argv, os.getcwd(), os.environ['MINE'], sys.stdin.read(), __name__, beside.HERE, known]))\n",
    )
    (tmp_path / "beside.py").write_text("HERE = 1\n")
    folder = tmp_path / "a folder"
    folder.mkdir()
    env = environment | {"MINE": "ä b"}
    done = run(job, "--", "--one", "two three", env=env, cwd=folder, input="from in")
    assert (done.returncode, done.stderr) == (0, "to error")
    expected = [[str(job), "--one", "two three"], str(folder), "ä b", "from in", "__main__", 1]
    assert json.loads(done.stdout) == [*expected, parent_is_loaded(environment)]


@linux
def test_where_nothing_is_measured_no_process_waits_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = script(tmp_path, "import sys\nprint('transformers' in sys.modules)\n")
    monkeypatch.delenv("MCSMOE_FORKSERVER", raising=False)
    monkeypatch.setattr(forkserver, "_STARTED", [])
    forkserver.start(measured=False)
    try:
        assert len(forkserver._STARTED) == 1
        assert run(job, "--measured", "--", env=dict(os.environ)).stdout == "False\n"
    finally:
        forkserver.stop()


@linux
def test_a_light_job_waits_for_no_library_and_takes_those_that_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = script(tmp_path, "import os, sys\nprint('transformers' in sys.modules, 'scipy.stats' in sys.modules)\n")
    monkeypatch.delenv("MCSMOE_FORKSERVER", raising=False)
    monkeypatch.setattr(forkserver, "_STARTED", [])  # another one than that of the other tests
    forkserver.start()
    try:
        env = dict(os.environ)
        for _ in range(2):
            assert run(job, "--light", "--", env=env).stdout.split() == ["False", "False"]
        assert psutil.Process(forkserver._STARTED[0].pid).memory_info().rss < 100e6  # nor is anything loaded for it
        assert run(job, env=env).stdout.split()[0] == "True"
        deadline = time.monotonic() + 60
        while (found := run(job, "--light", "--", env=env).stdout.split()) != ["True", "True"]:
            assert found == ["False", "False"]
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        forkserver.stop()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("raise SystemExit('in words')", 1),
        ("raise ValueError('in words')", 1),
        ("import atexit\natexit.register(lambda: __import__('sys').stderr.write('in words'))", 0),
        ("import weakref, sys\nweakref.finalize(sys, sys.stderr.write, 'in words')", 0),
        (
            "import sys, threading, time\n"
            "threading.Thread(target=lambda: (time.sleep(0.5), sys.stderr.write('in words'))).start()",
            0,
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
    ],
)
def test_the_status_is_the_jobs_and_only_success_leaves_what_it_used(
    tmp_path: Path, environment: dict[str, str], text: str, status: int
) -> None:
    usage = tmp_path / "new" / "usage.tsv"
    done = run(script(tmp_path, text), "--usage", str(usage), "--", env=environment)
    assert done.returncode == status
    assert ("in words" in done.stderr) == ("in words" in text)
    assert usage.is_file() == (status == 0)


def test_what_a_job_used_is_what_it_did(tmp_path: Path, environment: dict[str, str]) -> None:
    megabytes = 700
    job = script(
        tmp_path,
        "import time\n"
        f"held = bytearray({megabytes} * 2**20)\n"
        f"for at in range(0, len(held), 4096): held[at] = 1\n"
        "until = time.process_time() + 0.5\n"
        "while time.process_time() < until: pass\n"
        "time.sleep(0.3)\n",
    )
    usage = tmp_path / "usage.tsv"
    assert run(job, "--usage", str(usage), "--", env=environment).returncode == 0
    row = pd.read_csv(usage, sep="\t").iloc[0]
    assert 0.5 <= row["cpu_time"] < row["s"]
    assert row["s"] >= 0.8
    assert megabytes < row["max_rss"] < megabytes + 900
    assert row["mean_load"] == pytest.approx(100 * row["cpu_time"] / row["s"], abs=2)


def test_the_benchmark_of_overheads_starts_jobs_as_the_workflow_does(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    wall, processor = runpy.run_path(str(ROOT / "benchmarks" / "overhead.py"))["job"](script(tmp_path, ""), environment)
    assert 0 < wall < 60
    assert 0 < processor < 60


@linux
def test_nothing_of_a_job_reaches_the_next(tmp_path: Path, server: str) -> None:
    env = os.environ | {"MCSMOE_FORKSERVER": server}
    spoil = "import os, random, torch\nos.environ['SPOILT'] = '1'\nos.chdir('/')\ntorch.spoilt = True\ntorch.manual_seed(7)\n"
    look = "import os, torch\nprint(hasattr(torch, 'spoilt'), 'SPOILT' in os.environ, torch.initial_seed())\n"
    first = run(script(tmp_path, look), env=env).stdout
    assert run(script(tmp_path, spoil), env=env).returncode == 0
    assert run(script(tmp_path, look), env=env).stdout == first
    assert first.startswith("False False ")


@linux
@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["--", "--threads", "2"], {}),
        ([], {"PYTHONPATH": "/elsewhere"}),
        ([], {"HF_HOME": "/elsewhere"}),
        ([], {"MCSMOE_FORKSERVER": "mcsmoe-gone"}),
    ],
)
def test_a_job_that_would_differ_gets_a_process_of_its_own(
    tmp_path: Path, server: str, words: list[str], change: dict[str, str]
) -> None:
    job = script(tmp_path, "import sys; print('transformers' in sys.modules)")
    env = os.environ | {"MCSMOE_FORKSERVER": server}
    assert run(job, env=env).stdout == "True\n"
    assert run(job, *words, env=env | change).stdout == "False\n"


def waiting_job(tmp_path: Path, server: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A launcher, and its job that waits."""
    job = script(tmp_path, "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)")
    told = tmp_path / "pid"
    launcher = subprocess.Popen(
        [*loaded.LAUNCH, str(job), str(told)], env=os.environ | {"MCSMOE_FORKSERVER": server}, start_new_session=True
    )
    until(lambda: told.is_file() and told.read_text() != "")
    return launcher, psutil.Process(int(told.read_text()))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@linux
@pytest.mark.parametrize("forked", [True, False])
def test_a_job_ends_with_its_launcher(tmp_path: Path, server: str, forked: bool) -> None:
    launcher, job = waiting_job(tmp_path, server if forked else "")
    assert (job.name() == "job") == forked
    launcher.kill()
    launcher.wait()
    until(lambda: gone(job))


@linux
def test_a_job_ends_with_its_watcher_and_has_not_succeeded(tmp_path: Path, server: str) -> None:
    launcher, job = waiting_job(tmp_path, server)
    watcher = job.parent()
    assert watcher is not None
    watcher.kill()
    until(lambda: gone(job))
    assert launcher.wait(timeout=60) == 128 + signal.SIGKILL


@linux
def test_the_loaded_process_ends_when_the_workflow_is_killed(tmp_path: Path) -> None:
    workflow = script(
        tmp_path,
        "import os, time\n"
        "from mcsmoe.workflow import forkserver\n"
        "forkserver.start()\n"
        "print(forkserver._STARTED[0].pid, flush=True)\n"
        "time.sleep(300)\n",
    )
    env = {name: value for name, value in os.environ.items() if name != "MCSMOE_FORKSERVER"}
    process = subprocess.Popen([sys.executable, str(workflow)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    loaded = psutil.Process(int(process.stdout.readline()))
    assert loaded.is_running()
    process.kill()
    process.wait()
    until(lambda: gone(loaded))


@linux
def test_a_forked_stage_writes_the_same_bits(tmp_path: Path, server: str) -> None:
    size = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_experts": 4}
    for name in (server, ""):
        folder = tmp_path / (name or "own")
        folder.mkdir()
        words = ["--corpus", "synthetic", "--steps", "6", "--vocab-size", "600", "--architecture", json.dumps(size)]
        words += ["--model", "base", "--training", "base.parquet", "--state", "state", "--device", "cpu"]
        done = run(
            ROOT / "workflow_scripts" / "prepare.py",
            "--",
            *words,
            env=os.environ | {"MCSMOE_FORKSERVER": name},
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    forked, own = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "base").iterdir()} for name in (server, "own")
    )
    assert forked == own
    assert "model.safetensors" in own


def test_an_empty_plan_is_said_in_words() -> None:
    """Under ``--until`` Snakemake counts the jobs beyond and shows a table of no jobs."""
    import logging

    from mcsmoe.workflow.run import say_when_nothing_is_planned

    logger = logging.getLogger("snakemake.logging")
    said: list[str] = []
    before, level, handler = list(logger.filters), logger.level, logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        say_when_nothing_is_planned()
        logger.info("Job stats: 1", extra={"stats": {"merge": 1, "total": 1}})
        assert said == ["Job stats: 1"]
        logger.info("Job stats: 0", extra={"stats": {"total": 0}})
        assert said[1].startswith("Nothing to be done")
    finally:
        logger.filters = before
        logger.setLevel(level)
        logger.removeHandler(handler)
