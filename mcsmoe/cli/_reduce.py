"""What ``prune`` and ``merge`` share: layers reduced in sequence on calibration text, or from statistics."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tables import frame_of, write_table
from mcsmoe.calibration.files import load_tensors, save_tensors
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor
from mcsmoe.calibration.states import States
from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.checkpoint.slicing import leave_experts
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli._calibration import statistics
from mcsmoe.cli._domains import domains
from mcsmoe.cli._outputs import GROUPS, say_size
from mcsmoe.cli.options import pass_options
from mcsmoe.console import log, progress
from mcsmoe.criteria.quadratic import Limits
from mcsmoe.criteria.scores import CriterionInputs, super_experts
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.budget import SPREADS
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.reduce import Reduced, Reduction
from mcsmoe.types import Grouping, LayerId

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


def counts(
    source: Streamed, arguments: argparse.Namespace, deletes: bool, criterion: str = "frequency"
) -> dict[LayerId, int]:
    """By layer the number of experts to keep, checked against what its router can do without the others.

    A budget that spreads them over the layers takes statistics of all layers, from a pass of their own before they are
    reduced in sequence.

    Raises:
        ValueError: a number that a layer cannot have; names the layer and the remedy, before any work.
    """
    model, adapter = source.model, source.adapter
    experts = {layer: adapter.num_experts(model, layer) for layer in source.layers}
    sets = {layer: adapter.expert_sets(model, layer) if deletes else 1 for layer in source.layers}
    kept = kept_number(arguments, experts, sets)
    excluded = set(getattr(arguments, "exclude_layers", ()))
    fewest = max(getattr(arguments, "fewest", 1), 1)
    if fewest > kept:
        raise ValueError(f"--fewest is {fewest}, more than the {kept} experts to keep on average; give at most {kept}")
    for layer in source.layers:
        if deletes and kept < experts[layer]:
            adapter.check_dropping(model, layer, kept)
    if arguments.budget == "uniform":
        return {layer: experts[layer] if layer in excluded else kept for layer in source.layers}
    found = statistics(source, _without_domains(arguments))
    free = [layer for layer in source.layers if layer not in excluded]
    if deletes:
        fewest = max(fewest, *(_least(source, layer, fewest, kept, sets[layer]) for layer in free), 1)
    spread = SPREADS[arguments.budget]({layer: found.layers[layer] for layer in free}, kept, criterion, sets, fewest)
    made = {layer: experts[layer] if layer in excluded else spread[layer] for layer in source.layers}
    for layer in source.layers:
        log.info("%s: %d of %d experts by the %s budget", layer, made[layer], experts[layer], arguments.budget)
        if deletes and made[layer] < experts[layer]:
            adapter.check_dropping(model, layer, made[layer])
    return made


def _least(source: Streamed, layer: LayerId, fewest: int, kept: int, step: int) -> int:
    """The least number of experts, from ``fewest`` to ``kept``, that the router of ``layer`` can choose among alone.

    A token takes a fixed number of experts, so a layer cannot be left with fewer.
    """
    for count in range(-(-fewest // step) * step, kept, step):
        with contextlib.suppress(ValueError):
            source.adapter.check_dropping(source.model, layer, count)
            return count
    return kept


def _without_domains(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments as ``statistics`` takes them: one file of text."""
    given = arguments.calibration
    if given is not None and len(given) > 1:
        raise ValueError(
            f"--budget {arguments.budget} takes one file of text, not {len(given)} domains; collect their statistics "
            "with mcsmoe collect and give --statistics, or use --budget uniform"
        )
    more = {"calibration": given[0].file if given else None, "save_statistics": None}
    return argparse.Namespace(**(vars(arguments) | more))


