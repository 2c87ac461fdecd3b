"""Run the full model once over the rows that students learn from, and keep its final decoder states for all of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = "python workflow_scripts/cache_teacher.py --model full --train train.parquet --out teacher"


def students(text: str) -> list[dict[str, Any]]:
    """Trainings that learn from the teacher, as JSON."""
    try:
        found = json.loads(text)
        if all({"steps", "epochs", "batch_size"} <= set(one) for one in found):
            return [dict(one) for one in found]
    except (ValueError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no JSON list of objects with steps, epochs and batch_size")


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="the full model")
    parser.add_argument("--train", type=Path, required=True, help="training examples")
    parser.add_argument(
        "--students",
        type=students,
        help='JSON, steps, epochs and batch_size of each training, such as \'[{"steps": 60, "epochs": 1, "batch_size": 16}]\'; '
        "only the rows that one of them sees are kept; all rows if left out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the students' order of rows")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="written: folder of the cache")
    options.add_tokens(parser)
    options.add_section(parser, "data", only=("max_input", "max_label"))
    options.add_section(parser, "evaluate", only=("batch_size", "threads"))
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.data.collate import collate, evaluation_batches, tokenize
    from mcsmoe.data.vocabulary import vocabulary_of
    from mcsmoe.device import pick
    from mcsmoe.evaluate.encoding import is_causal
    from mcsmoe.train.stages import rows_learnt
    from mcsmoe.train.teacher import cache_teacher

    torch.set_num_threads(arguments.threads)
    device = pick(arguments.device)
    model, tokenizer = load_model(arguments.model, device=device), load_tokenizer(arguments.model)
    rows = read_table(arguments.train, "examples")
    limits = (arguments.max_input, arguments.max_label, arguments.tokens)
    causal = is_causal(model)
    train = tokenize(rows, tokenizer, *limits, vocabulary=vocabulary_of(model), where=arguments.train, causal=causal)
    seen = None
    if arguments.students:
        seen = set().union(*(rows_learnt(one, train, arguments.seed) for one in arguments.students))
        console.log.info("%d of %d rows are learnt from", len(seen), len(train))
    cache_teacher(
        model,
        evaluation_batches(train, arguments.batch_size, seen),
        lambda indices: collate(train, indices),
        train.label_counts.tolist(),
        arguments.out,
        {"examples": train.digest, "model": str(arguments.model)},
        device,
    )


if __name__ == "__main__":
    console.run(main, parse())
