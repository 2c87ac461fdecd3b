"""Collect gradients and their squares on calibration examples, for the methods that ask for them."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/collect_gradients.py --model full --train train.parquet --samples 256 "
    "--gradients gradients.safetensors"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="the fine-tuned model")
    parser.add_argument("--train", type=Path, required=True, help="training examples to draw from")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--gradients", type=Path, required=True, help="written: gradients and Fisher information")
    options.add_tokens(parser)
    options.add_section(parser, "data", only=("max_input", "max_label"))
    options.add_section(parser, "calibration", only=("samples", "threads"))
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.calibration.files import gradient_tensors, save_tensors
    from mcsmoe.calibration.passes import collect_gradients
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.data.collate import calibration_batches, tokenize
    from mcsmoe.data.vocabulary import vocabulary_of
    from mcsmoe.device import pick
    from mcsmoe.evaluate.encoding import is_causal

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, device=pick(arguments.device))
    tokenizer = load_tokenizer(arguments.model)
    rows = read_table(arguments.train, "examples")
    limits = (arguments.max_input, arguments.max_label, arguments.tokens)
    causal = is_causal(model)
    train = tokenize(rows, tokenizer, *limits, vocabulary=vocabulary_of(model), where=arguments.train, causal=causal)
    # One example at a time: Fisher information is a mean of squares.
    batches = calibration_batches(train, arguments.samples, 1, arguments.seed)
    found = collect_gradients(model, adapter_for(model), batches, len(batches))
    save_tensors(arguments.gradients, gradient_tensors(*found))


if __name__ == "__main__":
    console.run(main, parse())
