"""Processes with the libraries loaded, of which the jobs of all copies of the project in a session of tests are forks.

A workflow starts its own, which takes as much processor time as all jobs of the smallest one. Here the search path is the
only thing that may differ between a job and the one that started the processes: a job has its own, and its own modules of ours.
What a workflow does with its own is seen where it runs undisturbed (``finished``), where it is killed, and in ``test_jobs``.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from mcsmoe.workflow import forkserver

NAME, PATHS = "MCSMOE_FORKSERVER", "PYTHONPATH"
LIBRARIES = sys.path[1 + len(os.environ.get(PATHS, "").split(os.pathsep)) if os.environ.get(PATHS) else 1 :]
"""Where the interpreter looks once what a script and its environment add is left out."""

LIBRARIES_OF_TESTS = ["mlflow", "mlflow.store.tracking.sqlalchemy_store", "snakemake.cli", "snakemake.api"]
"""What they load beside: publishing and planning begin at once, too."""

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-S", "-E", str(ROOT / "mcsmoe" / "workflow" / "launch.py")]
"""How a script is started as a fork of them, or by itself where there are none: before it and its words."""

PLAN = [*LAUNCH, "--light", str(Path(sys.executable).with_name("snakemake"))]
"""Snakemake for a dry run, which starts no process of its own."""

alike, become = forkserver.alike, forkserver.become


def alike_elsewhere(request: dict[str, Any]) -> bool:
    """As a workflow's own, but for the search path."""
    return alike({**request, "environment": {**request["environment"], PATHS: os.environ.get(PATHS)}})


def become_elsewhere(request: dict[str, Any], streams: list[int], watcher: int) -> None:
    """As in a workflow's own; then nothing of ours is imported yet, and the job's search path is what it would be."""
    become(request, streams, watcher)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mcsmoe"]:
        del sys.modules[name]
    own = request["environment"].get(PATHS, "")
    sys.path[1:] = [*(own.split(os.pathsep) if own else []), *LIBRARIES]


def start() -> list[subprocess.Popen[bytes]]:
    """Start the processes and name them to all jobs of this process and of those it starts; they end with it.

    Nothing is started where the system cannot do it, or where they are named already, and be it by nothing.
    """
    if not sys.platform.startswith("linux") or NAME in os.environ:
        return []
    os.environ[NAME] = name = f"mcsmoe-tests-{secrets.token_hex(16)}"
    started = forkserver.listening(name, measured=True, program=__file__)
    assert len(started) == 2, "the processes for the jobs of all workflows did not start"
    return started


if __name__ == "__main__":
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    forkserver.LIBRARIES_LATER.extend(LIBRARIES_OF_TESTS)
    forkserver.alike, forkserver.become = alike_elsewhere, become_elsewhere
    forkserver.main()
