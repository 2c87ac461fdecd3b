"""Digests by which an altered artefact is noticed, in forms that other readers pass over.

A folder lists the SHA-256 of its files in ``SHA256SUMS`` (``sha256sum --check`` reads it); a single parquet or safetensors
file carries its own in an entry of its metadata.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

SUMS = "SHA256SUMS"
CARD = "README.md"
"""The model card: for people, who change it, so that no list has its digest."""
SEAL = "mcsmoe_sha256"
"""Metadata entry of a single file: the SHA-256 of the file with this entry's 64 digits at zero."""
UNSEALED = "0" * 64
_CHUNK = 1 << 20


def regular_file(file: Path) -> Path:
    """``file``, which is an ordinary one: reading a device or a pipe may never end.

    Raises:
        ValueError: it is something else; names it.
        OSError: it is not there or cannot be looked at.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file}: not an ordinary file, so it is not read; put a copy of the file there")
    return file


# -- digests of folders ------------------------------------------------------------------------------------------
def digest_file(file: Path) -> str:
    """SHA-256 of a file's content; hexadecimal."""
    with regular_file(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_files(files: list[Path]) -> str:
    """SHA-256 over names and contents of ``files``, in the order given; hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(b"\0")
        with regular_file(file).open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def digest_directory(path: str | Path) -> str:
    """SHA-256 over the regular files of a checkpoint folder, by sorted name; hidden ones are not its content."""
    folder = Path(path)
    return digest_files(sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")))


def read_sums(folder: str | Path) -> dict[str, str]:
    """SHA-256 by file name as ``SHA256SUMS`` of ``folder`` lists them; empty without one.

    Raises:
        ValueError: it is not such a list, or names a file outside the folder; names it.
    """
    file = Path(folder) / SUMS
    try:
        lines = regular_file(file).read_bytes().decode().splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a list of digests ({error}); {_rebuild(file.parent)}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        parts = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if parts is None:
            raise ValueError(f"{file}: line {number} is not a SHA-256 and a file name; {_rebuild(file.parent)}")
        name = PurePosixPath(parts[2])
        if name.is_absolute() or ".." in name.parts or "\0" in parts[2]:
            raise ValueError(
                f"{file}: line {number} names {parts[2]!r}, which is not a file of this folder; {_rebuild(file.parent)}"
            )
        found[parts[2]] = parts[1]
    if not found:
        raise ValueError(f"{file}: lists nothing; {_rebuild(file.parent)}")
    return found


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """List the files below ``folder``, hidden ones apart, with their SHA-256.

    ``known`` digests, and those listed already, are taken over; with ``known`` nothing else is listed yet.
    """
    sums = read_sums(folder) | dict(known or {})
    if known is None:
        files = {
            file.relative_to(folder).as_posix(): file
            for file in folder.rglob("*")
            if file.is_file() and file.name not in (SUMS, CARD) and not file.name.startswith(".")
        }
        sums = {name: sums.get(name) or digest_file(file) for name, file in files.items()}
    if not sums:
        return
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    # Never in place: the list may be a hard link that another folder shares.
    fresh = folder / f".{SUMS}"
    fresh.write_text(text)
    fresh.replace(folder / SUMS)


def check_sums(folder: str | Path, wanted: Callable[[str], bool] = lambda _name: True) -> None:
    """Compare the listed files whose name is ``wanted`` with their SHA-256; nothing where nothing is listed.

    Raises:
        ValueError: a file is missing or altered, or the list is damaged; names the file and the remedy.
    """
    place = Path(folder)
    for name, digest in read_sums(place).items():
        if not wanted(name):
            continue
        try:
            found = digest_file(place / name)
        except OSError as error:
            raise ValueError(f"{place / name}: cannot be read ({error.strerror}); {_rebuild(place)}") from error
        if found != digest:
            raise ValueError(
                f"{place / name}: altered since it was written (its SHA-256 is not the one in {SUMS}); {_rebuild(place)}"
            )


def _rebuild(folder: Path) -> str:
    return (
        f"restore it, or delete {folder} and run again; if the change is meant, delete {SUMS} there and what is "
        "written in it is not compared"
    )


# -- digests of single files -------------------------------------------------------------------------------------
def seal(path: Path) -> None:
    """Put the SHA-256 of a parquet or safetensors file where its metadata hold the entry ``SEAL`` = ``UNSEALED``."""
    place = _seal_place(path)
    if place is None:
        raise ValueError(f"{path}: has no metadata entry {SEAL!r} for its digest")
    digest = _digest_around(path, place)
    with path.open("rb+") as handle:
        handle.seek(place)
        handle.write(digest)


def check_seal(path: str | Path) -> None:
    """Compare a parquet or safetensors file with the SHA-256 in its metadata; nothing where there is none.

    Raises:
        ValueError: altered since it was written; names the file and the remedy.
        OSError: it cannot be read.
    """
    file = Path(path)
    place = _seal_place(file)
    if place is None:
        return
    with file.open("rb") as handle:
        handle.seek(place)
        stored = handle.read(64)
    if stored != _digest_around(file, place):
        raise ValueError(
            f"{file}: altered since it was written (its SHA-256 is not the one in its metadata); restore it, or delete "
            "it and run again"
        )


def _seal_place(file: Path) -> int | None:
    """Where the 64 digits stand: in a safetensors header at the start, or in a parquet footer at the end."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        if head[:4] == b"PAR1":
            handle.seek(max(0, size - 8))
            length = int.from_bytes(handle.read(4), "little")
            start, between = max(0, size - 8 - length), 2  # a field's type and its length, one byte each
        else:
            length = int.from_bytes(head, "little")
            start, between = 8, 3  # ":"
        handle.seek(start)
        region = handle.read(min(length, size))
    found = region.rfind(SEAL.encode())
    return None if found < 0 else start + found + len(SEAL) + between


def _digest_around(file: Path, place: int) -> bytes:
    """SHA-256 of ``file`` with the 64 bytes at ``place`` at zero, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        left = place
        while left and (chunk := handle.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        handle.read(64)
        digest.update(UNSEALED.encode())
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest().encode()
