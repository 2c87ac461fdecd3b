"""``mcsmoe merge``: fewer experts, from a stock checkpoint and its routing."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mcsmoe.cli import options
from mcsmoe.methods import BACKWARD, MERGES, MERGES_ON_TOKENS, PRESETS, REFIT, SIMILARITIES, aligned_in_sequence
from mcsmoe.workflow.method_options import add_method
from mcsmoe.workflow.options import record

NAME = "merge"
HELP = """Merge the experts of a Mixture-of-Experts checkpoint by its routing statistics.

Layers are read, merged and written one at a time: peak memory is that of one sparse layer and its copies. For the
statistics all rows go through one block of the model after another (--statistics takes those of mcsmoe collect instead).
Nothing is trained: the workflow recovers what merging loses.
"""
EXAMPLE = "mcsmoe merge full --calibration train.jsonl --experts 8 --out merged"
_SETTINGS = ("experts", "similarity", "grouping", "budget", "alignment", "method", "domains", "seed")

_FIELDS = ("similarity", "grouping", "budget", "alignment", "linkage", "capacity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="stock checkpoint folder, or a model on the hub")
    parser.add_argument("--experts", type=int, required=True, help="experts to keep per layer, on average")
    options.add_out(parser)
    options.add_prediction(parser)
    options.add_statistics(parser)
    options.add_blend(parser)
    group = parser.add_argument_group("method")
    add_method(group, _FIELDS, start="msmoe")
    names = [*MERGES, *(name for name in PRESETS if name not in MERGES), *(f"{name}{REFIT}" for name in PRESETS)]
    group.add_argument(
        "--method",
        choices=names,
        default="frequency",
        metavar="NAME",
        help=f"a merge, which the other options complete, or a published method with all it says: {', '.join(names)}",
    )
    parser.set_defaults(**dict.fromkeys(_FIELDS))
    options.add_refit(group)
    options.add_packing(group)
    group.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="merge each layer by what the merged layers before it give; so are published methods with a uniform budget",
    )
    options.add_excluded(group)


def run(arguments: argparse.Namespace) -> None:
    """Group and merge the experts of a stock checkpoint."""
    options.prepare(arguments)
    complete(arguments)
    _refuse_gradients(arguments.similarity, SIMILARITIES[arguments.similarity].needs)
    if arguments.method in MERGES:
        _refuse_gradients(arguments.method, MERGES[arguments.method].needs)
    if in_sequence(arguments):
        _reduce(arguments)
    elif arguments.bits is not None:
        raise ValueError("--bits packs what is reduced in sequence: give --calibration FILE with a method such as ream")
    else:
        _merge(arguments)


def complete(arguments: argparse.Namespace) -> None:
    """Fill in what the named method says and the options do not; ``method`` is the merge itself afterwards."""
    name = arguments.method
    if name.endswith(REFIT) and name not in MERGES:
        name, arguments.refit = name.removesuffix(REFIT), True
    completed = replace(PRESETS["msmoe"], merge=name, budget=MERGES[name].budget) if name in MERGES else None
    preset = PRESETS[name] if completed is None else completed
    as_preset = arguments.alignment is None
    for field in _FIELDS:
        if getattr(arguments, field) is None:
            setattr(arguments, field, getattr(preset, field))
    arguments.published = completed is None
    arguments.method = preset.merge or preset.criterion
    if as_preset and in_sequence(arguments):
        arguments.alignment = aligned_in_sequence(replace(preset, similarity=arguments.similarity)).alignment


def in_sequence(arguments: argparse.Namespace) -> bool:
    """Whether layers are merged one after another on the states of the merged ones.

    Raises:
        ValueError: the method must, and may not; names the option.
    """
    must = arguments.refit or arguments.method not in MERGES
    if must and (arguments.sequential is False or arguments.calibration is None):
        what = "--refit" if arguments.refit else f"--method {arguments.method}"
        raise ValueError(f"{what} works on tokens, layer after layer; give --calibration FILE, without --no-sequential")
    if arguments.sequential is not None and not must:
        if arguments.sequential and arguments.calibration is None:
            raise ValueError("--sequential needs the text itself; give --calibration FILE")
        return bool(arguments.sequential)
    whole = arguments.calibration is not None and arguments.save_statistics is None and not arguments.exclude_layers
    return bool(must or (arguments.published and arguments.budget == "uniform" and whole))


def _reduce(arguments: argparse.Namespace) -> None:
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli import _reduce
    from mcsmoe.cli._blend import MIXED_BY
    from mcsmoe.cli._calibrated import Calibrated
    from mcsmoe.cli._outputs import say_engines
    from mcsmoe.transform.reduce import Merging, Reduction

    merging = record(Merging, arguments, merge=arguments.method)
    refitting = options.refitting(arguments)
    source = Streamed(arguments.model)
    source.keeps_prediction = arguments.mtp == "keep"
    _reduce.check_whole(source)
    arguments.remove = None
    drops = (MERGES | MERGES_ON_TOKENS)[arguments.method].drops
    packing = _reduce.packing(source, arguments, drops)
    calibrated = Calibrated(source, arguments)
    counts = _reduce.counts(calibrated, drops)
    if drops:
        say_engines(source, counts.values())
    settings = {
        name: getattr(arguments, name) for name in (*_SETTINGS, "refit", "ridge", "refit_target", "bits", "group_size")
    }
    provenance = {"stage": "merge", "tool": "mcsmoe merge", "settings": settings, **source.origin}
    reduction = Reduction(merging, refitting, seed=arguments.seed)
    pages = _reduce.mix(calibrated, counts, MIXED_BY, {})
    _reduce.reduce_checkpoint(calibrated, reduction, counts, provenance, pages=pages, packing=packing)


def _merge(arguments: argparse.Namespace) -> None:
    from mcsmoe.artefacts.atomic import write_json
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.calibration.evidence import Evidence
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._beside import forget_beside
    from mcsmoe.cli._blend import check_weights, weighed
    from mcsmoe.cli._calibration import statistics
    from mcsmoe.cli._outputs import GROUPS, say_size
    from mcsmoe.transform.align import Aligner, AlignmentSettings
    from mcsmoe.transform.group import GroupSettings, group_layers, groups_frame
    from mcsmoe.transform.merge import MergeSettings, merge_layers
    from mcsmoe.transform.on_disk import CheckpointLayers, Output

    method = arguments.method
    grouping = record(GroupSettings, arguments, merge=method)
    merging = record(MergeSettings, arguments, merge=method)
    source = Streamed(arguments.model)
    source.keeps_prediction = arguments.mtp == "keep"
    grouping.check(CheckpointLayers(source))
    if source.compact:
        raise ValueError(f"{source.folder}: is compressed already; merge first, then compress")
    check_weights(arguments)
    found, pages = weighed(statistics(source, arguments), dict.fromkeys(source.layers, arguments.experts), arguments)
    evidence = Evidence(found, {}, {})
    merging.check(evidence)
    align = Aligner(record(AlignmentSettings, arguments), evidence.routing)
    groups = group_layers(CheckpointLayers(source), grouping, evidence, align)
    frame = groups_frame(groups.groupings, grouping, evidence)
    settings = {name: getattr(arguments, name) for name in _SETTINGS}

    def extra(folder: Path) -> None:
        write_table(folder / GROUPS, frame, "groups")
        for name, page in pages.items():
            write_json(folder / name, page)

    output = Output(
        arguments.out,
        {"stage": "merge", "tool": "mcsmoe merge", "settings": settings, **source.origin},
        extra=extra,
    )
    merge_layers(CheckpointLayers(source, output), groups.groupings, merging, evidence, align)
    forget_beside(arguments.out)
    say_size(source.folder, arguments.out)


def _refuse_gradients(name: str, needs: frozenset[str]) -> None:
    if needs & BACKWARD:
        raise ValueError(f"{name} needs gradients, which the workflow collects; here choose another")
