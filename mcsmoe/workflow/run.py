"""What the Snakefile needs beside its rules: task names, one run at a time, and the words at the end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Sequence
from pathlib import Path

_HELD: list[int] = []


def names_by_task(specs: Sequence[str]) -> dict[str, str]:
    """What the stages are told (its name, or the path of a task file of one's own) by the name of the task.

    A task of the library has one name however it is spelt, so that another spelling reruns nothing.

    Raises:
        ValueError: two entries have the same name, or one is unknown.
    """
    from mcsmoe.data.tasks import FOLDER, load_task

    found: dict[str, str] = {}
    for spec in specs:
        task = load_task(spec)
        if task.name in found:
            raise ValueError(f"tasks names {task.name!r} twice ({found[task.name]} and {spec}); leave one out")
        found[task.name] = task.name if task.file.parent == FOLDER else spec
    return found


def described_in(spec: str) -> Path:
    """The file that describes a task."""
    from mcsmoe.data.tasks import load_task

    return load_task(spec).file


def is_language(spec: str) -> bool:
    """Whether a task is about predicting text."""
    from mcsmoe.data.tasks import load_task

    return load_task(spec).is_language


def task_files(folder: str, spec: str) -> dict[str, Path]:
    """Files of the train and validation split of a task below ``folder``."""
    from mcsmoe.data.sources import find_files
    from mcsmoe.data.tasks import load_task

    return find_files(folder, load_task(spec))


def hold_lock(results: Path) -> None:
    """Let one workflow at a time write into ``results``; the lock goes with the process, however it ends.

    Snakemake's own lock outlives a killed run and would keep the next one from resuming, so the profile switches it off.

    Raises:
        ValueError: another workflow holds it, or it cannot be written; names the folder.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        handle = os.open(results / ".lock", os.O_RDWR | os.O_CREAT)
        if not os.access(results, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(
            f"results is {str(results)!r}, which cannot be written ({error.strerror}); free some space there, allow this "
            "user to write there, or choose another folder"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ValueError(
            f"results is {str(results)!r}, and another workflow is writing there; wait for it or choose another folder"
        ) from error
    _HELD.append(handle)


def say_when_nothing_is_planned() -> None:
    """Have Snakemake say that nothing is to be done wherever its plan is empty.

    Under ``--until`` it counts the jobs beyond too, and ends with a table of no jobs and no word.
    """
    logger = logging.getLogger("snakemake.logging")

    def look(record: logging.LogRecord) -> bool:
        if getattr(record, "stats", {}).get("total") == 0:
            logger.info("Nothing to be done (all requested files are present and up to date).")
        return True

    logger.addFilter(look)
