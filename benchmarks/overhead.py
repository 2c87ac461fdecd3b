"""The workflow's overhead: what a job costs before its own work begins, and what Snakemake takes between two jobs.

A stage that imports what a training stage imports and then does nothing is started as the workflow starts its jobs: as a
fork of the process with the libraries loaded, and in an interpreter of its own, in turn. Then a whole workflow is run one job
at a time, in both ways: what it takes beyond the sum of its jobs is Snakemake's. The limit below which no job can be is
that of an interpreter which does nothing at all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mcsmoe.console import parser, progress, run  # noqa: E402
from mcsmoe.workflow import forkserver  # noqa: E402

LAUNCH = [sys.executable, "-S", "-E", str(ROOT / "mcsmoe" / "workflow" / "launch.py")]
EMPTY = """
from mcsmoe import console
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.train import loop, objectives, stages
from transformers import SwitchTransformersForConditionalGeneration
"""


def arguments() -> argparse.ArgumentParser:
    made = parser((__doc__ or "").strip(), "python benchmarks/overhead.py --repeats 7 --config config.yaml")
    made.add_argument("--repeats", type=int, default=7, help="starts of the empty stage, each way")
    made.add_argument("--config", type=Path, help="also run this workflow, one job at a time, each way")
    return made


@contextmanager
def fork_server() -> Iterator[dict[str, str]]:
    """Environment in which jobs are forks of a process that has the libraries loaded."""
    os.environ.pop("MCSMOE_FORKSERVER", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    forkserver.start()
    try:
        yield dict(os.environ)
    finally:
        forkserver.stop()


def job(script: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and processor seconds of one job, launcher included."""
    usage = script.with_suffix(".tsv")
    before, start = os.times(), time.perf_counter()
    subprocess.run([*LAUNCH, "--usage", str(usage), str(script)], env=environment, check=True)
    wall, after = time.perf_counter() - start, os.times()
    launcher = after.children_user + after.children_system - before.children_user - before.children_system
    if not environment["MCSMOE_FORKSERVER"]:
        return wall, launcher  # the job is below the launcher
    return wall, launcher + float(usage.read_text().split()[-1])


def starts(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder, fork_server() as forked:
        empty, nothing = Path(folder) / "empty.py", Path(folder) / "nothing.py"
        empty.write_text(EMPTY)
        nothing.write_text("")
        own = forked | {"MCSMOE_FORKSERVER": ""}
        job(empty, forked)  # loads the libraries
        ways = {"fork": (empty, forked), "own interpreter": (empty, own), "own interpreter, no imports": (nothing, own)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in progress(range(repeats), "starts"):
            for name, way in ways.items():
                found[name].append(job(*way))
        for name, pairs in found.items():
            wall, processor = zip(*pairs, strict=True)
            print(
                f"a job that only imports, {name}: {statistics.median(wall):.2f} s ({min(wall):.2f} to {max(wall):.2f}), "
                f"{statistics.median(processor):.2f} s of processor time"
            )
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found["own interpreter"], found["fork"], strict=True))
        print(f"an interpreter of its own over a fork: {ratio:.1f} times")


def workflow(config: Path) -> None:
    for name, change in (("forks", {}), ("own interpreters", {"MCSMOE_FORKSERVER": ""})):
        environment = {key: value for key, value in os.environ.items() if key != "MCSMOE_FORKSERVER"} | change
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "snakemake", "--cores", "1", "--directory", folder]
            command += ["--snakefile", str(ROOT / "Snakefile"), "--configfile", str(config.resolve())]
            start = time.perf_counter()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            wall = time.perf_counter() - start
            used = [file.read_text().split()[-5:] for file in Path(folder).rglob("benchmarks/**/*.tsv")]
        jobs, processor = sum(float(row[0]) for row in used), sum(float(row[-1]) for row in used)
        print(
            f"{config.name}, {len(used)} jobs, one at a time, {name}: {wall:.0f} s; the jobs themselves {jobs:.0f} s "
            f"({processor:.0f} s of processor time); Snakemake {(wall - jobs) / len(used):.2f} s a job"
        )


def main(options: argparse.Namespace) -> None:
    starts(options.repeats)
    if options.config:
        workflow(options.config)


if __name__ == "__main__":
    run(main, arguments().parse_args())
