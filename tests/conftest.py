"""Shared fixtures: the optional folder of recorded numbers and real data, one thread, and what parallel workers share.

``make check`` leaves out the tests that ``slow.txt`` names. ``pytest --record-slow`` runs one after another what it is given
and writes that list anew.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from faults.project import Project

ROOT = Path(__file__).resolve().parents[1]
SLOW = Path(__file__).with_name("slow.txt")
QUICK = 0.25  # seconds of processor time, of the processes that a test starts too; the mean over its cases
LOADED: list[subprocess.Popen[bytes]] = []
"""Processes of which jobs are forks: the session's first process starts them, and the jobs of all its workers use them."""

# Before torch and numpy make their thread pools: sums in one order, and no worker takes the cores of another.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


# What a script starts in the background ignores interruptions, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-slow", action="store_true", help="write anew which of the tests that run are slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-slow"):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--record-slow measures one test at a time; leave out -n")
        config.pluginmanager.register(Stopwatch())
    if "PYTEST_XDIST_WORKER" not in os.environ:
        from faults import loaded

        LOADED.extend(loaded.start())


def pytest_unconfigure() -> None:
    while LOADED:
        process = LOADED.pop()
        process.kill()
        process.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run the workflow begin first: they take minutes, and the others fill what time is left on other workers."""
    slow = set(SLOW.read_text().split())
    for item in items:
        if function_of(item) in slow:
            item.add_marker("slow")
    minutes = {item.path for item in items if item.get_closest_marker("workflow")}
    items.sort(key=lambda item: item.path not in minutes)


def function_of(item: pytest.Item) -> str:
    """File and name of a test, whatever its parameters."""
    return item.nodeid.partition("[")[0]


class Stopwatch:
    """Takes the processor time of every test, and names the slow ones in ``slow.txt``."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.skipped: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = sum(os.times()[:4])
        result = yield
        if not any(item.get_closest_marker(minutes) for minutes in ("workflow", "families")):
            self.seconds[function_of(item)].append(sum(os.times()[:4]) - before)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped.add(report.nodeid.partition("[")[0])

    def pytest_sessionfinish(self) -> None:
        others = set(SLOW.read_text().split()) - (set(self.seconds) - self.skipped)
        slow = {name for name, taken in self.seconds.items() if sum(taken) / len(taken) > QUICK}
        SLOW.write_text("".join(f"{name}\n" for name in sorted(others | slow)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the recorded numbers and real data; absent on most machines, and then the test is skipped."""
    folder = Path(os.environ.get("MCSMOE_SHARED", "../shared"))
    folder = folder if folder.is_absolute() else (ROOT / folder).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set MCSMOE_SHARED to the folder of recorded numbers and real data")
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``made_once(name, make)``: a folder that ``make`` fills once a session, whichever worker asks first. Read only."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made once"

    def made(name: str, make: Callable[[Path], object]) -> Path:
        place.mkdir(exist_ok=True)
        folder, done = place / name, place / f".{name}.done"
        with FileLock(place / f".{name}.lock"):
            if not done.exists():
                if folder.exists():
                    pytest.fail(f"{name} was tried before, and failed")
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def finished(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Project:
    """The tiny workflow after it ran to its end. Shared by all workers: read only."""
    from faults.project import Project

    def make(folder: Path) -> None:
        output = Project(folder / "a clone", alone=True).run("--verbose")
        assert "MLflow:" in output
        assert "report.html" in output
        # Snakemake looks for jobs to start when one has ended, and not all the time.
        assert 0 < output.count("Ready jobs:") <= 2 * output.count("Finished jobid:")

    return Project(made_once("work flow", make) / "a clone")


@pytest.fixture(autouse=True)
def _made_before_is_left_alone() -> None:
    """Collections of garbage, of which every pass makes one a layer, leave out what libraries made while they loaded."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
