"""Experts left out of a checkpoint in its files: what stays is copied byte for byte, whatever its number format.

Nothing is computed and no weight is read into memory. Where each tensor of the result comes from is worked out on names and
shapes alone: tensors of one expert get its new number, tensors with an axis of experts lose entries of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcsmoe.adapters.dropping import Slices
from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.digests import write_sums
from mcsmoe.artefacts.tensors import SHARD_BYTES, TensorFolder, TensorInfo
from mcsmoe.artefacts.writing import Bytes, by_alignment, copy_tensors
from mcsmoe.checkpoint import fields
from mcsmoe.checkpoint.card import Parent, write_card
from mcsmoe.checkpoint.quantised.settings import renumbered
from mcsmoe.checkpoint.save import specs_of, write_provenance
from mcsmoe.types import LayerId

if TYPE_CHECKING:
    from mcsmoe.checkpoint.streaming import Streamed


@dataclass(frozen=True)
class Piece:
    """One tensor of a result: a stored one, or the entries ``rows`` of its ``axis``."""

    stored: str
    axis: int = 0
    rows: Tensor | None = None


def leave_experts(
    source: Streamed,
    out: str | Path,
    kept: Mapping[LayerId, Tensor],
    provenance: Mapping[str, Any],
    extra: Callable[[Path], object] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> bool:
    """Write ``source`` to ``out`` with the experts ``kept`` (int64, ascending) of every layer alone.

    Returns:
        Whether that could be done by copying; else nothing is written, and ``source`` is as it was.

    Raises:
        ValueError: a router is left with too few experts to choose from; names the layer.
    """
    pieces = _pieces(source, kept)
    if pieces is None:
        return False
    with atomic_directory(out) as folder:
        for layer, kept_K in kept.items():
            if len(kept_K) < source.adapter.num_experts(source.model, layer):
                source.adapter.leave(source.model, layer, kept_K)
        specs_of(source.model)  # the configuration says afterwards how many experts there are
        unplaced, config = source.keep_unplaced(source.config_fields())
        for name, (stored, chosen_K) in unplaced.sources.items():
            parts = source.tensors.parts(stored)
            pieces |= {unplaced.renamed(name, part): Piece(part, 0, chosen_K) for part in parts}
        if source.quantised is not None:
            settings = source.quantised.settings
            numbers = _numbers(source, kept)
            config = settings.replaced(config, renumbered(settings.fields, numbers))
        files = source.files
        infos = by_alignment({name: _info(files, piece) for name, piece in pieces.items()})
        places = {name: list(_places(files, pieces[name])) for name in infos}
        write_sums(folder, copy_tensors(folder, infos, places, shard_bytes))
        source.copy_companions(folder)
        fields.write_json(folder / "config.json", config)
        write_provenance(folder, provenance)
        write_card(folder, provenance, Parent.of(source.folder))
        if extra is not None:
            extra(folder)
    return True


# -- what comes from where -------------------------------------------------------------------------------------------
def _pieces(source: Streamed, kept: Mapping[LayerId, Tensor]) -> dict[str, Piece] | None:
    """By name in the result's files, where a tensor comes from; None where names and shapes do not say it."""
    model, adapter = source.model, source.adapter
    if source.compact or set(kept) != set(source.layers) or len({len(kept_K) for kept_K in kept.values()}) > 1:
        return None
    slices: dict[LayerId, Slices] = {}
    for layer, kept_K in kept.items():
        if len(kept_K) < adapter.num_experts(model, layer):
            given = adapter.slices(model, layer, kept_K)
            if given is None:
                return None
            slices[layer] = given
    made: dict[str, Piece] = {}
    for name in source.own_names():
        within = next((one for one in slices if name.startswith(f"{one}.")), None)
        unit = source.names.units[name]
        if within is None:
            made |= {part: Piece(part) for one in unit for part in source.tensors.parts(one)}
            continue
        pieces = _sliced(source, name, unit, within, slices[within], kept[within])
        if pieces is None:
            return None
        made |= pieces
    return made


