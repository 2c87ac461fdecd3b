"""Fill a small file system in the middle of a save of every kind of artefact, and in the middle of the workflow.

Needs the right to mount a file system (root); nothing outside the mounted folders is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from .project import Project, differences, half_made, kill, leftovers
from .specimens import SPECIMENS, Specimen, content

EXAMPLE = "python -m tests.faults.disk --report disk"
PAGE = 4096
_BALLAST = "ballast"


class NotPermitted(Exception):
    """This user may not mount a file system here."""


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of so many megabytes, mounted at a new folder and gone after it.

    Raises:
        NotPermitted: this user may not mount one.
    """
    place = Path(tempfile.mkdtemp(prefix="mcsmoe disk "))
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotPermitted(f"a file system cannot be mounted here: {done.stderr.strip()}")
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()


def fill(disk: Path, left: int) -> None:
    """Take all space but ``left`` bytes, rounded to pages."""
    free(disk)
    room = os.statvfs(disk)
    size = room.f_bavail * room.f_frsize - left // PAGE * PAGE
    with (disk / _BALLAST).open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(PAGE, size))


def free(disk: Path) -> None:
    """Give the space back."""
    (disk / _BALLAST).unlink(missing_ok=True)


@dataclass(frozen=True)
class Outcome:
    """What became of one save on a full disk."""

    kind: str
    left: int  # bytes that were free
    outcome: str
    message: str = ""


def one_save(kind: str, specimen: Specimen, disk: Path, share: float) -> Outcome:
    """Replace an artefact with room for only ``share`` of it; then again with room enough."""
    free(disk)
    work = disk / "work"
    shutil.rmtree(work, ignore_errors=True)
    path = work / specimen.name
    specimen.write(path, 0)
    before = content(specimen, work)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    left = int(size * share)
    fill(disk, left)
    try:
        specimen.write(path, 1)
    except ValueError as error:
        message = str(error)
    except Exception as error:
        return Outcome(kind, left, f"defect: {type(error).__name__}", str(error))
    else:
        return Outcome(kind, left, "no error")
    if str(path) not in message or "free some space" not in message:
        return Outcome(kind, left, "not named", message)
    if content(specimen, work) != before:
        return Outcome(kind, left, "what was there is lost", message)
    if leftovers(work):
        return Outcome(kind, left, "half an artefact is left", message)
    free(disk)
    specimen.write(path, 1)
    after = content(specimen, work)
    return Outcome(kind, left, "refused, intact, then written" if after != before else "not written again", message)


GOOD = ("refused, intact, then written",)


def saves(disk: Path) -> Iterator[Outcome]:
    """Every kind of artefact, with no room, and with room for a third and for two thirds of it."""
    for kind, specimen in SPECIMENS.items():
        for share in (0.0, 0.33, 0.66):
            yield one_save(kind, specimen, disk, share)


# -- the workflow ------------------------------------------------------------------------------------------------
def workflow(work: Path, reference: Project, left: int) -> Outcome:
    """Run the workflow with so many bytes for its results, free the disk, and run it again to the end."""
    with small_disk(64) as disk:
        project = Project(work / f"full-disk-{left}")
        # The folder is the configured one; only what it lies on is small.
        project.results.symlink_to(disk, target_is_directory=True)
        fill(disk, left)
        process = project.start()
        _running.append(process)
        output, _ = process.communicate(timeout=600)
        kind = "workflow"
        if process.returncode == 0:
            return Outcome(kind, left, "finished in so little")
        told = [line for line in output.splitlines() if re.search(r"No space left|cannot be written", line)]
        if half := half_made(disk):
            return Outcome(kind, left, "half an artefact is left", "; ".join(half))
        free(disk)
        output = project.run()
        found = differences(reference.results, disk) + [str(path) for path in leftovers(disk)]
        if found:
            return Outcome(kind, left, "differs", "; ".join(found))
        return Outcome(kind, left, GOOD[0], told[-1].strip() if told else "no message")


_running: list[subprocess.Popen[str]] = []


def _stop(*_: Any) -> None:
    for process in _running:
        kill(process)
    sys.exit("stopped")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.disk",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--left", type=int, nargs="*", default=[], help="bytes that the workflow finds; one run for each"
    )
    parser.add_argument("--no-saves", action="store_true", help="leave out the saves of single artefacts")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mcsmoe-disk"), help="folder (default: %(default)s)")
    parser.add_argument("--reference", type=Path, help="project with finished results (default: one is run)")
    parser.add_argument("--report", type=Path, default=Path("disk"), help="written: this name with .parquet and .md")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, _stop)
    found: list[Outcome] = []
    try:
        with small_disk(16) as disk:
            if not arguments.no_saves:
                found += list(tqdm(saves(disk), total=3 * len(SPECIMENS), desc="saves"))
    except NotPermitted as error:
        sys.exit(str(error))
    if arguments.left:
        reference = Project(arguments.reference or arguments.work / "reference")
        if not (reference.results / "published.json").is_file():
            reference.run()
        for left in tqdm(arguments.left, desc="workflows"):
            found.append(workflow(arguments.work, reference, left))
    pd.DataFrame([vars(one) for one in found]).to_parquet(arguments.report.with_suffix(".parquet"), index=False)
    lines = ["| kind | bytes free | outcome | message |", "|---|---|---|---|"]
    lines += [f"| {one.kind} | {one.left} | {one.outcome} | {json.dumps(one.message)} |" for one in found]
    arguments.report.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(int(any(one.outcome not in GOOD for one in found)))


if __name__ == "__main__":
    main()
