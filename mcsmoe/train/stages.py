"""What fine-tuning, recovery and compression share: the plan, the batches, the selection slice and the resumable run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mcsmoe.artefacts.digests import digest_files
from mcsmoe.artefacts.tables import read_table, write_table
from mcsmoe.checkpoint.load import load_model, load_tokenizer
from mcsmoe.checkpoint.save import save_model
from mcsmoe.data.collate import TaskBatches, Tokenised, tokenize
from mcsmoe.data.tasks import Task, load_task
from mcsmoe.data.vocabulary import vocabulary_of
from mcsmoe.evaluate.documents import text_selector
from mcsmoe.evaluate.encoding import is_causal
from mcsmoe.evaluate.metrics import LESS_IS_BETTER, positive_answer
from mcsmoe.evaluate.protocols import prepare, selector
from mcsmoe.train import processes
from mcsmoe.train.loop import Objective, Pruner, Trainer, TrainingPlan, TrainingResult
from mcsmoe.train.state import StateStore
from mcsmoe.train.teacher import TeacherCache
from mcsmoe.workflow.provenance import code_digest

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def total_steps(settings: Mapping[str, Any], rows: int) -> tuple[int, int]:
    """(steps in all, steps per epoch) of a section of the configuration, for so many training rows."""
    per_epoch = max(1, math.ceil(rows / settings["batch_size"]))
    return settings["steps"] or max(1, math.ceil(settings["epochs"] * per_epoch)), per_epoch


def rows_learnt(settings: Mapping[str, Any], train: Tokenised, seed: int) -> set[int]:
    """Training rows that a stage with these settings comes to see."""
    steps, per_epoch = total_steps(settings, len(train))
    if steps >= per_epoch:
        return set(range(len(train)))
    batches = TaskBatches(train, settings["batch_size"], seed)
    return {row for step in range(steps) for row in batches.indices(step).tolist()}


def plan_of(settings: Mapping[str, Any], rows: int, seed: int) -> TrainingPlan:
    """The plan that a section of the configuration describes, for so many training rows."""
    steps, per_epoch = total_steps(settings, rows)
    return TrainingPlan(
        steps=steps,
        steps_per_epoch=per_epoch,
        seed=seed,
        **{
            key: settings[key]
            for key in (
                *("learning_rate", "warmup_steps", "weight_decay", "clip_norm", "accumulation", "precision"),
                *("schedule", "save_every", "select_every", "patience", "dropout"),
            )
        },
    )


@dataclass(frozen=True)
class JobSettings:
    """What a stage that trains on a task reads, writes and is told; its options have the names of these fields."""

    model: Path
    task: str
    train: Path
    selection: Path
    out: Path
    training: Path
    selected: Path
    state: Path
    max_input: int
    max_label: int
    protocol: str
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    tokens: Path | None = None
    dense: bool = False


@dataclass(frozen=True)
class Job:
    """A stage's model, its tokenizer and the rows it trains on, read and checked."""

    told: JobSettings
    settings: Mapping[str, Any]
    model: nn.Module
    tokenizer: Any
    task: Task
    train: Tokenised
    selection: pd.DataFrame

    @staticmethod
    def of(told: JobSettings, settings: Mapping[str, Any]) -> Job:
        """Load what ``told`` names; the rows are tokenised once. ``settings`` are those of the section that trains.

        Raises:
            ValueError: a checkpoint, table or task that is not one, a target longer than ``max_label``, a tokenizer
                without the tokens that are needed, or one with tokens that the model has no embeddings for.
        """
        torch.set_num_threads(told.threads)
        processes.start(told.device)
        tokenizer = load_tokenizer(told.model)
        rows = read_table(told.train, "examples")
        model = load_model(told.model, dense=told.dense)
        limits = (told.max_input, told.max_label, told.tokens)
        with processes.main_first():
            train = tokenize(
                rows,
                tokenizer,
                *limits,
                vocabulary=vocabulary_of(model),
                where=told.train,
                causal=is_causal(model),
            )
        return Job(
            told,
            settings,
            model,
            tokenizer,
            load_task(told.task),
            train,
            read_table(told.selection, "examples"),
        )

    def run(
        self, script: str, objective: Objective, pruner: Pruner | None = None, inputs: Sequence[Path] = ()
    ) -> TrainingResult:
        """Train the model in place, from the saved state if there is one, and write the curves.

        Checkpoints are selected on the selection slice by the task's main metric; never on the split that is reported.
        """
        told, settings = self.told, self.settings
        read = [told.model, told.train, told.selection, *inputs]
        sign = signature(
            script,
            read,
            settings=settings,
            processes=processes.count(),
            seed=told.seed,
            device=told.device,
            protocol=told.protocol,
        )
        choose = self._selector() if settings["select_every"] and len(self.selection) else None
        trainer = Trainer(
            self.model,
            plan_of(settings, len(self.train), told.seed),
            objective,
            TaskBatches(self.train, settings["batch_size"], told.seed).batch,
            StateStore(told.state, sign),
            pruner=pruner,
            select=choose,
            selection_metric=("minus " if self.task.metric in LESS_IS_BETTER else "") + self.task.metric,
            device=told.device,
        )
        result = trainer.run(f"{Path(script).stem} on {self.task.name}")
        if processes.is_main():
            write_table(told.training, result.training, "training")
            write_table(told.selected, result.selection, "selection")
        if len(result.selection):
            best = result.selection.loc[result.selection["best"]].iloc[-1]
            log.info("kept the state after step %d: %s %.4f", best["step"], best["metric"], best["value"])
        return result

    def _selector(self) -> Callable[[nn.Module], float]:
        """From a model to its value on the selection slice; the larger, the better."""
        told, size = self.told, 4 * self.settings["batch_size"]
        if self.task.is_language:
            return text_selector(self.model, self.tokenizer, self.selection, size, told.max_input, told.max_label)
        prepared = prepare(
            self.model,
            self.tokenizer,
            self.selection,
            self.task.asked(told.protocol),
            batch_size=size,
            max_input=told.max_input,
            max_label=told.max_label,
            metric=self.task.metric,
        )
        return selector(prepared, positive_answer(self.selection["choices"].tolist()))

    def save(self, **provenance: Any) -> None:
        """Write the checkpoint, then forget the state it was resumed from."""
        if processes.is_main():
            known = {"task": self.task.name, "seed": self.told.seed, "settings": dict(self.settings)}
            save_model(self.model.cpu(), self.told.out, self.tokenizer, {**known, **provenance})
            StateStore(self.told.state, "").clear()
        processes.end()


def signature(script: str | Path, inputs: list[Path], **decisive: Any) -> str:
    """Digest of everything that decides the course of a training: its code, its input files and its settings."""
    files = [file for path in inputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    digest = digest_files([file for file in files if file.is_file()])
    return StateStore.sign({"code": code_digest(script), "inputs": digest, "torch": torch.__version__, **decisive})


def teacher_of(folder: Path | None, train: Tokenised) -> TeacherCache | None:
    """The teacher's cache in ``folder``, checked to be of these very examples; None without one."""
    return None if folder is None else TeacherCache(folder, train.digest)
