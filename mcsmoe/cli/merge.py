"""``mcsmoe merge``: fewer experts, from a stock checkpoint and its routing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.cli import options
from mcsmoe.methods import BACKWARD, MERGES, SIMILARITIES
from mcsmoe.workflow.method_options import add_method

if TYPE_CHECKING:
    from torch import Tensor

    from mcsmoe.calibration.evidence import Evidence
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.types import LayerId

NAME = "merge"
HELP = """Merge the experts of a Mixture-of-Experts checkpoint by its routing statistics.

Layers are read, merged and written one at a time: peak memory is that of one sparse layer and its copies. For the
statistics, what is not an expert stays in memory and experts are read from the files as they are called (--statistics
skips that pass). Nothing is trained: the workflow recovers what merging loses.
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
    arguments.budget = arguments.budget or MERGES[arguments.method].budget
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.calibration.evidence import Evidence
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._calibration import statistics
    from mcsmoe.cli._outputs import GROUPS, say_size
    from mcsmoe.console import progress
    from mcsmoe.transform.group import groups_frame

    for what, needs in (
        (arguments.similarity, SIMILARITIES[arguments.similarity].needs),
        (arguments.method, MERGES[arguments.method].needs),
    ):
        if needs & BACKWARD:
            raise ValueError(f"{what} needs gradients, which the workflow collects; here choose another")
    source = Streamed(arguments.model)
    _check_experts(source, arguments)
    saliency = "saliency" in MERGES[arguments.method].needs
    found = statistics(source, arguments, saliency=saliency)
    if saliency and not all(bool(one.saliency_tokens_E.any()) for one in found.layers.values()):
        raise ValueError(
            f"--method {arguments.method} needs the experts' saliency, which --statistics has not; give --calibration"
        )
    merger = _Merger(source, arguments, Evidence(found, {}, {}))
    merger.group()
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    provenance = {"stage": "merge", "tool": "mcsmoe merge", "settings": settings, "parent": source.digest}
    frame = groups_frame(merger.groupings, merger.evidence, arguments.method, arguments.seed)
    source.rewrite(
        arguments.out,
        merger.merge,
        provenance,
        layers=progress(source.layers, "merge"),
        extra=lambda folder: write_table(folder / GROUPS, frame, "groups"),
    )
    say_size(source.folder, arguments.out)


class _Merger:
    """One layer at a time: similarity first, since a budget over all layers needs them all, then the merge."""

    def __init__(self, source: Streamed, arguments: argparse.Namespace, evidence: Evidence) -> None:
        self.source, self.arguments, self.evidence = source, arguments, evidence
        self.groupings: dict[LayerId, Any] = {}
        self._permutations: dict[LayerId, Tensor] = {}

    def group(self) -> None:
        from mcsmoe.console import progress
        from mcsmoe.grouping import plan
        from mcsmoe.transform.group import importance

        source, arguments = self.source, self.arguments
        needs = SIMILARITIES[arguments.similarity].needs
        similarity: dict[LayerId, Tensor] = {}
        for layer in progress(source.layers, "similarity"):
            if needs <= {"statistics"}:
                similarity[layer] = self._similarity(layer)
                continue
            with source.layer(layer):
                if needs & {"weights", "tokens"}:
                    self._align(layer)
                similarity[layer] = self._similarity(layer)
        self.groupings = plan(
            {layer: importance(self.evidence.layer(layer), arguments.method) for layer in source.layers},
            similarity,
            arguments.experts,
            method=arguments.grouping,
            budget=arguments.budget,
            capacity=arguments.capacity,
            linkage=arguments.linkage,
            seed=arguments.seed,
            excluded=arguments.exclude_layers,
        )

    def _similarity(self, layer: LayerId) -> Tensor:
        from mcsmoe.transform.group import layer_similarity

        source, arguments = self.source, self.arguments
        return layer_similarity(
            source.model, source.adapter, layer, arguments.similarity, self.evidence, arguments.seed
        )

    def _align(self, layer: LayerId) -> None:
        """Align all experts of a layer that is in memory to its expert 0, where that is asked for."""
        import torch

        from mcsmoe.align import apply_permutation
        from mcsmoe.transform.align import align_layer

        how, model, adapter = self.arguments.alignment, self.source.model, self.source.adapter
        if how == "none" or how.endswith("-dominant"):
            return
        weights = adapter.read_experts(model, layer)
        if layer not in self._permutations:
            reference_E = torch.zeros(weights.num_experts, dtype=torch.int64)
            found = align_layer(
                weights,
                reference_E,
                how,
                self.evidence.layer(layer),
                adapter.activation(model, layer),
                workers=self.arguments.threads,
                layer=layer,
            )
            self._permutations[layer] = found.permutation_EF
        adapter.write_experts(model, layer, apply_permutation(weights, self._permutations[layer], layer))

    def merge(self, layer: LayerId) -> None:
        from mcsmoe.console import log
        from mcsmoe.transform.merge import merge_layer

        grouping = self.groupings[layer]
        log.info("%s: %d experts in %d groups", layer, grouping.num_experts, grouping.num_groups)
        if grouping.num_groups == grouping.num_experts:
            return
        self._align(layer)
        merge_layer(
            self.source.model,
            self.source.adapter,
            layer,
            grouping,
            self.arguments.method,
            self.evidence,
            alignment=self.arguments.alignment,
            seed=self.arguments.seed,
            workers=self.arguments.threads,
        )


def _check_experts(source: Streamed, arguments: argparse.Namespace) -> None:
    for layer in source.layers:
        experts = source.adapter.num_experts(source.model, layer)
        if source.adapter.expert_to_group(source.model, layer).unique().numel() != experts:
            raise ValueError(f"{source.folder}: layer {layer!r} is merged already; start from the model it came from")
        if not 1 <= arguments.experts <= experts:
            raise ValueError(f"--experts is {arguments.experts}; layer {layer!r} has {experts}, give 1 to {experts}")
    if source.compact:
        raise ValueError(f"{source.folder}: is compressed already; merge first, then compress")
