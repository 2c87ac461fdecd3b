"""A copy of the project that runs its workflow for real, and when the results of two of them are the same."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mcsmoe.artefacts.digests import check_seal, check_sums
from mcsmoe.artefacts.tables import MEASURED

from . import loaded

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["Snakefile", "mcsmoe", "rules", "workflow_scripts", "profiles", "envs", "config.yaml"]
TINY: dict[str, Any] = yaml.safe_load((ROOT / "tests" / "tiny_workflow.yaml").read_text())

IGNORED = {
    "logs/*": "times of day",
    "benchmarks/*": "wall and processor seconds, memory",
    "mlflow.db": "run identifiers are random, times are of the clock; its content is compared by run, name and value",
    "mlartifacts/*": "folders carry the random run identifiers; tables in them are the parquet tables compared here",
    "published.json": "names the random run identifiers",
    "report.html": "shows seconds, latencies and memory",
    ".lock": "empty, marks a running workflow",
}
"""Files of a results folder that two runs need not share, by pattern, and why. Nothing else is left out."""

OPTIONAL = ".state/tokens/"
"""A cache named by its content: a run that finds a stage finished needs no tokens for it. Those of both are compared."""

AT_THE_END = ("summary.parquet",)
"""What is made of everything."""

IGNORED_COLUMNS = dict.fromkeys(MEASURED, "measured by a clock or a scale")
"""Columns of parquet tables that two runs need not share."""


class Project:
    """A copy of the project in a folder with a space in its name, with a configuration of its own.

    ``alone``: its workflow starts its own processes with the libraries loaded, as users' do, and not those of the tests.
    """

    def __init__(self, place: Path, config: dict[str, Any] | None = None, alone: bool = False) -> None:
        self.place = place
        self.left_out = {"MLFLOW_TRACKING_URI", *(["MCSMOE_FORKSERVER"] if alone else [])}
        if (place / "Snakefile").is_file():
            return
        place.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                # With what is compiled, and the times it is valid for.
                shutil.copytree(source, place / part)
            else:
                shutil.copy(source, place / part)
        self.configure(config or TINY)

    def configure(self, config: dict[str, Any]) -> None:
        (self.place / "config.yaml").write_text(yaml.safe_dump(config))

    @property
    def results(self) -> Path:
        return self.place / "results"

    def start(self, *arguments: str, output: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start the workflow as the leader of a session of its own."""
        program = loaded.PLAN if "--dry-run" in arguments else [sys.executable, "-m", "snakemake"]
        command = [*program, "--cores", "2", *arguments]
        environment = {key: value for key, value in os.environ.items() if key not in self.left_out}
        return subprocess.Popen(
            command,
            cwd=self.place,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, expect: int = 0) -> str:
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=900)
        finally:
            kill(process)
        logs = "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in self.results.glob("logs/**/*.log"))
        assert process.returncode == expect, f"{output[-4000:]}\n{logs[-4000:] if expect == 0 else ''}"
        return output

    def planned(self) -> dict[str, int]:
        """Jobs per rule that a run would do now."""
        output = self.run("--dry-run", "--quiet", "rules")
        if "Nothing to be done" in output:
            return {}
        counts = re.findall(r"^(\w+)\s+(\d+)\s*$", output, re.MULTILINE)
        return {rule: int(count) for rule, count in counts if rule not in ("total", "all")}

    def kill_when(self, ready: Callable[[], bool], *arguments: str) -> None:
        """Start the workflow and end its whole process group without warning as soon as ``ready`` says so."""
        process = self.start(*arguments)
        deadline = time.monotonic() + 300
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.003)
        assert process.poll() is None, f"it ended before it could be killed:\n{process.communicate()[0][-3000:]}"
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process group that ``process`` leads."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout:
        process.stdout.close()


# -- comparing ---------------------------------------------------------------------------------------------------
def tables(project: Project) -> dict[str, Path]:
    return {str(path.relative_to(project.results)): path for path in sorted(project.results.rglob("*.parquet"))}


