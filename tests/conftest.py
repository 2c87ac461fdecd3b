"""Shared fixtures: the optional folder of recorded numbers and real data, one thread, and what parallel workers share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]

# Before torch and numpy make their thread pools: sums in one order, and no worker takes the cores of another.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first; a module's tests stay with one worker, and its fixtures, unless they say otherwise."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            part = " workflow" if item.get_closest_marker("workflow") else ""
            item.add_marker(pytest.mark.xdist_group(item.path.stem + part))


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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
