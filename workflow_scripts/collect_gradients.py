"""Collect gradients and their squares on calibration examples, for the methods that ask for them."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console, options

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

    from mcsmoe import calibrate, checkpoint
    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.data.collate import calibration_batches, tokenize
    from mcsmoe.device import pick
    from mcsmoe.tables import read_table

    torch.set_num_threads(arguments.threads)
    model = checkpoint.load(arguments.model, device=pick(arguments.device))
    tokenizer = checkpoint.load_tokenizer(arguments.model)
    rows = read_table(arguments.train, "examples")
    train = tokenize(rows, tokenizer, arguments.max_input, arguments.max_label, arguments.tokens)
    # One example at a time: Fisher information is a mean of squares.
    batches = calibration_batches(train, arguments.samples, 1, arguments.seed)
    found = calibrate.collect_gradients(model, adapter_for(model), batches, len(batches))
    calibrate.save_tensors(arguments.gradients, calibrate.gradient_tensors(*found))


if __name__ == "__main__":
    console.run(main, parse())