def compared(results: Path) -> dict[str, Path]:
    """Every file of a results folder that two runs must share."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results).as_posix()
        if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED):
            found[name] = path
    return found


def differences(one: Path, other: Path, ended: bool = True) -> list[str]:
    """What differs between two results folders, bit by bit, apart from ``IGNORED`` and ``IGNORED_COLUMNS``.

    ``ended``: the other ran to its end too; else it need not have what is made of everything at the end.
    """
    left, right = compared(one), compared(other)
    only = [name for name in sorted(set(left) ^ set(right)) if not name.startswith(OPTIONAL)]
    if not ended:
        only = [name for name in only if name not in AT_THE_END]
    found = [f"{name} is only in {one if name in left else other}" for name in only]
    for name in sorted(set(left) & set(right)):
        if left[name].read_bytes() == right[name].read_bytes():
            continue
        if not name.endswith(".parquet"):
            found.append(f"{name} differs")
            continue
        tables = [pq.read_table(path) for path in (left[name], right[name])]
        measured = [column for column in tables[0].column_names if column in IGNORED_COLUMNS]
        if not measured or len({as_bytes(table.drop_columns(measured)) for table in tables}) > 1:
            found.append(f"{name} differs")
    if not ended:
        return found
    found += [f"{name} is missing" for name in ("report.html", "published.json") if not (other / name).is_file()]
    if (one / "mlflow.db").is_file() and published(one) != published(other):
        found.append("the runs in mlflow.db differ")
    return found


def as_bytes(table: pa.Table) -> bytes:
    """The content of a table, the same for the same bits, NaN included."""
    sink = pa.BufferOutputStream()
    table = table.combine_chunks().replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def published(results: Path) -> list[tuple[str, str, str, str]]:
    """(run's key, kind, name, value) of all that is tracked and not measured; sorted."""
    with sqlite3.connect(f"file:{results / 'mlflow.db'}?mode=ro", uri=True) as connection:
        keys = dict(connection.execute("SELECT run_uuid, value FROM tags WHERE key = 'workflow.key'").fetchall())
        rows = [
            (keys[run], "status", "", f"{status} {stage}")
            for run, status, stage in connection.execute("SELECT run_uuid, status, lifecycle_stage FROM runs")
        ]
        for kind in ("params", "latest_metrics"):
            values = connection.execute(f"SELECT run_uuid, key, value FROM {kind}").fetchall()
            rows += [(keys[run], kind, name, repr(value)) for run, name, value in values]
    connection.close()
    return sorted(row for row in rows if row[2].rpartition("/")[2] not in IGNORED_COLUMNS)


def same_results(one: Project, other: Project, ended: bool = True) -> None:
    """Checkpoints, statistics and tables agree bit by bit, apart from what is measured; ``ended`` as ``differences``."""
    assert sum(name.endswith(".safetensors") for name in compared(one.results)) > 8
    assert differences(one.results, other.results, ended) == []


# -- half-made artefacts -----------------------------------------------------------------------------------------
def artefacts(results: Path) -> Iterator[Path]:
    """What stands under a final name in a results folder: parquet and safetensors files, folders with digests."""
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results)
        if any(part.startswith(".") and part != ".state" for part in name.parts):
            continue
        sealed_folder = any((parent / "SHA256SUMS").is_file() for parent in path.parents)
        if (path / "SHA256SUMS").is_file() or (
            path.suffix in (".parquet", ".safetensors") and path.is_file() and not sealed_folder
        ):
            yield path


def half_made(results: Path) -> list[str]:
    """Artefacts under a final name that are not whole; none at any moment, whatever was killed."""
    found = []
    for path in artefacts(results):
        try:
            if path.is_dir():
                check_sums(path)
            else:
                check_seal(path)
                if path.suffix == ".parquet":
                    pq.read_table(path)
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def leftovers(results: Path) -> list[Path]:
    """Unfinished artefacts that killed processes left under names that nothing reads."""
    return sorted(path for path in results.rglob(".*") if re.match(r"\..*\.(partial|replaced)-", path.name))
