"""Train the routers of a stock export towards the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mcsmoe.checkpoint.load import load_model
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.export.change import Change, divergence, logits_change, real_logits
from mcsmoe.types import IGNORED, Batch


@dataclass(frozen=True)
class RouterRecovery:
    """How the folded routers are trained; everything else stays as it is."""

    steps: int
    learning_rate: float = 1e-3
    seed: int = 0


class _RouterObjective:
    """KL(merged || stock) per position; the merged model answers anew in every step."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def prepare(self, batch: Batch) -> int:
        return max(1, int((batch["labels"] != IGNORED).sum()))

    def __call__(self, model: nn.Module, rows: Batch, totals: int) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_NV = real_logits(self.teacher, rows)
        loss = divergence(teacher_NV, real_logits(model, rows)) / totals
        return {"loss": loss, "distillation_loss": loss}


def recover_routers(source: Streamed, made: Streamed, batches: Sequence[Batch], recovery: RouterRecovery) -> Change:
    """Train the routers of ``made`` and put them into its files, if that brings its logits nearer."""
    from tempfile import TemporaryDirectory

    from mcsmoe.train.loop import Trainer, TrainingPlan
    from mcsmoe.train.state import StateStore

    if any("labels" not in batch for batch in batches):
        raise ValueError("--recover trains on text; give --calibration")
    held = max(1, len(batches) // 5) if len(batches) > 1 else 0
    learnt, judged = batches[: len(batches) - held], batches[len(batches) - held :] if held else batches
    teacher, student = load_model(source.folder), load_model(made.folder)
    routers = set(made.adapter.router_parameters(student))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in routers)
    before = logits_change(teacher, student, judged)
    plan = TrainingPlan(
        steps=recovery.steps,
        steps_per_epoch=len(learnt),
        learning_rate=recovery.learning_rate,
        warmup_steps=min(10, recovery.steps // 10),
        weight_decay=0.0,
        seed=recovery.seed,
        save_every=0,
        select_every=max(1, recovery.steps // 5),
        dropout=False,
    )
    with TemporaryDirectory() as state:
        Trainer(
            student,
            plan,
            _RouterObjective(teacher),
            lambda step: learnt[step % len(learnt)],
            StateStore(Path(state), "router recovery"),
            select=lambda model: -logits_change(teacher, model, judged).divergence,
            selection_metric="-KL",
            device="cpu",
        ).run("router recovery")
    after = logits_change(teacher, student, judged)
    if after.divergence >= before.divergence:
        return before
    made.overwrite({name: parameter.detach() for name, parameter in student.named_parameters() if name in routers})
    return after
