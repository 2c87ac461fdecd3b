"""Merge every group of experts into one that is stored once; the router keeps its outputs and is redirected."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options
from mcsmoe.workflow.method_options import add_method

EXAMPLE = (
    "python workflow_scripts/merge.py --model permuted --permutation permutation.parquet --groups groups.parquet "
    "--routing routing.safetensors --merge frequency --out merged"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint whose experts are merged")
    parser.add_argument("--permutation", type=Path, help="neuron order, if changed after calibration")
    parser.add_argument("--groups", type=Path, required=True, help="groups")
    parser.add_argument("--routing", type=Path, required=True, help="routing statistics")
    parser.add_argument("--gradients", type=Path, help="Fisher information, for merging by it")
    add_method(parser, ("merge",), start="msmoe")
    add_method(parser, ("alignment",))
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--out", type=Path, required=True, help="written: compact checkpoint folder")
    options.add_section(parser, "merge", only=("threads",))
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.digests import digest_directory
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.calibration.evidence import Evidence
    from mcsmoe.checkpoint.lineage import lineage, origin
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.checkpoint.save import save_model
    from mcsmoe.transform.layers import ModelLayers
    from mcsmoe.transform.merge import MergeSettings, groupings_of, merge_layers

    torch.set_num_threads(arguments.threads)
    settings = options.record(MergeSettings, arguments)
    evidence = Evidence.read(arguments.routing, arguments.gradients, arguments.permutation, lineage(arguments.model))
    settings.check(evidence)
    model = load_model(arguments.model)
    layers = ModelLayers(model, adapter_for(model))
    merge_layers(layers, groupings_of(read_table(arguments.groups, "groups"), layers.ids), settings, evidence)
    provenance = {"stage": "merge", "merge": arguments.merge, "parent": digest_directory(arguments.model)}
    provenance |= origin(arguments.model)
    save_model(model, arguments.out, load_tokenizer(arguments.model), provenance)


if __name__ == "__main__":
    console.run(main, parse())
