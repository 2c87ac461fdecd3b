"""Weights of a checkpoint as maps of its files: nothing is copied, and what is no longer used costs no memory.

A map belongs to the file, so the system may drop its pages at any time and reads them again when they are touched;
memory that the C library allocates for a copy stays with the process instead. Maps are private: a tensor that is
changed gets pages of its own, and the file stays as it is. Each tensor is mapped by itself, so that a limit on the
address space holds too.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorFile, TensorFolder, TensorInfo

_AHEAD = 2**24  # bytes asked for at once


def mapped(handle: int, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor that lies ``start`` bytes into the open file ``handle``, as a private map of it."""
    count = torch.Size(shape).numel()
    aligned = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = start - aligned + count * dtype.itemsize
    flags, protection = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
    region = mmap.mmap(handle, length, flags=flags, prot=protection, offset=aligned)
    return torch.frombuffer(region, dtype=dtype, count=count, offset=start - aligned).view(shape)


class MappedFile(TensorFile):
    """One safetensors file whose tensors are maps of it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.bytes_read = 0

    def read(self, name: str) -> Tensor:
        """One tensor, a map of the file where its place allows it."""
        info, start = self.tensors[name], self._start[name]
        self.bytes_read += info.nbytes
        if not info.nbytes or start % info.dtype.itemsize:
            return super().read(name)
        with self.path.open("rb", buffering=0) as handle:
            return mapped(handle.fileno(), start, info.dtype, info.shape)

    def read_into(self, name: str, target: Tensor) -> None:
        if TensorInfo.of(target) == self.tensors[name]:
            self.bytes_read += self.tensors[name].nbytes
        super().read_into(name, target)

    def read_ahead(self, name: str) -> None:
        """Ask the system to read a tensor into its own cache."""
        start, left = self._start[name], self.tensors[name].nbytes
        with self.path.open("rb", buffering=0) as handle:
            while left > 0:
                part = min(left, _AHEAD)
                os.posix_fadvise(handle.fileno(), start, part, os.POSIX_FADV_WILLNEED)
                start, left = start + part, left - part


class MappedFolder(TensorFolder):
    """The weights of a checkpoint folder as maps.

    Raises:
        ValueError: as ``TensorFolder``.
    """

    def __init__(self, folder: str | Path, files: Iterable[str] | None = None) -> None:
        super().__init__(folder, files)
        self._mapped = {name: MappedFile(file.path) for name, file in self.files.items()}
        self.files = dict(self._mapped)
        self.where = {tensor: file for file in self.files.values() for tensor in file.tensors}

    @property
    def bytes_read(self) -> int:
        """Bytes of all tensors asked for so far."""
        return sum(file.bytes_read for file in self._mapped.values())

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read tensors into its own cache."""
        for name in names:
            file = self.where[name]
            assert isinstance(file, MappedFile)
            file.read_ahead(name)
