"""Finished tensors on disk, until all that a checkpoint's header must say is known."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mcsmoe.artefacts.tensors import TensorFile, TensorInfo
from mcsmoe.artefacts.writing import by_alignment, write_tensors


class Spool:
    """Finished tensors, kept on disk until all that a checkpoint's header must say is known."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, TensorFile] = {}
        self._parts = 0

    @classmethod
    @contextmanager
    def inside(cls, folder: Path, name: str = ".layers") -> Iterator[Spool]:
        """One inside an unfinished output, so that it is on the disk with the room for it."""
        place = folder / name
        place.mkdir()
        try:
            yield cls(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write ``tensors``; their memory may be reused after it."""
        part = self.place / str(self._parts)
        part.mkdir()
        self._parts += 1
        infos = by_alignment({name: TensorInfo.of(tensor) for name, tensor in tensors.items()})
        write_tensors(part, infos, ((name, tensors[name]) for name in infos), shard_bytes=2**62)
        file = TensorFile(part / "model.safetensors")
        self.infos |= infos
        self._files |= dict.fromkeys(infos, file)

    def read(self, name: str) -> Tensor:
        return self._files[name].read(name)
