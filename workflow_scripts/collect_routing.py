"""Collect routing statistics: what each expert receives on real tokens, and what every similarity needs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/collect_routing.py --model full --train train.parquet --samples 256 "
    "--table routing.parquet --statistics routing.safetensors"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="the fine-tuned model")
    parser.add_argument("--train", type=Path, required=True, help="training examples to draw from")
    parser.add_argument("--seed", type=int, default=0, help="which examples and tokens are drawn")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--table", type=Path, required=True, help="written: one row per layer and expert")
    parser.add_argument("--statistics", type=Path, required=True, help="written: sufficient statistics")
    parser.add_argument("--whiten", action="store_true", help="also keep what activation-aware decomposition needs")
    options.add_tokens(parser)
    options.add_section(parser, "data", only=("max_input", "max_label"))
    options.add_section(parser, "calibration")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.tables import read_table, write_table
    from mcsmoe.artefacts.tensors import TensorFolder
    from mcsmoe.calibration import text as cli_text
    from mcsmoe.calibration.files import save_statistics
    from mcsmoe.calibration.passes import collect_routing
    from mcsmoe.calibration.rows import rows_of
    from mcsmoe.calibration.tables import routing_frame
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.data.collate import calibration_batches, tokenize
    from mcsmoe.data.sequences import is_text
    from mcsmoe.evaluate.encoding import is_causal
    from mcsmoe.statistics.routing import RoutingStatistics
    from mcsmoe.train import processes

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, device=processes.start(arguments.device))
    tokenizer = load_tokenizer(arguments.model)
    rows = read_table(arguments.train, "examples")
    if is_causal(model):
        if is_text(rows):
            given: list[dict[Any, Any]] = [
                {"text": first + second} for first, second in zip(rows["input"], rows["target"], strict=True)
            ]
        else:
            given = rows[["input", "target"]].to_dict("records")
        batches = cli_text.batches(
            rows_of(given, str(arguments.train)),
            tokenizer=tokenizer,
            encoder_decoder=False,
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            max_tokens=arguments.max_input + arguments.max_label,
            seed=arguments.seed,
            vocabulary=cli_text.vocabulary_of(model),
        )
    else:
        limits = (arguments.max_input, arguments.max_label, arguments.tokens)
        with processes.main_first():
            train = tokenize(rows, tokenizer, *limits, vocabulary=cli_text.vocabulary_of(model), where=arguments.train)
        batches = calibration_batches(train, arguments.samples, arguments.batch_size, arguments.seed)
    statistics = collect_routing(
        model,
        adapter_for(model),
        batches,
        total=len(batches),
        statistics=RoutingStatistics(reservoir=arguments.reservoir, whiten=arguments.whiten, seed=arguments.seed),
    )
    if processes.is_main():
        write_table(arguments.table, routing_frame(statistics), "routing")
        save_statistics(arguments.statistics, statistics, TensorFolder(arguments.model).fingerprint)
    processes.end()


if __name__ == "__main__":
    console.run(main, parse())
