"""Answer the validation split with a checkpoint, or predict its texts, and score it with 95 % intervals."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe import console
from mcsmoe.workflow import options

if TYPE_CHECKING:
    from torch import nn

    from mcsmoe.data.tasks import Task
    from mcsmoe.evaluate.confidence import Interval

COMPARED = ("nats_lost", "divergence", "agreement")  # take a reference
CONTINUED = ("looping", "distinct_4grams")  # take continuations

EXAMPLE = (
    "python workflow_scripts/evaluate.py --model recovered --task SST-2 --examples validation.parquet "
    "--variant msmoe --experts 4 --stage recovered --predictions predictions.parquet --metrics metrics.parquet"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, stock or compact")
    parser.add_argument("--task", required=True, help="task name, or path of a task file")
    parser.add_argument("--examples", type=Path, required=True, help="examples of the split to report")
    parser.add_argument("--reference", type=Path, help="the full model, which predicted texts are compared with")
    parser.add_argument("--dense", action="store_true", help="the model has no experts")
    options.add_labels(parser)
    parser.add_argument("--split", default="validation", help="name of the split, for the table")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--predictions", type=Path, required=True, help="written: one row per example or document")
    parser.add_argument("--metrics", type=Path, required=True, help="written: scores")
    options.add_section(parser, "data", only=("max_input", "max_label"))
    options.add_section(parser, "evaluate")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import torch

    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.data.tasks import load_task
    from mcsmoe.device import pick

    torch.set_num_threads(arguments.threads)
    task, examples = load_task(arguments.task), read_table(arguments.examples, "examples")
    device = pick(arguments.device)
    model = load_model(arguments.model, device=device, dense=arguments.dense)
    given = {"model": model, "tokenizer": load_tokenizer(arguments.model), "examples": examples}
    given |= {name: getattr(arguments, name) for name in ("batch_size", "max_input", "max_label")}
    if task.is_language:
        reference = None if arguments.reference is None else load_model(arguments.reference, device=device)
        score_texts(arguments, task, given, reference)
    else:
        score_answers(arguments, task, given)


def score_answers(arguments: argparse.Namespace, task: Task, given: dict[str, Any]) -> None:
    """Answer every question, and score the answers."""
    from scipy.stats import binomtest

    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.evaluate.confidence import interval
    from mcsmoe.evaluate.metrics import positive_answer
    from mcsmoe.evaluate.protocols import predict

    protocol = task.asked(arguments.protocol)
    predictions = predict(**given, protocol=protocol, metric=task.metric)
    positive = positive_answer(given["examples"]["choices"].tolist())
    bootstrap = {"resamples": arguments.bootstrap, "seed": arguments.seed}
    found = [(metric, interval(metric, predictions, positive, **bootstrap)) for metric in task.metrics]
    rows = rows_of(arguments, task, protocol, found)
    if protocol in ("generate", "paper_compat"):
        counted, total = predictions.attrs["unparsed"], len(predictions)
        bounds = binomtest(counted, total).proportion_ci(method="wilson")
        rows.append(
            {**rows[0], "metric": "unparsed", "value": counted / total, "ci_low": bounds.low, "ci_high": bounds.high}
        )
    write_table(arguments.predictions, predictions, "predictions")
    write_metrics(arguments, rows)


def score_texts(arguments: argparse.Namespace, task: Task, given: dict[str, Any], reference: nn.Module | None) -> None:
    """Predict every document beside the full model, and score what was predicted by domain, and what each layer gives."""
    from mcsmoe.artefacts.names import EXPECTED_ERROR
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.calibration.layer_errors import LayerErrors
    from mcsmoe.checkpoint.lineage import expected_errors
    from mcsmoe.evaluate.confidence import Interval
    from mcsmoe.evaluate.documents import predict_texts
    from mcsmoe.evaluate.domains import scores

    asked = {**given, "reference": reference, "continuations": arguments.continuations}
    by_layer: list[tuple[str, Interval]] = []
    # A model without experts has no layer to hold beside the full model's.
    if reference is None or arguments.dense:
        documents = predict_texts(**asked)
    else:
        errors = LayerErrors(given["model"], reference)
        with errors.watching():
            documents = predict_texts(**asked)
        by_layer = list(errors.scores(arguments.bootstrap, arguments.seed))
        for layer, error in expected_errors(arguments.model).items():
            by_layer.append((f"{EXPECTED_ERROR}/{layer}", Interval(error, math.nan, math.nan, 0)))
    # What was not measured is no score of 0.
    absent = (() if reference is not None else COMPARED) + (() if arguments.continuations else CONTINUED)
    metrics = [name for name in task.metrics if name not in absent]
    found = [*scores(metrics, documents, arguments.bootstrap, arguments.seed), *by_layer]
    rows = rows_of(arguments, task, task.protocol, found)
    write_table(arguments.predictions, documents, "documents")
    write_metrics(arguments, rows)


def rows_of(
    arguments: argparse.Namespace, task: Task, protocol: str, found: Iterable[tuple[str, Interval]]
) -> list[dict[str, Any]]:
    """Rows of table ``metrics``, each also told in words."""
    rows = []
    for metric, score in found:
        labels = {"split": arguments.split, "protocol": protocol, "metric": metric}
        bounds = {"value": score.value, "ci_low": score.low, "ci_high": score.high, "n": score.n}
        rows.append({**options.labels(arguments, task.name), **labels, **bounds})
        interval = (
            "" if math.isnan(score.low) else f" (95 % interval {score.low:.4f} to {score.high:.4f}, n = {score.n})"
        )
        console.log.info("%s %.4f%s", metric, score.value, interval)
    return rows


def write_metrics(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write table ``metrics``."""
    import pandas as pd

    from mcsmoe.artefacts.tables import write_table

    write_table(arguments.metrics, pd.DataFrame(rows), "metrics")


if __name__ == "__main__":
    console.run(main, parse())
