"""Answer the validation split with a checkpoint, and score the answers with their 95 % intervals."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/evaluate.py --model recovered --task SST-2 --examples validation.parquet "
    "--variant msmoe --experts 4 --stage recovered --predictions predictions.parquet --metrics metrics.parquet"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, stock or compact")
    parser.add_argument("--task", required=True, help="task name, or path of a task file")
    parser.add_argument("--examples", type=Path, required=True, help="examples of the split to report")
    parser.add_argument("--dense", action="store_true", help="the model has no experts")
    options.add_labels(parser)
    parser.add_argument("--split", default="validation", help="name of the split, for the table")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--predictions", type=Path, required=True, help="written: one row per example")
    parser.add_argument("--metrics", type=Path, required=True, help="written: scores")
    options.add_section(parser, "data", only=("max_input", "max_label"))
    options.add_section(parser, "evaluate")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import pandas as pd
    import torch
    from scipy.stats import binomtest

    from mcsmoe.artefacts.tables import read_table, write_table
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.data.tasks import load_task
    from mcsmoe.device import pick
    from mcsmoe.evaluate.confidence import interval
    from mcsmoe.evaluate.metrics import positive_answer
    from mcsmoe.evaluate.protocols import predict

    torch.set_num_threads(arguments.threads)
    device = pick(arguments.device)
    model = load_model(arguments.model, device=device, dense=arguments.dense)
    tokenizer = load_tokenizer(arguments.model)
    task = load_task(arguments.task)
    protocol = task.asked(arguments.protocol)
    examples = read_table(arguments.examples, "examples")
    predictions = predict(
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        protocol=protocol,
        batch_size=arguments.batch_size,
        max_input=arguments.max_input,
        max_label=arguments.max_label,
        metric=task.metric,
    )
    positive = positive_answer(examples["choices"].tolist())
    rows = []
    for metric in task.metrics:
        found = interval(metric, predictions, positive, resamples=arguments.bootstrap, seed=arguments.seed)
        rows.append(
            {
                **options.labels(arguments, task.name),
                "split": arguments.split,
                "protocol": protocol,
                "metric": metric,
                "value": found.value,
                "ci_low": found.low,
                "ci_high": found.high,
                "n": found.n,
            }
        )
        words = f"{metric} {found.value:.4f} (95 % interval {found.low:.4f} to {found.high:.4f}, n = {found.n})"
        console.log.info(words)
    if protocol in ("generate", "paper_compat"):
        counted, total = predictions.attrs["unparsed"], len(predictions)
        bounds = binomtest(counted, total).proportion_ci(method="wilson")
        rows.append(
            {**rows[0], "metric": "unparsed", "value": counted / total, "ci_low": bounds.low, "ci_high": bounds.high}
        )
    write_table(arguments.predictions, predictions, "predictions")
    write_table(arguments.metrics, pd.DataFrame(rows), "metrics")


if __name__ == "__main__":
    console.run(main, parse())