def limits(source: Streamed, arguments: argparse.Namespace) -> dict[LayerId, Limits]:
    """By layer which experts ``--protect`` and ``--drop`` name; layers without any are left out.

    Raises:
        ValueError: a file that does not list experts by layer, or a layer or expert that the model does not have.
    """
    experts = {layer: source.adapter.num_experts(source.model, layer) for layer in source.layers}
    made: dict[LayerId, Limits] = {}

    def mark(option: str, layer: LayerId, chosen: list[int]) -> None:
        if layer not in made:
            sets = source.adapter.expert_sets(source.model, layer)
            no_E = torch.zeros(experts[layer], dtype=torch.bool)
            made[layer] = Limits(no_E, no_E.clone(), torch.arange(experts[layer]) // (experts[layer] // sets))
        marked_E = made[layer].protected_E if option == "--protect" else made[layer].dropped_E
        marked_E[chosen] = True

    for option, given in (("--protect", arguments.protect), ("--drop", arguments.drop)):
        if option == "--protect" and given == "super":
            found = statistics(source, _without_domains(arguments)).layers
            largest = {layer: CriterionInputs(layer, found[layer]).outputs.largest_norm_E for layer in source.layers}
            for layer, outlying_E in super_experts(largest).items():
                chosen = outlying_E.nonzero()[:, 0].tolist()
                if chosen:
                    log.info("%s: experts %s have outlying outputs and stay", layer, chosen)
                    mark(option, layer, chosen)
        elif given is not None:
            for layer, chosen in _listed(option, Path(given), experts).items():
                mark(option, layer, chosen)
    return made


def _listed(option: str, file: Path, experts: Mapping[LayerId, int]) -> dict[LayerId, list[int]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {file} is not readable as JSON ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(chosen, list) for chosen in found.values()):
        raise ValueError(f"{option}: {file} must list numbers of experts by layer, as in {{LAYER: [0, 5]}}")
    for layer, chosen in found.items():
        if layer not in experts:
            raise ValueError(f"{option}: {file} names layer {layer!r}; the model has {list(experts)}")
        for expert in chosen:
            if type(expert) is not int or not 0 <= expert < experts[layer]:
                raise ValueError(
                    f"{option}: {file} names expert {expert!r} of layer {layer!r}; its experts are 0 to {experts[layer] - 1}"
                )
    return found


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
    kept: dict[LayerId, Grouping] = {}

    def note(layer: LayerId, grouping: Grouping, share_E: Tensor) -> None:
        rows.extend(grouping.rows(layer, share_E))
        kept[layer] = grouping
        log.info("%s: %d of %d experts kept", layer, grouping.num_groups, grouping.num_experts)

    def extra(folder: Path) -> None:
        write_table(folder / GROUPS, frame_of(rows, "groups"), "groups")
        listed = {layer: {"experts": one.num_experts, "kept": one.dominant.tolist()} for layer, one in kept.items()}
        (folder / EXPERTS).write_text(json.dumps({"layers": listed}, indent=2) + "\n")

    whole = {layer: SparseLayer(source.model, source.adapter, layer) for layer in source.layers}

    def select(layer: LayerId) -> None:
        grouping = kept[layer]
        if grouping.num_groups < grouping.num_experts:
            weights = whole[layer].read_experts().select(grouping.dominant)
            whole[layer].drop_experts(weights, grouping.expert_to_group, ~grouping.leads())

    def written(change: Callable[[LayerId], object]) -> None:
        staying = {layer: grouping.dominant for layer, grouping in kept.items()}
        # Experts that stay as they are need not be read to be kept.
        if not reduction.selects or not leave_experts(source, arguments.out, staying, provenance, extra):
            source.rewrite(arguments.out, change, provenance, progress(source.layers, "write"), extra)

    if arguments.statistics is not None:
        found = statistics(source, arguments).layers

        def reduce(layer: LayerId) -> None:
            made = reduction.reduce(whole[layer], found[layer], None, counts[layer])
            note(layer, made.grouping, made.share_E)

        for layer in source.layers if reduction.selects else ():
            grouping = reduction.selection(whole[layer], found[layer], counts[layer])
            note(layer, grouping, grouping.leads().double())
        written(select if reduction.selects else reduce)
    else:
        beside = arguments.out.resolve().parent
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".reduced-", dir=beside) as name:
            shelf = Shelf(Path(name))
            for layer, reduced in _in_sequence(source, arguments, reduction, counts, Path(name)):
                note(layer, reduced.grouping, reduced.share_E)
                if not reduction.selects:
                    shelf.put(layer, reduced)

            def install(layer: LayerId) -> None:
                if layer in shelf:
                    shelf.get(layer).install(whole[layer])

            written(select if reduction.selects else install)
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
