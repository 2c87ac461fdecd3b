"""A checkpoint written anew with its layers changed one at a time, and all else as it is in the files.

Of quantised weights, what a change touches is written in the base type, and all else stays as it is stored;
``quantization_config`` names what is no longer quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.card import Parent, write_card
from mcsmoe.checkpoint.prediction import Kept
from mcsmoe.checkpoint.quantised.settings import plain_modules
from mcsmoe.checkpoint.save import own_tensors, specs_of, write_folder
from mcsmoe.checkpoint.spool import Spool
from mcsmoe.console import log
from mcsmoe.types import LayerId

if TYPE_CHECKING:
    from mcsmoe.checkpoint.streaming import Streamed


def rewrite(
    source: Streamed,
    out: str | Path,
    change: Callable[[LayerId], object],
    provenance: Mapping[str, Any],
    layers: Iterable[LayerId],
    extra: Callable[[Path], object] | None,
    shard_bytes: int,
) -> None:
    """Write ``source`` to ``out``; arguments as in ``Streamed.rewrite``."""
    with atomic_directory(out) as folder, Spool.inside(folder) as spool:
        for layer in layers:
            with source.layer(layer):
                before = _marks(source, layer) if source.quantised is not None else {}
                change(layer)
                # In a call of its own, so that no name keeps the layer while the next one is read.
                _keep(source, layer, before, spool)
        _write(source, folder, spool, dict(provenance), shard_bytes)
        if extra is not None:
            extra(folder)


def _keep(source: Streamed, layer: LayerId, before: Mapping[str, Mark], spool: Spool) -> None:
    state = source.model.get_submodule(layer).state_dict()
    after = {f"{layer}.{name}": tensor for name, tensor in state.items()}
    spool.add(_changed(source, after, before) if before else after)


Mark = tuple[int, int, tuple[int, ...], torch.dtype]


def _marks(source: Streamed, layer: LayerId) -> dict[str, Mark]:
    state = source.model.get_submodule(layer).state_dict()
    return {f"{layer}.{name}": _mark(tensor) for name, tensor in state.items()}


def _mark(tensor: Tensor) -> Mark:
    """What differs once a tensor has been replaced or written to."""
    return tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype


def _changed(source: Streamed, tensors: Mapping[str, Tensor], before: Mapping[str, Mark]) -> dict[str, Tensor]:
    """Those of ``tensors`` that were touched, with all that is stored together with them."""
    units = source.names.units
    touched = {name for name, tensor in tensors.items() if before.get(name) != _mark(tensor)}
    together = {one for name in touched for one in units.get(name, ())}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in touched or name not in units or together.intersection(units[name])
    }


def _write(source: Streamed, folder: Path, spool: Spool, provenance: dict[str, Any], shard_bytes: int) -> None:
    """Write what ``spool`` holds of the changed layers, and everything else as it is in the files."""
    specs = specs_of(source.model)  # first: the configuration says afterwards how many experts there are
    kept, config = source.keep_unplaced(source.config_fields())
    parts = _Parts(source)
    if specs or source.compact:
        for name, tensor in own_tensors(source.model).items():
            if name in spool.infos:
                parts.add(name, spool.infos[name], spool.read)
            elif not parts.keep(name):
                parts.add(name, TensorInfo.of(tensor), source.read)
        parts.keep_unplaced(kept)
        source.copy_companions(folder)
        write_folder(
            folder, source.model, parts.infos, parts.read, provenance, shard_bytes, config, kept.infos, parts.settings()
        )
        write_card(folder, provenance, Parent.of(source.folder))
        return
    # A stock result has the names and shapes in which the family is published, and its files' own where nothing changed.
    with Spool.inside(folder, ".published") as published:
        whole = own_tensors(source.model)
        for layer in source.layers:
            changed = [name for name in whole if name.startswith(f"{layer}.") and name in spool.infos]
            if changed:
                published.add(as_published(source.model, {name: spool.read(name) for name in changed}))
        for name, info in published.infos.items():
            parts.add(name, info, published.read)
        rest = [one for name in whole if name not in spool.infos for one in source.names.units[name]]
        for name in dict.fromkeys(rest):
            parts.keep_stored(name)
        parts.keep_unplaced(kept)
        settings = parts.settings()
        if settings is not None and source.quantised is not None:
            config = source.quantised.settings.replaced(config, settings)
        source.copy_companions(folder)
        write_folder(folder, source.model, parts.infos, parts.read, provenance, shard_bytes, config, kept.infos)
    write_card(folder, provenance, Parent.of(source.folder))


class _Parts:
    """The tensors of a result by name: where each is read from, and which are still quantised."""

    def __init__(self, source: Streamed) -> None:
        self.source = source
        self.infos: dict[str, TensorInfo] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        self._kept: set[str] = set()  # quantised tensors of the source that the result holds as they are stored

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` of the result."""
        return self._read[name]()

    def add(self, name: str, info: TensorInfo, read: Callable[[str], Tensor]) -> None:
        """A tensor in plain numbers."""
        self.infos[name], self._read[name] = info, partial(read, name)

    def keep_stored(self, stored: str, renamed: Callable[[str], str] = str) -> None:
        """The tensor ``stored`` of the files as it is there, all its parts under the names that ``renamed`` gives."""
        quantised = self.source.quantised
        files = self.source.tensors if quantised is None else quantised.stored
        for part in self.source.tensors.parts(stored):
            self.infos[renamed(part)] = files.where[part].tensors[part]
            self._read[renamed(part)] = partial(files.read, part)
        if quantised is not None and stored in quantised.quantised:
            self._kept.add(stored)

    def keep_unplaced(self, kept: Kept) -> None:
        """What has no place in the model: as it is stored, or the experts that are left of it."""
        for name, info in kept.infos.items():
            stored, chosen = kept.sources[name]
            if chosen is None:
                self.keep_stored(stored, partial(kept.renamed, name))
            else:
                self.add(name, info, partial(kept.read, read=self.source.tensors.read))

    def keep(self, name: str) -> bool:
        """The same for a tensor by the model's name; False where it is not stored in the parts of one tensor."""
        quantised, units = self.source.quantised, self.source.names.units
        if quantised is None or name in self.source.names.converted or len(units.get(name, ())) != 1:
            return False
        stored = units[name][0]
        before, last = stored.rpartition(".")[::2]
        after = name.rpartition(".")[0]
        parts = self.source.tensors.parts(stored)
        if stored not in quantised.quantised or last != name.rpartition(".")[2]:
            return False
        if not all(part.startswith(f"{before}.") for part in parts):
            return False
        self.keep_stored(stored, lambda part: after + part[len(before) :])
        return True

    def settings(self) -> dict[str, Any] | None:
        """What the result says of quantisation; None where nothing in it is quantised."""
        quantised = self.source.quantised
        if quantised is None:
            return None
        settings, dtype = quantised.settings, str(quantised.dtype).removeprefix("torch.")
        if not self._kept:
            log.info("%s: was quantised by %s; the result is %s throughout", quantised.folder, settings.method, dtype)
            return None
        plain = plain_modules(name for name in quantised.quantised if name not in self._kept)
        if not plain:
            return dict(settings.fields)
        shown = ", ".join(plain[:3]) + (f" and {len(plain) - 3} others" if len(plain) > 3 else "")
        log.info("%s: %s were quantised by %s and are written in %s", quantised.folder, shown, settings.method, dtype)
        assert settings.format is not None
        return settings.format.with_plain(settings.fields, plain)


def as_published(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of ``model`` in the names and shapes in which its family is published."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return made
