"""What stands between two blocks of a model, for every batch: in memory up to a limit, beyond it in a mapped file.

A block returns a tensor, or a tuple of tensors and other things; it is kept leaf by leaf. Two files take turns: what a
block reads is in one, what it gives goes to the other, so that a killed run finds the first as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.mapped import mapped

_PAGE = 4096
Key = tuple[str, int]
"""Name of what is kept (a stack of blocks), and number of the batch."""


@dataclass
class _Kept:
    """One output of one block: where each leaf is."""

    spec: Any
    leaves: list[Any]  # a tensor in memory, a place in a file, or a plain value
    nbytes: int = 0


@dataclass(frozen=True)
class _Place:
    file: int
    start: int
    info: TensorInfo


@dataclass
class States:
    """Outputs of blocks by key.

    Args:
        folder: where files are made.
        memory: bytes of tensors that may be held in memory.
        durable: everything is written to the files too, so that another process can go on (``manifest``, ``restore``).
    """

    folder: Path
    memory: int
    durable: bool = False
    held: int = 0
    written: int = 0
    _kept: dict[Key, _Kept] = field(default_factory=dict)
    _turn: int = 0
    _end: int = 0
    _handles: dict[int, int] = field(default_factory=dict)

    def _handle(self, file: int) -> int:
        if file not in self._handles:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT
            self._handles[file] = os.open(self.folder / f"states-{file}.bin", flags, 0o600)
        return self._handles[file]

    def put(self, key: Key, output: Any) -> None:
        """Keep ``output`` of a block in the place of what was kept under ``key``."""
        leaves, spec = _pytree.tree_flatten(output)
        self._drop(key)
        kept = _Kept(spec, [])
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                kept.leaves.append(leaf)
                continue
            tensor = leaf.detach()
            size = tensor.numel() * tensor.element_size()
            in_memory = self.held + size <= self.memory
            place = None if in_memory and not self.durable else self._write(tensor)
            if in_memory:
                self.held += size
                kept.nbytes += size
                # A copy: the output may be a view of something larger.
                kept.leaves.append((tensor.to("cpu", copy=True), place))
            else:
                kept.leaves.append((None, place))
        self._kept[key] = kept

    def _write(self, tensor: Tensor) -> _Place:
        handle = self._handle(self._turn)
        contiguous = tensor.cpu().contiguous()
        place = _Place(self._turn, self._end, TensorInfo.of(contiguous))
        flat: Any = contiguous.reshape(-1).view(torch.uint8).numpy() if contiguous.numel() else b""
        room, at = memoryview(flat), place.start
        while room:
            done = os.pwrite(handle, room[: 2**30], at)
            at, room = at + done, room[done:]
        self.written += place.info.nbytes
        self._end = -(-at // _PAGE) * _PAGE
        return place

    def get(self, key: Key, device: torch.device) -> Any:
        """What is kept under ``key``, in memory of the caller's own."""
        kept = self._kept[key]
        return _pytree.tree_unflatten([self._leaf(leaf, device) for leaf in kept.leaves], kept.spec)

    def _leaf(self, leaf: Any, device: torch.device) -> Any:
        if not isinstance(leaf, tuple):
            return leaf
        tensor, place = leaf
        if tensor is None:
            info = place.info
            if not info.nbytes:
                return torch.empty(info.shape, dtype=info.dtype, device=device)
            tensor = mapped(self._handle(place.file), place.start, info.dtype, info.shape)
        return tensor.to(device, copy=True)

    def _drop(self, key: Key) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self.held -= old.nbytes

    def turn(self) -> None:
        """Every batch went through a block: what the next one gives goes to the other file.

        What the other file still holds, of a stack that is done, is moved out of it first.
        """
        following = 1 - self._turn
        for key in [key for key, kept in self._kept.items() if any(_lies_in(leaf, following) for leaf in kept.leaves)]:
            self.put(key, self.get(key, torch.device("cpu")))
        self._turn, self._end = following, 0

    def manifest(self) -> dict[str, Any]:
        """Where everything is, as plain values, after ``turn``; of durable states only."""
        entries = []
        for (name, batch), kept in self._kept.items():
            leaves: list[Any] = []
            for leaf in kept.leaves:
                if isinstance(leaf, tuple):
                    place: _Place = leaf[1]
                    dtype = str(place.info.dtype).removeprefix("torch.")
                    leaves.append([place.file, place.start, dtype, list(place.info.shape)])
                else:
                    leaves.append({"value": leaf})
            entries.append({"stack": name, "batch": batch, "tree": _pytree.treespec_dumps(kept.spec), "leaves": leaves})
        return {"turn": self._turn, "entries": entries}

    def restore(self, manifest: Mapping[str, Any]) -> None:
        """Go on from the files that ``manifest`` describes.

        Raises:
            ValueError: a file is missing or shorter than it was; names it.
        """
        self._turn = int(manifest["turn"])
        for entry in manifest["entries"]:
            leaves: list[Any] = []
            for leaf in entry["leaves"]:
                if isinstance(leaf, dict):
                    leaves.append(leaf["value"])
                    continue
                file, start, dtype, shape = leaf
                place = _Place(file, start, TensorInfo(getattr(torch, dtype), tuple(shape)))
                path = self.folder / f"states-{file}.bin"
                if not path.is_file() or path.stat().st_size < start + place.info.nbytes:
                    raise ValueError(f"{path}: shorter than what was written; delete {self.folder} and start again")
                leaves.append((None, place))
            spec = _pytree.treespec_loads(entry["tree"])
            self._kept[entry["stack"], entry["batch"]] = _Kept(spec, leaves)

    def close(self) -> None:
        """Close the files and delete them."""
        self._kept.clear()
        for file, handle in self._handles.items():
            os.close(handle)
            (self.folder / f"states-{file}.bin").unlink(missing_ok=True)
        self._handles.clear()
        self.held = 0


def _lies_in(leaf: Any, file: int) -> bool:
    return isinstance(leaf, tuple) and leaf[1] is not None and leaf[1].file == file
