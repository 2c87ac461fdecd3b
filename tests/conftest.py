"""Shared fixtures: the optional folder of recorded numbers and real data, and one thread for reproducible bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the recorded numbers and real data; absent on most machines, and then the test is skipped."""
    folder = Path(os.environ.get("MCSMOE_SHARED", "../shared"))
    folder = folder if folder.is_absolute() else (ROOT / folder).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set MCSMOE_SHARED to the folder of recorded numbers and real data")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
