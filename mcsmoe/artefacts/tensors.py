"""Safetensors files read and written one tensor at a time, their SHA-256 taken on the way.

The safetensors library maps or serialises whole files, which counts against the resident memory of a process that only
ever needs one layer; this module streams the same format.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcsmoe.artefacts.atomic import atomic_file
from mcsmoe.artefacts.digests import SEAL, UNSEALED, check_seal, regular_file, seal

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
"""How safetensors files name each number format."""
_LONGEST_HEADER = 100_000_000
_WEIGHT_FILE = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")
_SAMPLES, _SAMPLE = 4, 32  # places in a tensor, and bytes at each, that a fingerprint looks at


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor needs on disk, known before it is computed."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @staticmethod
    def of(tensor: Tensor) -> TensorInfo:
        return TensorInfo(tensor.dtype, tuple(tensor.shape))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as a writable buffer."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class _OtherFormatError(ValueError):
    """A tensor in a number format that torch does not know."""


class TensorFile:
    """One safetensors file, its header checked against its size.

    Raises:
        ValueError: the file is missing, truncated or not safetensors; names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._start: dict[str, int] = {}
        try:
            size = regular_file(self.path).stat().st_size
            with self.path.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                if not 2 <= length <= min(size, _LONGEST_HEADER):
                    raise ValueError("it has no header")
                self._data = 8 + length
                header = json.loads(handle.read(length), parse_constant=_refuse_constant)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            if not isinstance(self.metadata, dict) or any(type(text) is not str for text in self.metadata.values()):
                raise ValueError("its metadata are no map of texts")
            end = self._data
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if entry["dtype"] not in _DTYPES:
                    raise _OtherFormatError(
                        f"{self.path}: tensor {name!r} has the number format {entry['dtype']!r}, which a quantised "
                        "checkpoint uses and which is not read; start from the model in bfloat16 or float32"
                    )
                info = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if any(type(length) is not int or length < 0 for length in info.shape):
                    raise ValueError(f"tensor {name!r} has the shape {info.shape}")
                start, stop = (self._data + offset for offset in entry["data_offsets"])
                if start != end or stop - start != info.nbytes:
                    raise ValueError(f"tensor {name!r} does not lie where its header says")
                self.tensors[name], self._start[name], end = info, start, stop
            if end != size:
                raise ValueError(f"it has {size} bytes where its header promises {end}")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror}); restore or rebuild it") from error
        except _OtherFormatError as error:
            raise ValueError(str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: truncated or not a safetensors file ({error}); restore or rebuild it"
            ) from error

    def start(self, name: str) -> int:
        """Where in the file the bytes of a tensor begin."""
        return self._start[name]

    def read_into(self, name: str, target: Tensor) -> None:
        """Put a tensor into the memory of ``target``, of its shape and perhaps another type."""
        if TensorInfo.of(target) != self.tensors[name] or not target.is_contiguous():
            target.copy_(self.read(name))
            return
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(self._start[name])
            self._fill(handle, name, target)

    def _fill(self, handle: io.FileIO | io.BufferedReader, name: str, target: Tensor | None = None) -> Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu") if target is None else target
        if tensor.numel():
            room = bytes_of(tensor)
            # One call returns at most 2 GiB, whatever is asked for.
            while room:
                got = handle.readinto(room)
                if not got:
                    raise ValueError(f"{self.path}: truncated in tensor {name!r}")
                room = room[got:]
        return tensor

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(self._start[name])
            return self._fill(handle, name)

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of one tensor, a part at a time."""
        left = self.tensors[name].nbytes
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(self._start[name])
            while left and (chunk := handle.read(min(left, size))):
                left -= len(chunk)
                yield chunk

    def sample(self, name: str) -> bytes:
        """Bytes from the start, the end and between, enough to tell tensors of different trainings or seeds apart."""
        size = self.tensors[name].nbytes
        with self.path.open("rb", buffering=0) as handle:
            found = []
            for part in range(_SAMPLES):
                handle.seek(self._start[name] + max(0, size - _SAMPLE) * part // (_SAMPLES - 1))
                found.append(handle.read(min(size, _SAMPLE)))
        return b"".join(found)

    def overwrite(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` in the place of the stored one, in its number format.

        Raises:
            ValueError: it has another shape; names the tensor.
        """
        info = self.tensors[name]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{self.path}: tensor {name!r} has shape {info.shape}, not {tuple(tensor.shape)}")
        with self.path.open("rb+") as handle:
            handle.seek(self._start[name])
            handle.write(bytes_of(tensor.detach().to("cpu", info.dtype).contiguous()))

    def verify(self, sha256: str) -> None:
        """Read the whole file, keeping nothing.

        Raises:
            ValueError: its SHA-256 is not ``sha256``; names the file.
        """
        with self.path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"{self.path}: altered since it was written (its SHA-256 differs); restore or rebuild it")

    def stream(self, sha256: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """All tensors in file order, each in memory of its own.

        Raises:
            ValueError: after the last tensor, if the file's SHA-256 is not ``sha256``; names the file.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as handle:
            digest.update(handle.read(self._data))
            for name in self.tensors:
                tensor = self._fill(handle, name)
                if sha256 is not None and tensor.numel():
                    digest.update(bytes_of(tensor))
                yield name, tensor
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ValueError(f"{self.path}: altered since it was written (its SHA-256 differs); restore or rebuild it")


class TensorFolder:
    """The weights of a checkpoint folder: one safetensors file, or several with an index, or the ``files`` given.

    Raises:
        ValueError: no safetensors weights, two sets of them, or an index that names files or tensors which are not there.
    """

    def __init__(self, folder: str | Path, files: Iterable[str] | None = None) -> None:
        self.folder = Path(folder)
        self.files: dict[str, TensorFile] = {}
        if files is not None:
            self.files = {name: TensorFile(self.folder / name) for name in files}
            self.where = {tensor: file for file in self.files.values() for tensor in file.tensors}
            return
        index = self.folder / INDEX
        weight_map = _read_index(index) if index.exists() else {}
        names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        single = (self.folder / SINGLE).exists()
        if weight_map and single and names != [SINGLE]:
            # Transformers reads the single file, other readers what the index names.
            raise ValueError(
                f"{self.folder}: holds two sets of weights, {SINGLE} and the {len(names)} files that {INDEX} names, and "
                "readers differ in which they take; move the one that is not meant out of the folder"
            )
        if not weight_map and not single:
            raise ValueError(
                f"{self.folder}: no {SINGLE} and no {INDEX}; restore the weights; only safetensors are read"
            )
        for name in names:
            self.files[name] = TensorFile(self.folder / name)
        self.where = {tensor: file for file in self.files.values() for tensor in file.tensors}
        for tensor in weight_map:
            if tensor not in self.where:
                raise ValueError(f"{index}: tensor {tensor!r} is not in {weight_map[tensor]}")

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor, in the order of the files."""
        return {name: file.tensors[name] for name, file in self.where.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are read."""
        return sum(file.path.stat().st_size for file in self.files.values())

    def read(self, name: str) -> Tensor:
        return self.where[name].read(name)

    def read_into(self, name: str, target: Tensor) -> None:
        """Put a tensor into the memory of ``target``, of its shape and perhaps another type."""
        self.where[name].read_into(name, target)

    def over(self, stored: TensorFolder) -> TensorFolder:
        """The same tensors read by ``stored``, another way of reading the same files."""
        return stored

    def parts(self, name: str) -> list[str]:
        """Names in the files of what the tensor ``name`` is made of: itself, unless it is quantised."""
        return [name]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and samples of all tensors, however they are spread over files.

        It tells models apart at the cost of a few reads a tensor; it does not find damage, as the files' own digests do.
        """
        digest = hashlib.sha256()
        for name in sorted(self.where):
            info = self.where[name].tensors[name]
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
            digest.update(self.where[name].sample(name))
        return digest.hexdigest()


def _read_index(index: Path) -> dict[str, str]:
    """File name by tensor name.

    Raises:
        ValueError: not an index, or one that names anything but safetensors files beside it; names the file.
    """
    try:
        weight_map = json.loads(regular_file(index).read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("no weight_map")
    except OSError as error:
        raise ValueError(f"{index}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of safetensors files ({error})") from error
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
            raise ValueError(
                f"{index}: tensor {tensor!r} is said to be in {name!r}, but only *.safetensors files beside the index are read"
            )
    return weight_map


def _refuse_constant(text: str) -> None:
    """Python reads NaN and Infinity in JSON, other libraries do not."""
    raise ValueError(f"its header holds {text}")


# -- sealed files ------------------------------------------------------------------------------------------------
def write_sealed(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically to one safetensors file that carries its own SHA-256 in its metadata."""
    with atomic_file(path) as partial:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, partial, {**(metadata or {}), SEAL: UNSEALED})
        seal(partial)


def read_sealed(
    path: str | Path, believe: Callable[[Mapping[str, str]], bool] = lambda _metadata: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; no tensors where the metadata are not to ``believe``.

    Raises:
        ValueError: missing, unreadable or altered since it was written; names the file and the remedy.
    """
    try:
        check_seal(path)
        with safe_open(path, framework="pt") as handle:
            metadata = dict(handle.metadata() or {})
            names = handle.keys() if believe(metadata) else ()
            return {name: handle.get_tensor(name) for name in names}, metadata
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error
