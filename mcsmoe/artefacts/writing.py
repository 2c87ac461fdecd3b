"""Safetensors files written one tensor at a time, from memory or from the places where the bytes lie."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import CODES, INDEX, SHARD_BYTES, SINGLE, TensorInfo, bytes_of

_AT_ONCE = 1 << 27  # bytes
_HASHED = 1 << 22  # bytes
_WORTH = 1 << 16  # bytes that are worth asking for ahead


def by_alignment(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors, widest dtype first, so that every tensor of a file starts at a multiple of its item size."""
    return dict(sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize))


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return shards


def _header(infos: Mapping[str, TensorInfo], names: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        start, end = end, end + infos[name].nbytes
        code = CODES[infos[name].dtype]
        entries[name] = {"dtype": code, "shape": list(infos[name].shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write ``tensors``, which come in the order of ``infos``, holding one at a time.

    Returns:
        SHA-256 (hexadecimal) by file name. More than ``shard_bytes`` become several files and an index.

    Raises:
        ValueError: a tensor that comes out of order or is not what ``infos`` announced; names it.
    """
    coming = iter(tensors)
    digests: dict[str, str] = {}
    for file, names in _files(folder, infos, shard_bytes):
        digest = hashlib.sha256()
        with (folder / file).open("wb") as handle:
            header = _header(infos, names, metadata or {})
            handle.write(header)
            digest.update(header)
            for name in names:
                got, tensor = next(coming, ("nothing", torch.empty(0)))
                if got != name or TensorInfo.of(tensor) != infos[name]:
                    raise ValueError(
                        f"tensor {name!r} {infos[name]} was announced, {got!r} {TensorInfo.of(tensor)} came"
                    )
                if tensor.numel():
                    data = bytes_of(tensor.detach().to("cpu").contiguous())
                    handle.write(data)
                    digest.update(data)
        digests[file] = digest.hexdigest()
    return digests


def _files(folder: Path, infos: Mapping[str, TensorInfo], shard_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """Names of the files to write with those of their tensors; the index of several is there once all are written."""
    shards = _shards(infos, shard_bytes)
    if len(shards) == 1:
        yield SINGLE, shards[0]
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    yield from zip(files, shards, strict=True)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    total = sum(info.nbytes for info in infos.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n")


class Bytes(NamedTuple):
    """Bytes that lie in a file."""

    file: Path
    start: int
    length: int


def copy_tensors(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    places: Mapping[str, Sequence[Bytes]],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write a checkpoint's tensors from where their bytes lie in other files; the system copies them.

    Returns:
        SHA-256 (hexadecimal) by file name, taken of what is there while the next bytes are copied.

    Raises:
        ValueError: fewer or more bytes than a tensor has; names it.
    """
    handles: dict[Path, BinaryIO] = {}
    digests: dict[str, str] = {}
    beside = ThreadPoolExecutor(1)
    try:
        for file, names in _files(folder, infos, shard_bytes):
            with (folder / file).open("w+b") as handle:
                header = _header(infos, names, {})
                handle.write(header)
                handle.flush()
                digest, end, taken = hashlib.sha256(header), len(header), []
                parts = list(joined(places, infos, names))
                for number, part in enumerate(parts):
                    # What comes next is read while this is written: no system reads ahead over a gap by itself.
                    for one in parts[number : number + 2]:
                        if one.file not in handles:
                            handles[one.file] = one.file.open("rb", buffering=0)
                    if number + 1 < len(parts) and parts[number + 1].length >= _WORTH:
                        after = parts[number + 1]
                        length = min(after.length, _AT_ONCE)
                        os.posix_fadvise(handles[after.file].fileno(), after.start, length, os.POSIX_FADV_WILLNEED)
                    _copy(handles[part.file], handle, part)
                    taken.append(beside.submit(_update, digest, handle.fileno(), end, part.length))
                    end += part.length
                for update in taken:
                    update.result()
            digests[file] = digest.hexdigest()
        return digests
    finally:
        beside.shutdown(cancel_futures=True)
        for source in handles.values():
            source.close()


def _update(digest: Any, file: int, start: int, length: int) -> None:
    while length:
        data = os.pread(file, min(length, _HASHED), start)
        if not data:
            raise ValueError(f"a file that was just written ends at byte {start}; the disk may be full")
        digest.update(data)
        start, length = start + len(data), length - len(data)


def joined(
    places: Mapping[str, Sequence[Bytes]], infos: Mapping[str, TensorInfo], names: Sequence[str]
) -> Iterator[Bytes]:
    """The bytes of ``names`` in turn, those that lie one behind the other as one."""
    last: Bytes | None = None
    for name in names:
        if sum(part.length for part in places[name]) != infos[name].nbytes:
            raise ValueError(f"tensor {name!r} has {infos[name].nbytes} bytes, and {places[name]} are given")
        for part in places[name]:
            if last is not None and last.file == part.file and last.start + last.length == part.start:
                last = last._replace(length=last.length + part.length)
                continue
            if last is not None:
                yield last
            last = part
    if last is not None:
        yield last


def _copy(source: BinaryIO, target: BinaryIO, part: Bytes) -> None:
    start, left = part.start, part.length
    while left:
        try:
            done = os.copy_file_range(source.fileno(), target.fileno(), min(left, _AT_ONCE), start)
        except OSError:  # between two file systems, or one that cannot
            source.seek(start)
            chunk = source.read(min(left, _AT_ONCE))
            view = memoryview(chunk)
            while view:
                view = view[os.write(target.fileno(), view) :]
            done = len(chunk)
        if not done:
            raise ValueError(f"{part.file}: truncated at byte {start}; restore the file")
        start, left = start + done, left - done
