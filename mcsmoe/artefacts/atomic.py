"""Atomic writes: a killed step, or a full disk, leaves no half artefact that a later run believes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcsmoe.artefacts.digests import digest_directory, digest_files, write_sums

__all__ = [
    "atomic_directory",
    "atomic_file",
    "claimed",
    "digest_directory",
    "digest_files",
    "directory_bytes",
    "explained",
]
__all__ += ["unwritable", "write_json"]

_UNWRITABLE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or raise the quota",
    errno.EROFS: "mount it writable or choose another folder",
    errno.EACCES: "allow this user to write there or choose another folder",
    errno.EPERM: "allow this user to write there or choose another folder",
}
# Libraries below Python report the system's error in words only.
_IN_WORDS = (
    (re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE), None),
    (re.compile(r"database or disk is full"), errno.ENOSPC),
    (re.compile(r"readonly database|unable to open database file"), errno.EACCES),
)


def _partial(path: Path) -> Path:
    # Host and process id keep an orphan of a killed run from writing into the files of the run that replaced it, and
    # jobs on two machines out of each other's.
    return _beside(path, "partial", str(os.getpid()))


def _beside(path: Path, kind: str, process: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{socket.gethostname()}-{process}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left half-made beside ``target``.

    A folder that one of them had moved aside, and put nothing in the place of, comes back.
    """
    for kind in ("partial", "replaced"):
        start = _beside(Path(target.name), kind, "").name
        for path in target.parent.glob(f"{glob.escape(start)}*"):
            # SQLite puts a journal beside a file, of the same name and more.
            pid = path.name.removeprefix(start).partition("-")[0]
            if pid.isdigit() and not _is_running(int(pid)):
                if kind == "replaced" and _identity(target) is None:
                    path.rename(target)
                else:
                    _remove(path)


def _identity(path: Path) -> tuple[int, int] | None:
    """What stands at ``path``, told apart from whatever takes its place; None where there is nothing."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    for pattern, number in _IN_WORDS:
        if found := pattern.search(str(error)):
            return number or int(found[1])
    return None


def unwritable(path: str | Path, error: BaseException) -> ValueError | None:
    """What to tell a user when writing ``path`` failed for want of space or permission; None for any other failure."""
    number = _error_number(error)
    if number not in _UNWRITABLE:
        return None
    target = Path(path)
    named = getattr(error, "filename", None)
    if number in (errno.EACCES, errno.EPERM) and named and target.parent not in Path(os.fsdecode(named)).parents:
        return None  # something else that was to be read
    place = next((folder for folder in target.parents if folder.is_dir()), Path())
    try:
        free = f", {shutil.disk_usage(place).free / 1e6:.1f} MB free"
    except OSError:
        free = ""
    return ValueError(
        f"{target}: cannot be written ({os.strerror(number)}{free}); {_UNWRITABLE[number]} and run again. What stood "
        "there before is untouched"
    )


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn a failure to write ``path`` for want of space or permission into one that names the file and the remedy.

    Raises:
        ValueError: no space, quota or permission to write; any other exception passes.
    """
    try:
        yield
    except Exception as error:
        told = unwritable(path, error)
        if told is None:
            raise
        raise told from error


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Keep ``path`` for this process: another that claims it meanwhile is refused, before it has worked for nothing.

    The claim is a lock that goes with the process, however it ends.

    Raises:
        ValueError: another process writes there, or the folder around it cannot be written; names the path.
    """
    target = Path(path).absolute()
    made = [folder for folder in target.parents if not folder.exists()]
    lock = target.with_name(f".{target.name}.claim")
    with explained(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle = _locked(lock)
        except OSError as error:
            if error.errno in _UNWRITABLE:
                raise
            raise ValueError(f"{path}: cannot be written ({error.strerror}); give another place") from error
    if handle is None:
        raise ValueError(f"{path}: another command is writing there; wait for it, or give another --out")
    try:
        _remove_leftovers(target)
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # it has something in it now
                folder.rmdir()


def _locked(lock: Path) -> int | None:
    """A handle that holds the lock; None where another process does."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        # Whoever held it before may have removed the file between the two calls.
        held = os.fstat(handle)
        if _identity(lock) == (held.st_dev, held.st_ino):
            return handle
        os.close(handle)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and takes ``path``'s place.

    On an exception the temporary file is removed and what stood at ``path`` is untouched.

    Raises:
        ValueError: no space or no permission; names the file and the remedy.
    """
    target = Path(path)
    partial = _partial(target)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        try:
            yield partial
            with partial.open("rb+") as handle:
                os.fsync(handle.fileno())
            partial.replace(target)
            _sync(target.parent)
        finally:
            _remove(partial)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside ``path``; on success it takes ``path``'s place as a whole.

    Its files are listed with their digests in ``SHA256SUMS``; a digest that stands there already is kept. What stood at
    ``path`` at the beginning is replaced; what has come there since is not.

    Raises:
        ValueError: no space or no permission, or something has appeared at ``path``; names the folder and the remedy.
    """
    target = Path(path)
    partial, replaced = _partial(target), _beside(target, "replaced", str(os.getpid()))
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        _remove(partial)
        before = _identity(target)
        try:
            partial.mkdir()
            yield partial
            write_sums(partial)
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as handle:
                        os.fsync(handle.fileno())
            _sync(partial)
            taken = f"{target}: has appeared or changed while this was written; it is left as it is: give another place"
            if _identity(target) != before:
                raise ValueError(taken)
            try:
                if before is not None:
                    target.replace(replaced)
                partial.replace(target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise ValueError(taken) from error
                raise
            _sync(target.parent)
        finally:
            # Also where the user interrupts between the two moves.
            if _identity(replaced) is not None and _identity(target) is None:
                replaced.replace(target)
            _remove(partial)
            _remove(replaced)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def directory_bytes(path: str | Path) -> int:
    """Bytes of all regular files below ``path``."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
