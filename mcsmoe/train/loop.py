"""The one training loop, for pre-training, fine-tuning, recovery and compression alike.

A step is a function of (weights, optimiser moments, step number): batches and dropout masks follow from the seed and
the step, never from what ran before. That is what makes a resumed training end exactly where an undisturbed one does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from mcsmoe.artefacts.tables import SCHEMAS
from mcsmoe.console import progress
from mcsmoe.train import processes
from mcsmoe.train.state import StateStore
from mcsmoe.types import IGNORED, Batch

log = logging.getLogger(__name__)

_SMALL = 2**24  # parameters; a copy of them in float32 is 64 MiB


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how to train. Units: steps of the optimiser; learning rate per step; norms in weight units."""

    steps: int
    steps_per_epoch: int
    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    clip_norm: float = 1.0
    accumulation: int = 1
    precision: str = "no"
    schedule: str = "linear"
    seed: int = 0
    save_every: int = 200
    select_every: int = 0
    patience: int = 0
    dropout: bool = True

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0): linear warm-up, then linear decay to zero or constant."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * max(0.0, (self.steps - step) / max(1, self.steps - self.warmup_steps))


class Objective(Protocol):
    """What is minimised. Terms are sums over the rows given, already divided by totals of the whole batch."""

    def prepare(self, batch: Batch) -> Any:
        """Totals of the whole batch that the terms are divided by."""

    def __call__(self, model: nn.Module, rows: Batch, totals: Any) -> dict[str, Tensor]:
        """Named terms; ``loss`` is their weighted sum and has the graph."""


