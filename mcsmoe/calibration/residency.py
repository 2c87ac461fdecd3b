"""Which weights of a checkpoint are there: those of one block, and of what stands outside the blocks as it is called."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from mcsmoe.checkpoint.mapped import MappedFolder
from mcsmoe.checkpoint.skeleton import fill_buffers
from mcsmoe.checkpoint.streaming import Streamed

_FEW = 50_000
"""Objects that the collector is through within some milliseconds: no reason to freeze any."""


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can: it keeps what it may need again."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Residency:
    """The model of ``source`` with the weights of one block at a time, on ``device``.

    Args:
        source: its files are read as maps from here on.
        blocks: paths of the blocks.
    """

    def __init__(self, source: Streamed, blocks: Iterable[str], device: torch.device) -> None:
        self.source, self.device = source, device
        self.files = MappedFolder(source.folder, source.tensors.files)
        source.tensors = source.tensors.over(self.files)
        self.blocks = list(blocks)
        self._below: dict[str, list[str]] = {block: [] for block in self.blocks}
        self._outside: list[str] = []
        for name in source.own_names():
            block = self._block_of(name)
            (self._outside if block is None else self._below[block]).append(name)
        self._reader: threading.Thread | None = None

    def _block_of(self, name: str) -> str | None:
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in self._below), None)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The model; what stands outside the blocks is mapped, and goes to the device when it is first called."""
        model = self.source.model
        self.source.load_to_run(self._outside)
        model.tie_weights(recompute_mapping=False)
        fill_buffers(model, torch.device("cpu"))
        hooks = [
            module.register_forward_pre_hook(lambda module, _inputs: self._arrive(module))
            for path, module in model.named_modules()
            if self._block_of(f"{path}.") is None and path not in self._below
        ]
        try:
            with torch.no_grad(), _left_alone():
                yield model
        finally:
            for hook in hooks:
                hook.remove()
            self.wait()
            self.source.forget_below("")

    def _arrive(self, module: nn.Module) -> None:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            _require(tensor, name, module)
            if tensor.device != self.device:
                tensor.data = tensor.data.to(self.device)

    def load(self, block: str) -> None:
        """The weights of ``block``, on the device."""
        self.wait()
        for names in self._units(block):
            self.source.load_to_run(names)
        module = self.source.model.get_submodule(block)
        for path, part in module.named_modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                full = ".".join(one for one in (block, path, name) if one)
                owner = self.source.model.all_tied_weights_keys.get(full)
                if tensor.is_meta and owner is not None:
                    raise ValueError(
                        f"block {block!r} has no weights of its own (it shares {full!r} with {owner!r}), so its experts would "
                        "be changed twice; such a model cannot be treated exactly"
                    )
                _require(tensor, full, part)
        module.to(self.device)

    def _units(self, block: str) -> list[list[str]]:
        """Tensors of ``block``, those together that are made of the same stored ones.

        One after another, so that what is stacked on the way (experts that are stored apart) is never there for all of them.
        """
        units: dict[tuple[str, ...], list[str]] = {}
        for name in self._below[block]:
            units.setdefault(tuple(self.source.stored_names([name])) or (name,), []).append(name)
        return list(units.values())

    def forget(self, block: str) -> None:
        """Empty ``block``."""
        self.source.forget_below(block)
        # A hook and its module refer to each other; what they hold must not wait for the next round of the collector.
        gc.collect()
        give_back_memory()

    def read_ahead(self, block: str | None) -> None:
        """Let the system read the files of ``block`` while another one computes."""
        if block is None:
            return
        self.wait()
        tensors = self.source.tensors
        names = [part for name in self.source.stored_names(self._below[block]) for part in tensors.parts(name)]
        self._reader = threading.Thread(target=self.files.read_ahead, args=(names,), daemon=True)
        self._reader.start()

    def wait(self) -> None:
        """Until what is read ahead has been asked for."""
        if self._reader is not None:
            self._reader.join()
            self._reader = None


@contextmanager
def _left_alone() -> Iterator[None]:
    """The collector, which runs after every block, does not look through all that the libraries made, again and again.

    A process that has frozen its objects itself is left as it is. That little is left to look through says so, too, and at
    once: to count what is frozen takes some hundredths of a second, at every pass.
    """
    if len(gc.get_objects(generation=2)) < _FEW or gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _require(tensor: torch.Tensor, name: str, module: nn.Module) -> None:
    """A product with a tensor without memory gives numbers all the same."""
    if tensor.is_meta:
        raise ValueError(
            f"tensor {name!r} of a {type(module).__name__} is called, but the checkpoint holds no such tensor"
        )
