"""Align the neurons of every expert to those of expert 0; the model computes the same function afterwards."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = "python workflow_scripts/permute.py --model full --out permuted --permutation permutation.parquet"


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint whose experts are aligned")
    parser.add_argument("--alignment", choices=["weight", "weight-input", "activation"], default="weight", help="what")
    parser.add_argument("--routing", type=Path, help="routing statistics, for alignment by activations")
    parser.add_argument("--out", type=Path, required=True, help="written: checkpoint folder")
    parser.add_argument("--permutation", type=Path, required=True, help="written: the permutations")
    options.add_section(parser, "merge", only=("threads",))
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.calibration.files import load_statistics
    from mcsmoe.checkpoint.lineage import lineage, origin
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.checkpoint.save import save_model
    from mcsmoe.transform.align import AlignmentSettings, align_layers, permutation_frame
    from mcsmoe.transform.layers import ModelLayers

    torch.set_num_threads(arguments.threads)
    settings = options.record(AlignmentSettings, arguments)
    statistics = load_statistics(arguments.routing, lineage(arguments.model)) if arguments.routing else None
    settings.check(statistics)
    model = load_model(arguments.model)
    alignments = align_layers(ModelLayers(model, adapter_for(model)), settings, statistics)
    write_table(arguments.permutation, permutation_frame(alignments), "permutation")
    tokenizer = load_tokenizer(arguments.model)
    provenance = {"stage": "permute", "alignment": arguments.alignment, **origin(arguments.model)}
    save_model(model, arguments.out, tokenizer, provenance)


if __name__ == "__main__":
    console.run(main, parse())