class Pruner(Protocol):
    """What falls away along a schedule: rows of residuals, or whole experts. Called once a step at two places."""

    def observe(self) -> None:
        """After the backward pass, before the optimiser: gradients and weights belong together."""

    def apply(self, step: int) -> float:
        """After the optimiser of step ``step`` (from 0); returns the fraction that is kept."""

    def finished(self, step: int) -> bool:
        """Whether nothing falls away any more after step ``step``."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class TrainingResult:
    """The curve (table ``training``), the selection history (table ``selection``) and the step that was kept."""

    training: pd.DataFrame
    selection: pd.DataFrame
    best_step: int


@dataclass
class _Progress:
    rows: list[dict[str, float]] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)
    best_value: float = -math.inf
    best_step: int = 0
    stopped: bool = False


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: layer norms and biases (one-dimensional parameters) and position biases are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or "relative_attention_bias" in name or name.endswith("bias")
            (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _rows(batch: Batch, piece: int, pieces: int) -> Batch:
    # Contiguous: some families flatten their labels by a view.
    return {name: tensor[piece::pieces].contiguous() for name, tensor in batch.items()}


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def _restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


class Trainer:
    """Runs a plan on a model. ``batch_for(step)`` gives the whole batch of a step, the same on every process."""

    def __init__(
        self,
        model: nn.Module,
        plan: TrainingPlan,
        objective: Objective,
        batch_for: Callable[[int], Batch],
        store: StateStore,
        pruner: Pruner | None = None,
        select: Callable[[nn.Module], float] | None = None,
        selection_metric: str = "",
        device: str = "auto",
    ) -> None:
        self.plan, self.objective, self.batch_for = plan, objective, batch_for
        self.store, self.pruner, self.select, self.selection_metric = store, pruner, select, selection_metric
        # An expert that no row of a process has chosen has no gradient there, and none at all where no process has one.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            cpu=processes.is_cpu(device), mixed_precision=plan.precision, kwargs_handlers=[unused]
        )
        self.model = model
        groups = decay_groups(model, plan.weight_decay)
        # On a processor torch updates parameters one by one. All in one call is quicker, with the same bits, but holds a
        # copy of them meanwhile, so only where that is little.
        small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL
        at_once = True if small and self.accelerator.device.type == "cpu" else None
        optimizer = torch.optim.AdamW(groups, plan.learning_rate, plan.betas, plan.epsilon, foreach=at_once)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.history = _Progress()
        self.best: dict[str, Tensor] = {}

    # -- state ---------------------------------------------------------------------------------------------------
    def _save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model/{name}": tensor for name, tensor in _cpu_copy(self.model).items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer/{names[id(parameter)]}/{key}"] = torch.as_tensor(value).cpu()
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        if self.pruner is not None:
            tensors |= {f"pruner/{name}": tensor for name, tensor in self.pruner.state_dict().items()}
        self.store.save(step, tensors, vars(self.history))

    def _resume(self) -> int:
        found = self.store.load()
        device = self.accelerator.device
        steps = processes.gathered(torch.tensor([found[0] if found else 0], device=device)).flatten().tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"state: {self.store.folder} holds the state after step {steps[0]} for one process and after "
                f"{max(steps[1:])} for another; put results on a file system that all processes see alike"
            )
        if found is None:
            return 0
        step, tensors, records = found
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}, "pruner": {}}
        for name, tensor in tensors.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = tensor
        _restore(self.model, parts["model"])
        parameters = dict(self.model.named_parameters())
        for name, tensor in parts["optimizer"].items():
            parameter, key = name.rsplit("/", 1)
            owner = parameters[parameter]
            self.optimizer.state[owner][key] = tensor if key == "step" else tensor.to(owner.device)
        self.best = parts["best"]
        if self.pruner is not None:
            self.pruner.load_state_dict(parts["pruner"])
        self.history = _Progress(**records)
        log.info("resuming after step %d of %d", step, self.plan.steps)
        return step

    # -- steps ---------------------------------------------------------------------------------------------------
    def _step(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        plan, world, rank = self.plan, self.accelerator.num_processes, self.accelerator.process_index
        batch = self.batch_for(step)
        totals = self.objective.prepare(batch)
        found = len(batch["labels"])
        if found < world:
            raise ValueError(f"a batch of {found} rows cannot be shared by {world} processes; lower processes")
        accumulation = min(plan.accumulation, found // world)
        torch.manual_seed((plan.seed + 1) * 1_000_003 + step * world + rank)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step)
        sums: dict[str, float] = {}
        for micro in range(accumulation):
            rows = _rows(batch, micro * world + rank, world * accumulation)
            rows = {name: tensor.to(self.accelerator.device) for name, tensor in rows.items()}
            last = micro == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    terms = self.objective(self.wrapped, rows, totals)
                # Gradients are averaged over processes; the terms are shares of a sum.
                self.accelerator.backward(terms["loss"] * world)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach())
        if world > 1:
            reduced = self.accelerator.reduce(torch.tensor(list(sums.values()), device=self.accelerator.device))
            sums = dict(zip(sums, reduced.tolist(), strict=True))
        if not math.isfinite(sums["loss"]):
            raise ValueError(
                f"the loss is {sums['loss']} at step {step + 1}; lower the learning rate ({plan.learning_rate}) "
                "or check the training data"
            )
        if self.pruner is not None:
            self.pruner.observe()
        if plan.clip_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), plan.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        kept = math.nan
        if self.pruner is not None:
            if world > 1:  # what falls is one process's decision, whatever the others' last bits are
                state = processes.from_main(self.pruner.state_dict(), self.accelerator.device)
                self.pruner.load_state_dict(state)
            kept = self.pruner.apply(step)
        tokens = sum(int(batch[name].sum()) for name in ("attention_mask",) if name in batch)
        tokens += int((batch["labels"] != IGNORED).sum())
        return {
            "step": step + 1,
            "epoch": (step + 1) / plan.steps_per_epoch,
            "loss": sums["loss"],
            "task_loss": sums.get("task_loss", math.nan),
            "distillation_loss": sums.get("distillation_loss", math.nan),
            "balance_loss": sums.get("balance_loss", math.nan),
            "learning_rate": plan.rate(step),
            "kept_fraction": kept,
            "seconds": time.perf_counter() - started,
            "tokens": tokens,
        }

    def _consider(self, step: int) -> None:
        """Evaluate on the selection slice and keep the weights if they are the best so far."""
        if self.select is None:
            return
        self.model.eval()
        value = processes.value_of_main(self.select(self.model), self.accelerator.device)
        better = value > self.history.best_value
        if better:
            self.history.best_value, self.history.best_step = value, step
            self.best = _cpu_copy(self.model)
        self.history.selections.append(
            {"step": step, "metric": self.selection_metric, "value": value, "best": bool(better)}
        )
        waited = (step - self.history.best_step) // max(1, self.plan.select_every)
        if self.plan.patience and waited >= self.plan.patience:
            log.info("stopping early: no better value on the selection slice in %d evaluations", waited)
            self.history.stopped = True

    def run(self, description: str) -> TrainingResult:
        """Train to the end of the plan, or to the early stop; the model is left with the selected weights.

        Raises:
            ValueError: the loss is not finite; names the step and the learning rate.
        """
        plan = self.plan
        start = self._resume()
        for step in progress(range(start, plan.steps), description, total=plan.steps, initial=start):
            if self.history.stopped:
                break
            # Of the model itself: what wraps it for several processes does not hear that a selection has changed its mode.
            if self.model.training != plan.dropout:
                self.wrapped.train(plan.dropout)
            self.history.rows.append(self._step(step))
            done = step + 1
            # While rows are still being pruned a state is denser than promised: only the final phase may be selected.
            selectable = self.pruner is None or self.pruner.finished(step)
            if selectable and (done == plan.steps or (plan.select_every and done % plan.select_every == 0)):
                self._consider(done)
            if plan.save_every and done % plan.save_every == 0 and done < plan.steps:
                self._save(done)
        if self.best:
            _restore(self.model, self.best)
        self.model.eval()
        return TrainingResult(
            training=pd.DataFrame(self.history.rows, columns=SCHEMAS["training"].names),
            selection=pd.DataFrame(self.history.selections, columns=SCHEMAS["selection"].names),
            best_step=self.history.best_step or plan.steps,
        )
