"""What each stage minimises, built from the terms in ``losses``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.base import Adapter
from mcsmoe.evaluate.documents import model_inputs
from mcsmoe.train.losses import cross_entropy_sum, distillation_sum, load_balance_sum, router_z_sum
from mcsmoe.train.processes import summed as summed_over_processes
from mcsmoe.train.teacher import TeacherCache
from mcsmoe.types import IGNORED, LayerId


@dataclass(frozen=True)
class Totals:
    """Of the whole batch: rows and labelled positions."""

    rows: int
    labels: int


def totals_of(batch: dict[str, Tensor]) -> Totals:
    labels = batch["labels"]
    return Totals(rows=labels.shape[0], labels=max(1, int((labels != IGNORED).sum())))


def _logits(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return model(**model_inputs(getattr(model, "module", model), rows), use_cache=False).logits


@dataclass(frozen=True)
class TaskObjective:
    """Cross-entropy per label token, plus Switch's load-balancing loss averaged over layers while routers train.

    Without an ``adapter`` (a model that has no experts) there is no load to balance.

    Where ``usage`` is given it is told, per sparse layer, how many tokens chose each expert (int64 [E]).
    """

    adapter: Adapter | None
    balance_weight: float = 0.0
    z_weight: float = 0.0
    usage: Callable[[LayerId, Tensor], None] | None = None

    def prepare(self, batch: dict[str, Tensor]) -> Totals:
        return totals_of(batch)

    def __call__(self, model: nn.Module, rows: dict[str, Tensor], totals: Totals) -> dict[str, Tensor]:
        if self.adapter is None or (not self.balance_weight and self.usage is None):
            task = cross_entropy_sum(_logits(model, rows), rows["labels"]) / totals.labels
            return {"loss": task, "task_loss": task}
        bare = getattr(model, "module", model)
        with self.adapter.capture(bare, detach=False) as captured:
            task = cross_entropy_sum(_logits(model, rows), rows["labels"]) / totals.labels
        balance, z = task.new_zeros(()), task.new_zeros(())
        found = {}
        for layer, batch in captured.batches.items():
            logits_TE = batch.logits_TE[batch.valid_T]
            wanted_T = batch.wanted_TK[batch.valid_T].flatten()
            found[layer] = logits_TE, torch.bincount(wanted_T, minlength=logits_TE.shape[1])
            if self.usage is not None:
                self.usage(layer, found[layer][1])
        # Load is balanced over the rows of all processes, as one process would see them.
        sizes = torch.tensor([len(logits_TE) for logits_TE, _ in found.values()] + [len(rows["labels"])])
        parts = [*(counts_E for _, counts_E in found.values()), sizes.to(task.device)]
        summed = summed_over_processes(torch.cat(parts)).split([len(part) for part in parts])
        *tokens_L, seen = summed[-1].tolist()
        share = seen / totals.rows
        for (logits_TE, _), counts_E, found_T in zip(found.values(), summed[:-1], tokens_L, strict=True):
            tokens = max(1, found_T) / share
            balance = balance + load_balance_sum(logits_TE, counts_E) / tokens
            z = z + router_z_sum(logits_TE) / tokens
        balance, z = balance / len(captured.batches), z / len(captured.batches)
        loss = task + self.balance_weight * balance + self.z_weight * z
        return {"loss": loss, "task_loss": task, "balance_loss": balance}


@dataclass(frozen=True)
class RecoveryObjective:
    """Cross-entropy per label token + weight * KL(teacher || student) / rows (section 6 of the blueprint).

    ``rows`` carries ``row``: the index of each example in the teacher's cache.
    """

    teacher: TeacherCache | None
    weight: float = 0.2
    temperature: float = 2.0

    def prepare(self, batch: dict[str, Tensor]) -> Totals:
        return totals_of(batch)

    def __call__(self, model: nn.Module, rows: dict[str, Tensor], totals: Totals) -> dict[str, Tensor]:
        logits_BTV = _logits(model, rows)
        task = cross_entropy_sum(logits_BTV, rows["labels"]) / totals.labels
        if self.teacher is None or not self.weight:
            return {"loss": task, "task_loss": task}
        teacher_NV = self.teacher.logits(rows["row"], logits_BTV.device)
        student_NV = logits_BTV[rows["labels"] != IGNORED]
        divergence = distillation_sum(student_NV, teacher_NV, self.temperature) / totals.rows
        return {"loss": task + self.weight * divergence, "task_loss": task, "distillation_loss": divergence}


def freeze_routers(model: nn.Module, adapter: Adapter) -> list[str]:
    """Stop every router's gradient, so that recovery leaves routers bit-identical; returns their names."""
    names = set(adapter.router_parameters(model))
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return sorted(names)


def trainable(model: nn.Module) -> dict[str, Any]:
    """Counts of trainable and frozen parameters, for the log."""
    counts = {"trainable": 0, "frozen": 0}
    for parameter in model.parameters():
        counts["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts
