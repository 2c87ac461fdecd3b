"""What ``prune`` and ``merge`` share: layers reduced in sequence on calibration text, or from statistics."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tables import frame_of, write_table
from mcsmoe.calibration.collect import identity
from mcsmoe.calibration.folder import digest_of
from mcsmoe.calibration.layer_major import Options
from mcsmoe.checkpoint.quantised.settings import settings_of
from mcsmoe.checkpoint.slicing import leave_experts
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli._beside import forget_beside
from mcsmoe.cli._blend import max_min_weights
from mcsmoe.cli._calibrated import Calibrated
from mcsmoe.cli._outputs import EXPERTS, GROUPS, say_size
from mcsmoe.cli.options import pass_options
from mcsmoe.console import log, progress
from mcsmoe.criteria.quadratic import Limits
from mcsmoe.criteria.scores import CriterionInputs, super_experts
from mcsmoe.export.packed import Packing, pack_folder
from mcsmoe.methods import MAX_MIN
from mcsmoe.transform.budget import SPREADS
from mcsmoe.transform.in_sequence import Shelf, Texts, reduced_in_sequence
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.reduce import Reduced, Reduction
from mcsmoe.transform.unfinished import unfinished
from mcsmoe.types import Grouping, LayerId


def kept_number(arguments: argparse.Namespace, experts: Mapping[LayerId, int], sets: Mapping[LayerId, int]) -> int:
    """Experts to keep in a layer on average, from ``--experts`` or ``--remove``.

    Raises:
        ValueError: neither or both are given, or a number out of range; names the option and what would do.
    """
    if (arguments.experts is None) == (arguments.remove is None):
        raise ValueError(
            "give either --experts, the number to keep in a layer, or --remove, the share to leave out (or --target-size)"
        )
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
    calibrated: Calibrated,
    deletes: bool,
    criterion: str = "frequency",
    budget: str | None = None,
    limits: Mapping[LayerId, Limits] | None = None,
) -> dict[LayerId, int]:
    """By layer the number of experts to keep, checked against what its router can do without the others.

    A budget that spreads them over the layers takes statistics of all layers, from a pass of their own before they are
    reduced in sequence.

    Raises:
        ValueError: a number that a layer cannot have; names the layer and the remedy, before any work.
    """
    source, arguments = calibrated.source, calibrated.arguments
    model, adapter = source.model, source.adapter
    budget = arguments.budget if budget is None else budget
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
    if budget not in SPREADS:
        return {layer: experts[layer] if layer in excluded else kept for layer in source.layers}
    free = [layer for layer in source.layers if layer not in excluded]
    fewest = least_fewest(calibrated, deletes, kept)
    bounds = all_limits(calibrated, deletes, limits or {})
    spread = SPREADS[budget](calibrated.layers(free), kept, criterion, bounds, fewest)
    made = {layer: experts[layer] if layer in excluded else spread[layer] for layer in source.layers}
    for layer in source.layers:
        log.info("%s: %d of %d experts by the %s budget", layer, made[layer], experts[layer], budget)
        if deletes and made[layer] < experts[layer]:
            adapter.check_dropping(model, layer, made[layer])
    return made


def least_fewest(calibrated: Calibrated, deletes: bool, most: int | None = None) -> int:
    """The fewest experts that every layer must keep: ``--fewest``, and enough for its router to choose from alone.

    A token takes a fixed number of experts, so a layer cannot be left with fewer.

    Args:
        most: no more than that many.
    """
    source, arguments = calibrated.source, calibrated.arguments
    fewest = max(getattr(arguments, "fewest", 1), 1)
    if not deletes:
        return fewest
    for layer in source.layers:
        step = source.adapter.expert_sets(source.model, layer)
        end = source.adapter.num_experts(source.model, layer) if most is None else most
        for count in range(-(-fewest // step) * step, end, step):
            with contextlib.suppress(ValueError):
                source.adapter.check_dropping(source.model, layer, count)
                fewest = count
                break
        else:
            fewest = end
    return fewest


def all_limits(calibrated: Calibrated, deletes: bool, limits: Mapping[LayerId, Limits]) -> dict[LayerId, Limits]:
    """``limits`` with those of layers of which nothing is said: as many experts of each set that a router chooses among."""
    source, made = calibrated.source, {}
    for layer in source.layers:
        sets = source.adapter.expert_sets(source.model, layer) if deletes else 1
        made[layer] = limits.get(layer, _bare(source.adapter.num_experts(source.model, layer), sets))
    return made


def limits(calibrated: Calibrated) -> dict[LayerId, Limits]:
    """By layer which experts ``--protect`` and ``--drop`` name; layers without any are left out.

    Raises:
        ValueError: a file that does not list experts by layer, or a layer or expert that the model does not have.
    """
    source, arguments = calibrated.source, calibrated.arguments
    experts = {layer: source.adapter.num_experts(source.model, layer) for layer in source.layers}
    made: dict[LayerId, Limits] = {}

    def mark(option: str, layer: LayerId, chosen: list[int]) -> None:
        if layer not in made:
            made[layer] = _bare(experts[layer], source.adapter.expert_sets(source.model, layer))
        marked_E = made[layer].protected_E if option == "--protect" else made[layer].dropped_E
        marked_E[chosen] = True

    for option, given in (("--protect", arguments.protect), ("--drop", arguments.drop)):
        if option == "--protect" and given == "super":
            found = calibrated.layers(source.layers)
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


def _bare(experts: int, sets: int) -> Limits:
    """That as many experts of each of ``sets`` consecutive sets are kept, and nothing else."""
    no_E = torch.zeros(experts, dtype=torch.bool)
    return Limits(no_E, no_E.clone(), torch.arange(experts) // (experts // sets))


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
    calibrated: Calibrated,
    reduction: Reduction,
    counts: Mapping[LayerId, int],
    provenance: Mapping[str, Any],
    ready: Shelf | None = None,
    pages: Mapping[str, Any] | None = None,
    packing: Packing | None = None,
) -> None:
    """Reduce every layer to its number of experts, and write the result with who was kept and who answers for whom.

    With ``--calibration`` layers are reduced in sequence, each on what the reduced ones before it give; with
    ``--statistics`` from these alone, one layer in memory at a time.

    Args:
        ready: layers that are reduced already, as ``reduction`` and ``counts`` say.
        pages: further JSON files for the result, by name.
        packing: in how many bits experts are stored in the end; None: as they were.
    """
    source, arguments = calibrated.source, calibrated.arguments
    rows: list[dict[str, Any]] = []
    kept: dict[LayerId, Grouping] = {}

    def note(layer: LayerId, grouping: Grouping, share_E: Tensor) -> None:
        rows.extend(grouping.rows(layer, share_E))
        kept[layer] = grouping
        log.info("%s: %d of %d experts kept", layer, grouping.num_groups, grouping.num_experts)

    def extra(folder: Path) -> None:
        write_table(folder / GROUPS, frame_of(rows, "groups"), "groups")
        listed = {layer: {"experts": one.num_experts, "kept": one.dominant.tolist()} for layer, one in kept.items()}
        for name, page in {EXPERTS: {"layers": listed}, **(pages or {})}.items():
            (folder / name).write_text(json.dumps(page, indent=2) + "\n")
        if packing is not None:
            pack_folder(folder, packing)

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

    def write(reduced: Callable[[LayerId], Reduced]) -> None:
        def install(layer: LayerId) -> None:
            if layer in kept:
                reduced(layer).install(whole[layer])

        written(select if reduction.selects else install)

    if not calibrated.has_rows:

        def reduce(layer: LayerId) -> None:
            made = reduction.reduce(whole[layer], calibrated.statistics(layer), None, counts[layer])
            note(layer, made.grouping, made.share_E)

        for layer in source.layers if reduction.selects else ():
            grouping = reduction.selection(whole[layer], calibrated.statistics(layer), counts[layer])
            note(layer, grouping, grouping.leads().double())
        written(select if reduction.selects else reduce)
    elif ready is not None:
        for layer in ready:
            reduced = ready.described(layer)
            note(layer, reduced.grouping, reduced.share_E)
        write(ready.get)
    else:
        settings, texts = pass_options(arguments), calibrated.texts()
        request = _request(source, texts, reduction, counts, settings)
        kept_states = (settings.cache_memory, not reduction.selects, arguments.overwrite, reduction.needs_whole)
        with unfinished(arguments.out, request, *kept_states) as run:
            for layer, reduced in reduced_in_sequence(source.folder, texts, reduction, counts, settings, run):
                note(layer, reduced.grouping, reduced.share_E)
            write(run.get)
    forget_beside(arguments.out)
    say_size(source.folder, arguments.out)


def _request(
    source: Streamed, texts: Texts, reduction: Reduction, counts: Mapping[LayerId, int], settings: Options
) -> dict[str, Any]:
    """All that the layers of a result depend on, as plain values."""
    limits = {
        layer: {name: tensor.tolist() for name, tensor in vars(one).items() if isinstance(tensor, Tensor)}
        for layer, one in reduction.limits.items()
    }
    return {
        "model": identity(source),
        "texts": digest_of([one.inputs for one in texts.batches]),
        "domains": [[one.domain for one in texts.batches], None if texts.weights is None else dict(texts.weights)],
        "method": [type(reduction.how).__name__, str(reduction.how), str(reduction.refitting), limits, reduction.seed],
        "experts": dict(counts),
        "settings": [
            str(settings.device),
            settings.reservoir,
            settings.seed,
            torch.get_num_threads(),
            torch.__version__,
        ],
    }


def packing(source: Streamed, arguments: argparse.Namespace, deletes: bool) -> Packing | None:
    """How ``--bits`` stores the experts of the result; None without it.

    Raises:
        ValueError: the result will be no stock checkpoint, or its experts cannot be packed; names the option.
    """
    if arguments.bits is None:
        if arguments.group_size is not None:
            raise ValueError("--group-size is of --bits, which is not given; give it too")
        return None
    if not deletes or arguments.budget != "uniform":
        raise ValueError(
            f"--bits {arguments.bits} packs a stock checkpoint, in which layers have the same number of experts and no others "
            "answer for them: delete the dropped ones and take --budget uniform"
        )
    if settings_of(source.config):
        raise ValueError(
            f"--bits {arguments.bits}: {source.folder} is quantised already; leave it out, or start from the plain model"
        )
    made = Packing(arguments.bits, arguments.group_size)
    return replace(made, group=made.check(source.folder, source.tensors.infos, len(source.layers)))


def mix(
    calibrated: Calibrated, counts: Mapping[LayerId, int], criterion: str, limits: Mapping[LayerId, Limits]
) -> dict[str, Any]:
    """Where ``--domains max-min`` asks for it, let the worst domain suffer least; what was found, as a JSON page by name.

    Weights are found once, for ``criterion`` and ``counts``, and serve all that comes after.
    """
    if getattr(calibrated.arguments, "domains", None) != MAX_MIN:
        return {}
    calibrated.weights, pages = max_min_weights(
        calibrated.by_domain, counts, criterion, limits, calibrated.weights, calibrated.arguments.seed
    )
    return pages


@contextlib.contextmanager
def workspace(arguments: argparse.Namespace) -> Iterator[Path]:
    """A folder beside the result for what does not fit into memory; gone afterwards."""
    parent = arguments.out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reduced-", dir=parent) as folder:
        yield Path(folder)
