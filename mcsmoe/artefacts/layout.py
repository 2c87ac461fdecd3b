"""Where every artefact of the workflow lies, and which stage makes it.

Names of tasks, methods and so on may be Snakemake's wildcards in braces, so rules and those who read results say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FULL_CHECKPOINT = "full"


@dataclass(frozen=True)
class Stage:
    """A stage of the workflow that makes a checkpoint; its rule and its script are called as it is."""

    name: str
    title: str
    """In the report."""
    section: str
    """Of the configuration; also the name of its training curve."""
    trains: bool
    makes: tuple[str, ...]
    """Checkpoints, as they are called in a run's folder."""
    on_task: bool = True
    """Whether it belongs to a run rather than to the base model that all runs share."""


STAGES = (
    Stage("prepare", "pre-training", "pretrain", trains=True, makes=("model", "dense"), on_task=False),
    Stage("finetune", "fine-tuning of the full model", "finetune", trains=True, makes=(FULL_CHECKPOINT, "finetuned")),
    Stage("prune", "fine-tuning while experts fall away", "prune", trains=True, makes=("pruned",)),
    Stage("merge", "merging", "merge", trains=False, makes=("merged",)),
    Stage("reduce", "pruning or merging in sequence", "reduce", trains=False, makes=("merged",)),
    Stage("recover", "recovery after merging", "recover", trains=True, makes=("recovered",)),
    Stage("compress", "compression of the recovered model", "compress", trains=True, makes=("compressed",)),
)
"""In the order in which a method goes through them."""

TITLES = {stage.section: stage.title for stage in STAGES}
"""What a training curve is called in the report, by its name."""


def stage_of(checkpoint: str) -> Stage:
    """The stage that makes a checkpoint, by its name or its path in a run.

    Raises:
        ValueError: no stage makes such a checkpoint; names it.
    """
    name = checkpoint.rpartition("/")[2]
    for stage in STAGES:
        if stage.on_task and name in stage.makes:
            return stage
    raise ValueError(f"no stage makes a checkpoint {checkpoint!r}")


def checkpoints() -> list[str]:
    """Names of the checkpoints that stages make in a run, the full model's first."""
    return [name for stage in STAGES if stage.on_task for name in stage.makes]


def checkpoint_pattern() -> str:
    """Regular expression of a checkpoint's path in its run."""
    own = "|".join(name for name in checkpoints() if name != FULL_CHECKPOINT)
    return rf"{FULL_CHECKPOINT}|[^/]+/\d+e/({own})"


@dataclass(frozen=True)
class RunPlaces:
    """Places in the folder of one task and seed."""

    folder: str

    @property
    def full(self) -> str:
        """The full model."""
        return f"{self.folder}/{FULL_CHECKPOINT}"

    @property
    def teacher(self) -> str:
        """The full model's answers, which students learn from."""
        return f"{self.folder}/teacher"

    @property
    def statistics(self) -> str:
        """Routing statistics."""
        return f"{self.folder}/routing.safetensors"

    @property
    def routing(self) -> str:
        """Table ``routing``."""
        return f"{self.folder}/routing.parquet"

    @property
    def gradients(self) -> str:
        """Gradients and their squares."""
        return f"{self.folder}/gradients.safetensors"

    def examples(self, split: str) -> str:
        """Table ``examples`` of ``train``, ``selection`` or ``validation``."""
        return f"{self.folder}/examples/{split}.parquet"

    def permuted(self, how: str) -> str:
        """The full model with its experts aligned; ``how`` is the suffix of ``ALIGNED``."""
        return f"{self.folder}/permuted{how}"

    def permutation(self, how: str) -> str:
        """Table ``permutation`` of that."""
        return f"{self.folder}/permutation{how}.parquet"

    def method(self, variant: str, experts: int | str) -> str:
        """The folder of a method with so many experts."""
        return f"{self.folder}/{variant}/{experts}e"

    def groups(self, variant: str, experts: int | str) -> str:
        """Table ``groups`` of a method."""
        return f"{self.method(variant, experts)}/groups.parquet"

    def similarity(self, variant: str, experts: int | str) -> str:
        """Table ``similarity`` of a method."""
        return f"{self.method(variant, experts)}/similarity.parquet"

    def checkpoint(self, checkpoint: str) -> str:
        """The folder of a checkpoint, by its path here."""
        return f"{self.folder}/{checkpoint}"

    def table(self, checkpoint: str, kind: str) -> str:
        """Table ``predictions``, ``metrics``, ``cost``, ``training`` or ``selection`` of a checkpoint, by its path here."""
        place = {"predictions": "evaluation", "metrics": "evaluation", "cost": "cost"}.get(kind, "training")
        return f"{self.folder}/{checkpoint}_{place}/{kind}.parquet"


@dataclass(frozen=True)
class Places:
    """Places in a results folder."""

    results: str

    @property
    def summary(self) -> str:
        """Table ``summary``: everything that was measured."""
        return f"{self.results}/summary.parquet"

    @property
    def report(self) -> str:
        """The report."""
        return f"{self.results}/report.html"

    @property
    def published(self) -> str:
        """What was published in MLflow."""
        return f"{self.results}/published.json"

    @property
    def logs(self) -> str:
        """What each job said."""
        return f"{self.results}/logs"

    @property
    def benchmarks(self) -> str:
        """What each job used."""
        return f"{self.results}/benchmarks"

    @property
    def state(self) -> str:
        """What jobs resume from."""
        return f"{self.results}/.state"

    @property
    def tokens(self) -> str:
        """Tokens that stages share."""
        return f"{self.state}/tokens"

    def data(self, task: str, split: str) -> str:
        """Rows of a task that were generated."""
        return f"{self.results}/data/{task}/{split}.parquet"

    def base(self, seed: int | str) -> str:
        """The folder of the base models of a seed."""
        return f"{self.results}/base/seed{seed}"

    def pretraining(self, seed: int | str, dense: bool = False) -> str:
        """Table ``training`` of a base model."""
        return f"{self.base(seed)}/{'dense_training/' if dense else ''}training.parquet"

    def run(self, task: str, seed: int | str) -> RunPlaces:
        """The folder of one task and seed."""
        return RunPlaces(f"{self.results}/{task}/seed{seed}")


ALIGNED: Mapping[str, str] = {"weight": "", "weight-input": "-weight-input", "activation": "-activation"}
"""By alignment of all experts of a layer to its expert 0, the suffix of the folder of the model that has it."""
