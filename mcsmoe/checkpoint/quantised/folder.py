"""Weights of a quantised checkpoint as they were plain: every tensor under the model's name, made of its parts when read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorFile, TensorFolder, TensorInfo
from mcsmoe.checkpoint.quantised.base import Quantised
from mcsmoe.checkpoint.quantised.settings import Settings


class Dequantised(TensorFolder):
    """The tensors of ``stored`` with quantised ones in ``dtype``.

    Attributes:
        stored: the files as they are.
        quantised: by name in the model, the tensors that are held in parts.
        settings: what the configuration says of them.
    """

    def __init__(
        self, stored: TensorFolder, quantised: Mapping[str, Quantised], settings: Settings, dtype: torch.dtype
    ) -> None:
        self.stored, self.quantised, self.settings, self.dtype = stored, quantised, settings, dtype
        self.folder = stored.folder
        self._of_part = {part: name for name, one in quantised.items() for part in one.parts.values()}
        self.files = {name: _DequantisedFile(file, self) for name, file in stored.files.items()}
        self.where = {tensor: file for file in self.files.values() for tensor in file.tensors}

    def over(self, stored: TensorFolder) -> TensorFolder:
        """The same over another way of reading the same files."""
        return Dequantised(stored, self.quantised, self.settings, self.dtype)

    def parts(self, name: str) -> list[str]:
        """Names in the files of what the tensor ``name`` is made of."""
        found = self.quantised.get(name)
        return [name] if found is None else list(found.parts.values())

    def info(self, part: str) -> TensorInfo | None:
        """What the model has in the place of a stored tensor: None for a part that is not the main one."""
        name = self._of_part.get(part)
        if name is None:
            return self.stored.where[part].tensors[part]
        one = self.quantised[name]
        return TensorInfo(self.dtype, one.shape) if one.main == part else None

    def name(self, part: str) -> str:
        """Name in the model of the tensor that the stored one belongs to."""
        return self._of_part.get(part, part)

    def read(self, name: str) -> Tensor:
        """One tensor in plain numbers.

        Raises:
            ValueError: its parts do not fit together; names the file and the tensor.
        """
        found = self.quantised.get(name)
        if found is None:
            return self.stored.read(name)
        try:
            made = found.value(self.stored.read, self.dtype)
        except (ValueError, RuntimeError, IndexError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{self.where[name].path}: the parts of tensor {name!r} do not fit ({text})") from error
        if tuple(made.shape) != found.shape:
            raise ValueError(f"{self.where[name].path}: the parts of tensor {name!r} make {tuple(made.shape)}")
        return made

    @property
    def fingerprint(self) -> str:
        """That of the files as they are."""
        return self.stored.fingerprint


class _DequantisedFile(TensorFile):
    """One file of a quantised checkpoint, the tensors in it as the model has them."""

    def __init__(self, file: TensorFile, folder: Dequantised) -> None:
        self.path: Path = file.path
        self.metadata = file.metadata
        self.tensors = {folder.name(part): info for part in file.tensors if (info := folder.info(part)) is not None}
        self._file, self._folder = file, folder

    def read(self, name: str) -> Tensor:
        return self._folder.read(name)

    def read_into(self, name: str, target: Tensor) -> None:
        if name in self._folder.quantised:
            target.copy_(self.read(name))
        else:
            self._file.read_into(name, target)

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        if name not in self._folder.quantised:
            yield from self._file.chunks(name, size)
            return
        flat = self.read(name).contiguous().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), size):
            yield flat[start : start + size].numpy().tobytes()

    def sample(self, name: str) -> bytes:
        return self._file.sample(self._folder.parts(name)[0])

    def overwrite(self, name: str, tensor: Tensor) -> None:
        """As for a plain file; a quantised tensor cannot be changed in place.

        Raises:
            ValueError: it is quantised, or of another shape; names it.
        """
        if name in self._folder.quantised:
            raise ValueError(f"{self.path}: tensor {name!r} is quantised, so it cannot be changed in place")
        self._file.overwrite(name, tensor)

    def stream(self, sha256: str | None = None) -> Iterator[tuple[str, Tensor]]:
        if sha256 is not None:
            self.verify(sha256)
        for name in self.tensors:
            yield name, self.read(name)
