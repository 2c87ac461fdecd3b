"""Heal a reduced model on plain text: by its divergence from the full model, whose final states are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mcsmoe.adapters.base import Adapter
from mcsmoe.adapters.places import experts_of
from mcsmoe.device import pick
from mcsmoe.evaluate.documents import model_inputs
from mcsmoe.methods import HEALED
from mcsmoe.train.loop import Trainer, TrainingPlan
from mcsmoe.train.losses import distillation_sum
from mcsmoe.train.state import StateStore
from mcsmoe.train.teacher import TeacherCache, cache_teacher
from mcsmoe.types import IGNORED, Batch

_HELD = 5  # every fifth batch is for judging

_RATES = {"routers": 1e-3, "experts": 1e-4, "adapters": 1e-3, "all": 5e-5}


@dataclass(frozen=True)
class Healing:
    """What is trained, and for how long.

    Attributes:
        train: ``routers``, ``experts``, ``adapters`` (of low rank, on all linear maps but experts, routers and the head;
            added to the weights in the end) or ``all``.
        steps: of the optimiser, a batch each.
        learning_rate: None: what suits ``train``.
        rank: of the adapters.
    """

    train: str
    steps: int
    learning_rate: float | None = None
    rank: int = 16
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.train not in HEALED:
            raise ValueError(f"train is {self.train!r}; choose one of {', '.join(HEALED)}")
        for name in ("steps", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate is {self.learning_rate}; give a number above 0")


@dataclass(frozen=True)
class Healed:
    """Divergence from the full model on held-out rows, nats a token, before and after; whether what was learnt stays."""

    before: float
    after: float
    kept: bool


def numbered(batches: Sequence[Batch]) -> list[Batch]:
    """``batches`` with the number of each row, by which the teacher's states are found."""
    made, start = [], 0
    for batch in batches:
        rows = len(batch["labels"])
        made.append({**batch, "row": torch.arange(start, start + rows)})
        start += rows
    return made


def keep_states(teacher: nn.Module, batches: Sequence[Batch], folder: Path, device: str = "auto") -> None:
    """Write the final states of ``teacher`` on ``numbered`` batches to ``folder``."""
    by_row = {int(batch["row"][0]): batch for batch in batches}
    rows = [batch["row"].tolist() for batch in batches]
    counts = [int(count) for batch in batches for count in (batch["labels"] != IGNORED).sum(dim=1)]
    teacher.to(pick(device))
    cache_teacher(teacher, rows, lambda indices: by_row[indices[0]], counts, folder, {}, pick(device))


@dataclass(frozen=True)
class _Divergence:
    """KL(full || reduced) per labelled position."""

    teacher: TeacherCache

    def prepare(self, batch: Batch) -> int:
        return max(1, int((batch["labels"] != IGNORED).sum()))

    def __call__(self, model: nn.Module, rows: Batch, totals: int) -> dict[str, Tensor]:
        logits_BTV = model(**model_inputs(getattr(model, "module", model), rows), use_cache=False).logits
        own_NV = logits_BTV[rows["labels"] != IGNORED]
        loss = distillation_sum(own_NV, self.teacher.logits(rows["row"].cpu(), own_NV.device), 1.0) / totals
        return {"loss": loss, "distillation_loss": loss}


def heal(model: nn.Module, adapter: Adapter, batches: Sequence[Batch], states: Path, healing: Healing) -> Healed:
    """Train ``model`` in place, in float32, where that brings it nearer on held-out rows.

    Args:
        batches: as ``numbered`` gives them, two or more.
        states: what ``keep_states`` wrote for them.

    Raises:
        ValueError: too little text, or a model that has nothing to train; names it.
    """
    held = [batch for number, batch in enumerate(batches) if number % _HELD == min(_HELD, len(batches)) - 1]
    learnt = [batch for number, batch in enumerate(batches) if number % _HELD != min(_HELD, len(batches)) - 1]
    if not held or not learnt:
        raise ValueError(f"there are {len(batches)} batches of text, of which some must be held out; give 2 or more")
    objective = _Divergence(TeacherCache(states))
    device = pick(healing.device)
    formats = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float().to(device)

    @torch.no_grad()
    def divergence(one: nn.Module) -> float:
        one.eval()
        total, count = 0.0, 0
        for batch in held:
            labels = objective.prepare(batch)
            rows = {name: tensor.to(device) for name, tensor in batch.items()}
            total, count = total + float(objective(one, rows, labels)["loss"]) * labels, count + labels
        return total / count

    before = divergence(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with _trained(model, adapter, healing):
        plan = TrainingPlan(
            steps=healing.steps,
            steps_per_epoch=len(learnt),
            learning_rate=healing.learning_rate or _RATES[healing.train],
            warmup_steps=min(10, healing.steps // 10),
            weight_decay=0.0,
            betas=(0.9, 0.98),
            seed=healing.seed,
            save_every=0,
            select_every=max(1, healing.steps // 5),
            dropout=False,
        )
        Trainer(
            model,
            plan,
            objective,
            lambda step: learnt[step % len(learnt)],
            StateStore(states.parent / "training", "healing"),
            select=lambda one: -divergence(one),
            selection_metric="-KL",
            device=healing.device,
        ).run("healing")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.to(formats[name])
        after = divergence(model.float())
        for name, parameter in model.named_parameters():
            parameter.data = (parameter if after < before else start[name]).to(formats[name])
            parameter.requires_grad_(False)
    return Healed(before, after, after < before)


@contextmanager
def _trained(model: nn.Module, adapter: Adapter, healing: Healing) -> Iterator[None]:
    """Inside the context only what is to be trained takes gradients; adapters become part of the weights after it."""
    routers = set(adapter.router_parameters(model))
    experts: set[str] = set()
    for layer in adapter.layers(model):
        block = model.get_submodule(layer)
        found = experts_of(block)
        inside = set() if found is None else {id(parameter) for parameter in found.parameters()}
        experts |= {f"{layer}.{name}" for name, parameter in block.named_parameters() if id(parameter) in inside}
    adapted: list[nn.Module] = []
    if healing.train == "adapters":
        generator = torch.Generator().manual_seed(healing.seed)
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        for name, module in model.named_modules():
            weight = f"{name}.weight"
            if isinstance(module, nn.Linear) and module is not head and weight not in routers | experts:
                adapted.append(module)
                low = LowRank(module.weight, healing.rank, generator)
                parametrize.register_parametrization(module, "weight", low, unsafe=True)
    chosen = {"routers": routers, "experts": experts}.get(healing.train)
    for name, parameter in model.named_parameters():
        wanted = healing.train == "all" if chosen is None else name in chosen
        parameter.requires_grad_(wanted or name.endswith((".low_DR", ".low_RD")))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"the model has no {healing.train} to train; choose another --train")
    try:
        yield
    finally:
        for module in adapted:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


class LowRank(nn.Module):
    """W + B A, B zero in the beginning (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight_oi: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, inner = weight_oi.shape
        rank = min(rank, out, inner)
        start_RD = torch.randn(rank, inner, generator=generator) / inner**0.5
        self.low_RD = nn.Parameter(start_RD.to(weight_oi.device))
        self.low_DR = nn.Parameter(torch.zeros(out, rank, device=weight_oi.device))

    def forward(self, weight_oi: Tensor) -> Tensor:
        """The adapted weight."""
        return weight_oi + self.low_DR @ self.low_RD
