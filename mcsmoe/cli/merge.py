"""``mcsmoe merge``: fewer experts, from a stock checkpoint and its routing."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe.cli import options
from mcsmoe.methods import BACKWARD, MERGES, SIMILARITIES
from mcsmoe.workflow.method_options import add_method
from mcsmoe.workflow.options import record

NAME = "merge"
HELP = """Merge the experts of a Mixture-of-Experts checkpoint by its routing statistics.

Layers are read, merged and written one at a time: peak memory is that of one sparse layer and its copies. For the
statistics all rows go through one block of the model after another (--statistics takes those of mcsmoe collect instead).
Nothing is trained: the workflow recovers what merging loses.
"""
EXAMPLE = "mcsmoe merge full --calibration train.jsonl --experts 8 --out merged"
_SETTINGS = ("experts", "similarity", "grouping", "budget", "alignment", "method", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="stock checkpoint folder, or a model on the hub")
    parser.add_argument("--experts", type=int, required=True, help="experts to keep per layer, on average")
    options.add_out(parser)
    options.add_statistics(parser)
    group = parser.add_argument_group("method")
    add_method(group, ("similarity", "grouping", "budget", "alignment", "linkage", "capacity"), start="msmoe")
    add_method(group, ("merge",), start="msmoe", name="method")
    parser.set_defaults(budget=None)
    options.add_excluded(group)


def run(arguments: argparse.Namespace) -> None:
    """Group and merge the experts of a stock checkpoint."""
    options.prepare(arguments)
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.calibration.evidence import Evidence
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._calibration import statistics
    from mcsmoe.cli._outputs import GROUPS, say_size
    from mcsmoe.transform.align import Aligner, AlignmentSettings
    from mcsmoe.transform.group import GroupSettings, group_layers, groups_frame
    from mcsmoe.transform.merge import MergeSettings, merge_layers
    from mcsmoe.transform.on_disk import CheckpointLayers, Output

    method = arguments.method
    arguments.budget = arguments.budget or MERGES[method].budget
    _refuse_gradients(arguments.similarity, SIMILARITIES[arguments.similarity].needs)
    _refuse_gradients(method, MERGES[method].needs)
    grouping = record(GroupSettings, arguments, merge=method)
    merging = record(MergeSettings, arguments, merge=method)
    source = Streamed(arguments.model)
    grouping.check(CheckpointLayers(source))
    if source.compact:
        raise ValueError(f"{source.folder}: is compressed already; merge first, then compress")
    evidence = Evidence(statistics(source, arguments), {}, {})
    merging.check(evidence)
    align = Aligner(record(AlignmentSettings, arguments), evidence.routing)
    groups = group_layers(CheckpointLayers(source), grouping, evidence, align)
    frame = groups_frame(groups.groupings, grouping, evidence)
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    output = Output(
        arguments.out,
        {"stage": "merge", "tool": "mcsmoe merge", "settings": settings, "parent": source.digest},
        extra=lambda folder: write_table(folder / GROUPS, frame, "groups"),
    )
    merge_layers(CheckpointLayers(source, output), groups.groupings, merging, evidence, align)
    say_size(source.folder, arguments.out)


def _refuse_gradients(name: str, needs: frozenset[str]) -> None:
    if needs & BACKWARD:
        raise ValueError(f"{name} needs gradients, which the workflow collects; here choose another")
