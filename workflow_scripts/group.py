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
    from mcsmoe.checkpoint.load import load_model
    from mcsmoe.grouping import plan
    from mcsmoe.transform.group import groups_frame, importance, layer_similarity, similarity_frame

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    adapter = adapter_for(model)
    evidence = Evidence.read(arguments.routing, arguments.gradients, arguments.permutation)
    layers = adapter.layers(model)
    similarity = {
        layer: layer_similarity(model, adapter, layer, arguments.similarity, evidence, arguments.seed)
        for layer in console.progress(layers, "similarity")
    }
    importances = {layer: importance(evidence.layer(layer), arguments.merge) for layer in layers}
    groupings = plan(
        importances,
        similarity,
        arguments.experts,
        method=arguments.grouping,
        budget=arguments.budget,
        capacity=arguments.capacity,
        linkage=arguments.linkage,
        seed=arguments.seed,
        excluded=arguments.exclude_layers,
    )
    write_table(arguments.similarity_table, similarity_frame(arguments.similarity, similarity), "similarity")
    frame = groups_frame(groupings, evidence, arguments.merge, arguments.seed)
    write_table(arguments.groups, frame, "groups")
    for layer, grouping in groupings.items():
        console.log.info("%s: %d experts in %d groups", layer, grouping.num_experts, grouping.num_groups)


if __name__ == "__main__":
    console.run(main, parse())