def _sliced(
    source: Streamed, name: str, unit: Sequence[str], layer: LayerId, slices: Slices, kept_K: Tensor
) -> dict[str, Piece] | None:
    """The same of one tensor of a layer."""
    tensors, quantised = source.tensors, source.quantised
    inner = name.removeprefix(f"{layer}.")
    member = next((one for one in slices.members if inner.startswith(f"{one}.")), None)
    if member is not None:
        new = slices.members[member]
        stored = f"{layer}.{member}."
        if len(unit) != 1 or not unit[0].startswith(stored):
            return None
        if new is None:
            return {}
        return {f"{layer}.{new}.{part.removeprefix(stored)}": Piece(part) for part in tensors.parts(unit[0])}
    if inner not in slices.rows:
        return {part: Piece(part) for one in unit for part in tensors.parts(one)}
    axis, rows = slices.rows[inner]
    if name not in source.names.converted:
        if quantised is None or unit[0] not in quantised.quantised:
            return {unit[0]: Piece(unit[0], axis, rows)}
        if not quantised.quantised[unit[0]].stacked or axis != 0:
            return None
        return {part: Piece(part, 0, rows) for part in tensors.parts(unit[0])}
    if axis != 0 or not torch.equal(rows, kept_K):
        return None
    return _of_numbered(source, unit, source.adapter.num_experts(source.model, layer), kept_K)


def _of_numbered(source: Streamed, unit: Sequence[str], before: int, kept_K: Tensor) -> dict[str, Piece] | None:
    """Of tensors that are stored an expert each, those that stay under their new numbers."""
    place = numbered(unit, before)
    if place is None:
        return None
    new = {old: number for number, old in enumerate(kept_K.tolist())}
    made = {}
    for stored in unit:
        number = stored.split(".")[place]
        if int(number) not in new:
            continue
        for part in source.tensors.parts(stored):
            words = part.split(".")
            if words[place] != number:
                return None
            made[".".join([*words[:place], str(new[int(number)]), *words[place + 1 :]])] = Piece(part)
    return made


def numbered(names: Sequence[str], count: int) -> int | None:
    """Which part of dotted ``names`` numbers the experts: it runs from 0 to ``count`` - 1 with equally many of each.

    None where that holds for no part, or for several.
    """
    words = [name.split(".") for name in names]
    if len({len(one) for one in words}) != 1:
        return None
    found = []
    for place in range(len(words[0])):
        numbers = [one[place] for one in words]
        if not all(number.isdecimal() for number in numbers):
            continue
        rest = {".".join([*one[:place], *one[place + 1 :]]) for one in words}
        if {int(number) for number in numbers} == set(range(count)) and len(rest) * count == len(names):
            found.append(place)
    return found[0] if len(found) == 1 else None


def _numbers(source: Streamed, kept: Mapping[LayerId, Tensor]) -> dict[str, list[int]]:
    """By the module that holds a layer's experts in the files, the old numbers of those that stay."""
    made: dict[str, list[int]] = {}
    for layer, kept_K in kept.items():
        for name in source.names_below(layer):
            for stored in source.names.units[name]:
                before, found, _ = stored.partition(".experts.")
                if found:
                    made[f"{before}.experts"] = kept_K.tolist()
    return made


# -- bytes -----------------------------------------------------------------------------------------------------------
def _info(files: TensorFolder, piece: Piece) -> TensorInfo:
    info = files.where[piece.stored].tensors[piece.stored]
    if piece.rows is None:
        return info
    shape = list(info.shape)
    shape[piece.axis] = len(piece.rows)
    return TensorInfo(info.dtype, tuple(shape))


def _places(files: TensorFolder, piece: Piece) -> Iterator[Bytes]:
    file = files.where[piece.stored]
    info, start = file.tensors[piece.stored], file.start(piece.stored)
    if piece.rows is None:
        yield Bytes(file.path, start, info.nbytes)
        return
    each = math.prod(info.shape[piece.axis + 1 :]) * info.dtype.itemsize
    length = info.shape[piece.axis] * each
    rows = piece.rows.tolist()
    for outer in range(math.prod(info.shape[: piece.axis])):
        for row in rows:
            yield Bytes(file.path, start + outer * length + row * each, each)
