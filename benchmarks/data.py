"""The data path: share of padding with and without batches by length, the cost of tokenising, and loader against model.

On the training rows of a task (generated, or real ones from a table ``examples``) with a trained tokenizer. The loader's
time is that of making every batch of an epoch; the model's that of a training step of a small Switch on some of
them. An epoch is bound by the model as long as the loader's share of it is small.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import parser, run


def arguments() -> argparse.ArgumentParser:
    made = parser(
        (__doc__ or "").strip(),
        "python benchmarks/data.py --model results/SST-2/seed0/full --examples results/SST-2/seed0/examples/train.parquet",
    )
    made.set_defaults(threads=1)
    made.add_argument("--model", type=Path, required=True, help="checkpoint: its tokenizer and its training step")
    made.add_argument("--examples", type=Path, required=True, help="table of training examples")
    made.add_argument("--batch-size", type=int, default=64, help="examples")
    made.add_argument("--max-input", type=int, default=512, help="longest input, in tokens")
    made.add_argument("--max-label", type=int, default=128, help="longest target, in tokens")
    made.add_argument("--steps", type=int, default=15, help="training steps that are timed")
    return made


def step_seconds(model: Any, batches: list[dict[str, Any]]) -> list[float]:
    import torch

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.train.objectives import TaskObjective

    objective = TaskObjective(adapter_for(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    found = []
    for batch in batches:
        start = time.perf_counter()
        objective(model, batch, objective.prepare(batch))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(time.perf_counter() - start)
    return found[1:]


def main(options: argparse.Namespace) -> None:
    import torch

    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.data.collate import TaskBatches, padding_share, tokenize

    torch.set_num_threads(options.threads)
    rows, tokenizer = read_table(options.examples, "examples"), load_tokenizer(options.model)
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for _ in range(2):
            start = time.perf_counter()
            made = tokenize(rows, tokenizer, options.max_input, options.max_label, cache=folder)
            times.append(time.perf_counter() - start)
    print(f"{len(made)} examples: tokenised in {times[0]:.2f} s, read from the cache in {times[1]:.3f} s")
    share = padding_share(made, options.batch_size)
    print(f"padding: {share.shuffled:.1%} of the positions in shuffled batches, {share.by_length:.1%} by length")
    batches = TaskBatches(made, options.batch_size, seed=0)
    start = time.perf_counter()
    for step in range(batches.steps_per_epoch):
        batches.batch(step)
    loader = time.perf_counter() - start
    model = load_model(options.model).train()
    model_step = statistics.median(step_seconds(model, [batches.batch(step) for step in range(options.steps + 1)]))
    epoch = model_step * batches.steps_per_epoch
    print(
        f"an epoch of {batches.steps_per_epoch} steps: loader {loader:.2f} s, model {epoch:.1f} s; "
        f"the loader's share is {loader / (loader + epoch):.2%}"
    )


if __name__ == "__main__":
    run(main, arguments().parse_args())
