"""What ``prune`` and ``merge`` share: layers reduced in sequence on calibration text, or from statistics."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mcsmoe.artefacts.tables import frame_of, write_table
from mcsmoe.calibration.files import load_tensors, save_tensors
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor
from mcsmoe.calibration.states import States
from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli._calibration import statistics
from mcsmoe.cli._domains import domains
from mcsmoe.cli._outputs import GROUPS, say_size
from mcsmoe.cli.options import pass_options
from mcsmoe.console import log, progress
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.reduce import Reduced, Reduction
from mcsmoe.types import LayerId

EXPERTS = "experts.json"
"""Which experts each layer kept: what other tools read."""


def kept_number(arguments: argparse.Namespace, experts: Mapping[LayerId, int], sets: Mapping[LayerId, int]) -> int:
    """Experts to keep in a layer on average, from ``--experts`` or ``--remove``.

    Raises:
        ValueError: neither or both are given, or a number out of range; names the option and what would do.
    """
    if (arguments.experts is None) == (arguments.remove is None):
        raise ValueError("give either --experts, the number to keep in a layer, or --remove, the share to leave out")
    fewest = min(experts.values())
    if arguments.remove is not None:
        if not 0 <= arguments.remove < 1:
            raise ValueError(f"--remove is {arguments.remove}; give a share from 0 up to, but not including, 1")
        kept = max(1, round(fewest * (1 - arguments.remove)))
        step = max(sets.values())
        return max(step, kept - kept % step)
    for layer, count in experts.items():
        if not 1 <= arguments.experts <= count:
            raise ValueError(f"--experts is {arguments.experts}; layer {layer!r} has {count}, give 1 to {count}")
    return int(arguments.experts)


def uniform_counts(source: Streamed, arguments: argparse.Namespace, deletes: bool) -> dict[LayerId, int]:
    """By layer the number of experts to keep, checked against what its router can do without the others.

    Raises:
        ValueError: a number that a layer cannot have; names the layer and the remedy, before any work.
    """
    model, adapter = source.model, source.adapter
    experts = {layer: adapter.num_experts(model, layer) for layer in source.layers}
    sets = {layer: adapter.expert_sets(model, layer) if deletes else 1 for layer in source.layers}
    kept = kept_number(arguments, experts, sets)
    for layer in source.layers:
        if deletes and kept < experts[layer]:
            adapter.check_dropping(model, layer, kept)
    return dict.fromkeys(source.layers, kept)


def check_whole(source: Streamed) -> None:
    """Raise ValueError if the checkpoint is merged or compressed already."""
    if source.compact:
        raise ValueError(f"{source.folder}: is merged or compressed already; start from the model it came from")


def reduce_checkpoint(
    source: Streamed,
    arguments: argparse.Namespace,
    reduction: Reduction,
    counts: Mapping[LayerId, int],
    provenance: Mapping[str, Any],
) -> None:
    """Reduce every layer to its number of experts, and write the result with who was kept and who answers for whom.

    With ``--calibration`` layers are reduced in sequence, each on what the reduced ones before it give; with
    ``--statistics`` from these alone, one layer in memory at a time.
    """
    if (arguments.calibration is None) == (arguments.statistics is None):
        raise ValueError("layers are reduced by what they do on text: give --calibration FILE, or --statistics DIR")
    rows: list[dict[str, Any]] = []
    kept: dict[LayerId, dict[str, Any]] = {}

    def note(layer: LayerId, reduced: Reduced) -> Reduced:
        grouping = reduced.grouping
        rows.extend(grouping.rows(layer, reduced.share_E))
        kept[layer] = {"experts": grouping.num_experts, "kept": grouping.dominant.tolist()}
        log.info("%s: %d of %d experts kept", layer, grouping.num_groups, grouping.num_experts)
        return reduced

    def extra(folder: Path) -> None:
        write_table(folder / GROUPS, frame_of(rows, "groups"), "groups")
        (folder / EXPERTS).write_text(json.dumps({"layers": kept}, indent=2) + "\n")

    if arguments.statistics is not None:
        found = statistics(source, arguments)

        def change(layer: LayerId) -> None:
            one = found.layers[layer]
            note(layer, reduction.reduce(SparseLayer(source.model, source.adapter, layer), one, None, counts[layer]))

        layers = progress(source.layers, "reduce")
        source.rewrite(arguments.out, change, provenance, layers=layers, extra=extra)
    else:
        arguments.out.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".reduced-", dir=arguments.out.resolve().parent) as folder:
            shelf = Shelf(Path(folder))
            for layer, reduced in _in_sequence(source, arguments, reduction, counts, Path(folder)):
                shelf.put(layer, note(layer, reduced))

            def install(layer: LayerId) -> None:
                if layer in shelf:
                    shelf.get(layer).install(SparseLayer(source.model, source.adapter, layer))

            source.rewrite(arguments.out, install, provenance, layers=progress(source.layers, "write"), extra=extra)
    say_size(source.folder, arguments.out)


def _in_sequence(
    source: Streamed, arguments: argparse.Namespace, reduction: Reduction, counts: Mapping[LayerId, int], work: Path
) -> Iterator[tuple[LayerId, Reduced]]:
    """Each layer reduced on the states that the reduced layers before it give; one block in memory at a time."""
    taken = domains(source, arguments)
    weights = None if taken[0].weight is None else {one.name: one.weight or 0.0 for one in taken}
    # A copy of its own: the layers of ``source`` stay as the files say, for what is written.
    whole = Streamed(source.folder)
    seq2seq = bool(whole.model.config.is_encoder_decoder)
    batches = [
        DomainBatch(one.name, {name: batch[name] for name in batch if seq2seq or name != "labels"})
        for one in taken
        for batch in one.batches
    ]
    done: list[tuple[LayerId, Reduced]] = []

    def reduce(layer: LayerId, found: Mapping[str, LayerStatistics], tokens: LayerTokens) -> None:
        sparse = SparseLayer(whole.model, whole.adapter, layer)
        done.append((layer, reduction.reduce(sparse, blend(found, weights), tokens, counts[layer])))

    options = pass_options(arguments)
    states = States(work / "states", options.cache_memory)
    try:
        major = LayerMajor(whole, batches, states, options)
        with major.open():
            for _ in major.blocks(reduce):
                while done:
                    yield done.pop(0)
    finally:
        states.close()


class Shelf:
    """Reduced layers, kept on disk until all are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[LayerId, tuple[Path, Reduced]] = {}

    def __contains__(self, layer: LayerId) -> bool:
        return layer in self._held

    def put(self, layer: LayerId, reduced: Reduced) -> None:
        path = self.folder / f"{len(self._held)}.safetensors"
        save_tensors(path, reduced.stored())
        self._held[layer] = path, reduced.without_stored()

    def get(self, layer: LayerId) -> Reduced:
        path, reduced = self._held[layer]
        return reduced.with_stored(load_tensors(path))
