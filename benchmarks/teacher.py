"""Time a training step that learns from the teacher's cache against one that runs the teacher beside the student.

Both steps are timed in turn, again and again, in the same process, on the same batches; the ratio is the median over the
repeats of (cached / online) of the same repeat. Teacher and student are Switch Transformers that activate the same
parameters: the student is the teacher with its experts merged to a quarter.

The limit is 0.75: forward and backward pass of the student are three units of work, the teacher's forward pass is a
fourth. The optimiser's step and reading the cache come on top of both. Target: at most 0.80.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, progress, run

TARGET, LIMIT = 0.80, 0.75


def arguments() -> argparse.ArgumentParser:
    made = parser((__doc__ or "").strip(), "python benchmarks/teacher.py --threads 1 --repeats 15 --out teacher.json")
    made.set_defaults(threads=1)
    made.add_argument("--repeats", type=int, default=15, help="timed repeats")
    made.add_argument("--batch-size", type=int, default=32, help="examples")
    made.add_argument("--input-tokens", type=int, default=64, help="tokens per example into the encoder")
    made.add_argument("--label-tokens", type=int, default=16, help="tokens per example into the decoder")
    made.add_argument("--width", type=int, default=256, help="d_model; experts are four times as wide")
    made.add_argument("--quick", action="store_true", help="narrow models and three repeats: seconds")
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def models(width: int) -> tuple[Any, Any]:
    """(teacher, student): eight experts in each of six sparse layers, and the same merged to two."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.train.objectives import freeze_routers

    config = SwitchTransformersConfig(
        vocab_size=8000,
        d_model=width,
        d_kv=width // 4,
        num_heads=4,
        d_ff=4 * width,
        num_layers=6,
        num_decoder_layers=6,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=3,
        num_experts=8,
        expert_capacity=10_000,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    teacher = SwitchTransformersForConditionalGeneration(config).eval()
    student = SwitchTransformersForConditionalGeneration(config)
    student.load_state_dict(teacher.state_dict())
    adapter = adapter_for(student)
    for layer in adapter.layers(student):
        weights = adapter.read_experts(student, layer).select(torch.tensor([0, 1]))
        adapter.write_experts(student, layer, weights, torch.arange(8) % 2)
    freeze_routers(student, adapter)
    return teacher, student.train()


def examples(options: argparse.Namespace, batches: int) -> Any:
    """Random tokens, every example as long as the next."""
    import numpy as np

    from mcsmoe.data.collate import Tokenised

    rows, rng = batches * options.batch_size, np.random.default_rng(0)
    parts = []
    for length in (options.input_tokens, options.label_tokens):
        parts += [rng.integers(3, 8000, rows * length).astype(np.int32), np.arange(rows + 1) * length]
    return Tokenised(*parts, 0, 0)


def steps(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[int], float]]:
    """A training step of each kind, from the number of a batch to the loss."""
    import torch

    from mcsmoe.data.collate import collate, evaluation_batches
    from mcsmoe.train.losses import IGNORED, cross_entropy_sum, distillation_sum
    from mcsmoe.train.objectives import RecoveryObjective
    from mcsmoe.train.teacher import TeacherCache, cache_teacher

    teacher, student = models(options.width)
    train = examples(options, options.repeats + 1)
    cache_teacher(
        *(teacher, evaluation_batches(train, options.batch_size), lambda rows: collate(train, rows)),
        *(train.label_lengths.tolist(), folder, {"examples": train.digest}, torch.device("cpu")),
    )
    objective = RecoveryObjective(TeacherCache(folder, train.digest))
    # A rate of zero: both kinds are timed on the same student, whose weights must not drift between them.
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.0)

    def finish(loss: Any) -> float:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def batch_of(number: int) -> dict[str, Any]:
        start = number * options.batch_size
        return collate(train, range(start, start + options.batch_size))

    def cached(number: int) -> float:
        batch = batch_of(number)
        return finish(objective(student, batch, objective.prepare(batch))["loss"])

    def online(number: int) -> float:
        batch = batch_of(number)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        labelled = batch["labels"] != IGNORED
        with torch.no_grad():
            target = teacher(**inputs, use_cache=False).logits[labelled]
        logits = student(**inputs, use_cache=False).logits
        task = cross_entropy_sum(logits, batch["labels"]) / labelled.sum()
        return finish(task + 0.2 * distillation_sum(logits[labelled], target, 2.0) / len(labelled))

    def alone(number: int) -> float:
        batch = batch_of(number)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        logits = student(**inputs, use_cache=False).logits
        return finish(cross_entropy_sum(logits, batch["labels"]) / (batch["labels"] != IGNORED).sum())

    return {"cached": cached, "online": online, "no teacher": alone}


def main(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    if options.quick:
        options.width, options.repeats = 64, 3
    with tempfile.TemporaryDirectory() as folder:
        kinds = steps(options, Path(folder) / "teacher")
        times: dict[str, list[float]] = {name: [] for name in kinds}
        losses: dict[str, list[float]] = {name: [] for name in kinds}
        for number in progress(range(options.repeats + 1), "steps"):
            for name, step in kinds.items():
                start = time.perf_counter()
                losses[name].append(step(number))
                times[name].append(time.perf_counter() - start)
    timed = {name: found[1:] for name, found in times.items()}  # the first warms up
    ratios = [one / other for one, other in zip(timed["cached"], timed["online"], strict=True)]
    apart = max(abs(one / other - 1) for one, other in zip(losses["cached"], losses["online"], strict=True))
    quarters = statistics.quantiles(ratios, n=4)
    for name, found in timed.items():
        print(f"{name:12} {1e3 * statistics.median(found):8.1f} ms a step")
    ratio = statistics.median(ratios)
    words = "met" if ratio <= TARGET else "NOT met"
    print(
        f"cached / online: {ratio:.3f} ({quarters[0]:.3f} to {quarters[2]:.3f}); limit {LIMIT}, target {TARGET}: {words}"
    )
    print(f"losses: at most {apart:.1e} apart, relative")
    log.info("width %d, %d examples a step, %d threads", options.width, options.batch_size, options.threads)
    if options.out:
        figures = {"ratio": ratio, "quartiles": quarters, "loss_apart": apart, "seconds": timed}
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main, arguments().parse_args())
