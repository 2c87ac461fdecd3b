"""``mcsmoe compress``: experts as low-rank factors and the strongest rows of what they leave."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mcsmoe.cli import options

if TYPE_CHECKING:
    from torch import Tensor

    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.statistics.routing import RoutingStatistics
    from mcsmoe.types import LayerId

NAME = "compress"
HELP = """Split every expert into low-rank factors and the strongest rows of what they leave, one layer at a time.

Nothing is trained: rows are kept by magnitude, or, with --calibration or --statistics, by what they add to the outputs.
The workflow prunes rows while it trains on, with distillation, and loses less. Layers that merging left alone stay so.
"""
EXAMPLE = "mcsmoe compress merged --rank 32 --keep 0.1 --out compressed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder, merged or not")
    parser.add_argument("--rank", type=int, default=32, help="rank of the low-rank part")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the residual's rows that are kept")
    options.add_excluded(parser)
    options.add_out(parser)
    options.add_statistics(parser)


def run(arguments: argparse.Namespace) -> None:
    """Split experts into low-rank factors and the strongest rows of what they leave, without training."""
    options.prepare(arguments)
    from mcsmoe.checkpoint.format import layer_specs
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._calibration import statistics
    from mcsmoe.cli._outputs import copy_groups, say_size
    from mcsmoe.console import log, progress

    if not 0 < arguments.keep <= 1:
        raise ValueError(f"--keep is {arguments.keep}; give a share of the rows above 0 and up to 1")
    source = Streamed(arguments.model)
    found = None
    if arguments.calibration is not None or arguments.statistics is not None:
        found = statistics(source, arguments, saliency=False)
    specs = layer_specs(source.folder)
    if any(spec.compression is not None for spec in specs.values()):
        raise ValueError(f"{source.folder}: is compressed already")
    unknown = sorted(set(arguments.exclude_layers) - set(source.layers))
    if unknown:
        raise ValueError(f"--exclude-layers names {unknown[0]!r}, which is not a layer; there are {source.layers}")
    # A layer that merging left alone is left alone here too.
    merged = list(specs) if specs else source.layers
    chosen = [layer for layer in source.layers if layer in merged and layer not in arguments.exclude_layers]
    settings = {"rank": arguments.rank, "keep": arguments.keep, "activation_aware": found is not None}
    provenance = {"stage": "compress", "tool": "mcsmoe compress", "settings": settings, "parent": source.digest}

    def change(layer: LayerId) -> None:
        _compress_layer(source, layer, arguments.rank, arguments.keep, found)

    source.rewrite(arguments.out, change, provenance, layers=progress(chosen, "compress", total=len(chosen)))
    copy_groups(source.folder, arguments.out)
    say_size(source.folder, arguments.out)
    log.info("nothing was trained: the workflow's compress stage prunes rows while training, and loses less")


def _compress_layer(
    source: Streamed, layer: LayerId, rank: int, keep: float, statistics: RoutingStatistics | None
) -> None:
    """Rows are ranked by their norm, or by the norm of what they add to the outputs on the calibration tokens."""
    from mcsmoe import modules
    from mcsmoe.modules import LowRankProjection, RedirectedExperts
    from mcsmoe.transform.compress import input_grams, split_experts

    model, adapter = source.model, source.adapter
    grams: dict[str, Tensor] = {}
    if statistics is not None:
        weights, table = adapter.read_experts(model, layer), adapter.expert_to_group(model, layer)
        grams = input_grams(weights, table, statistics.layers[layer], adapter.activation(model, layer))
    split_experts(model, adapter, rank, statistics, [layer])
    for module in model.get_submodule(layer).modules():
        if not isinstance(module, RedirectedExperts):
            continue
        for name in module.roles:
            projection = module.projection(name)
            assert isinstance(projection, LowRankProjection)
            residual_Goi = projection.residual_Goi.detach()
            squared_Goi = residual_Goi.double() if name not in grams else residual_Goi.double() @ grams[name].double()
            score_Go = (squared_Goi * residual_Goi.double()).sum(dim=2)
            count = max(1, round(keep * score_Go.numel()))
            order = score_Go.flatten().argsort(descending=True, stable=True)
            residual_Goi.flatten(0, 1)[order[count:]] = 0
    modules.pack(model.get_submodule(layer))
