"""Decide which experts of each layer are merged into which group."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options
from mcsmoe.workflow.method_options import add_method

EXAMPLE = (
    "python workflow_scripts/group.py --model permuted --permutation permutation.parquet "
    "--routing routing.safetensors --experts 4 --similarity-table similarity.parquet --groups groups.parquet"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint whose experts are grouped")
    parser.add_argument("--permutation", type=Path, help="neuron order, if changed after calibration")
    parser.add_argument("--routing", type=Path, required=True, help="routing statistics")
    parser.add_argument("--gradients", type=Path, help="gradients, for the bases that compare them")
    parser.add_argument("--experts", type=int, required=True, help="experts to keep per layer, on average")
    add_method(parser, ("similarity", "grouping", "budget", "linkage"))
    add_method(parser, ("merge",), start="msmoe")
    parser.add_argument("--seed", type=int, default=0, help="of random and spectral grouping")
    parser.add_argument("--similarity-table", type=Path, required=True, help="written: similarities")
    parser.add_argument("--groups", type=Path, required=True, help="written: groups")
    options.add_section(parser, "merge")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.calibration.evidence import Evidence
    from mcsmoe.checkpoint.lineage import lineage
    from mcsmoe.checkpoint.load import load_model
    from mcsmoe.transform.group import GroupSettings, group_layers, groups_frame, similarity_frame
    from mcsmoe.transform.layers import ModelLayers

    torch.set_num_threads(arguments.threads)
    settings = options.record(GroupSettings, arguments)
    evidence = Evidence.read(arguments.routing, arguments.gradients, arguments.permutation, lineage(arguments.model))
    model = load_model(arguments.model)
    groups = group_layers(ModelLayers(model, adapter_for(model)), settings, evidence)
    write_table(arguments.similarity_table, similarity_frame(settings.similarity, groups.similarity), "similarity")
    write_table(arguments.groups, groups_frame(groups.groupings, settings, evidence), "groups")


if __name__ == "__main__":
    console.run(main, parse())
