"""Everything a workflow has measured, read from its folder."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mcsmoe import methods
from mcsmoe.artefacts.layout import FULL_CHECKPOINT, Places, checkpoints, stage_of
from mcsmoe.artefacts.tables import read_table
from mcsmoe.results.summary import Run

_PACKAGES = ("torch", "transformers", "accelerate", "numpy", "scipy", "pandas", "pyarrow", "snakemake", "mlflow")


@dataclass(frozen=True)
class Results:
    """The runs of one workflow and where their tables lie."""

    folder: Path
    runs: list[Run]
    configuration: dict[str, Any]

    @staticmethod
    def read(folder: Path, runs: Iterable[Mapping[str, Any]], configuration: dict[str, Any]) -> Results:
        """``runs`` and ``configuration`` as the workflow lists them."""
        return Results(folder, Run.all(runs, folder), configuration)

    @property
    def final(self) -> list[Run]:
        """The last checkpoint of each method: its result."""
        last = {(run.task, run.seed, run.variant, run.experts): run for run in self.runs}
        return list(last.values())

    def versions(self) -> dict[str, str]:
        """Versions of what the numbers depend on."""
        return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}

    def curves(self, run: Run) -> dict[str, pd.DataFrame]:
        """Training curves of a method by stage, in the order they were run."""
        found: dict[str, pd.DataFrame] = {}
        if run.variant in (methods.FULL, methods.DENSE):
            path = Places(str(self.folder)).pretraining(run.seed, dense=run.variant == methods.DENSE)
            found["pretrain"] = read_table(Path(path), "training")
        for name in checkpoints():
            full = name == FULL_CHECKPOINT
            checkpoint = name if full else f"{run.variant}/{run.experts}e/{name}"
            table = Path(run.places.table(checkpoint, "training"))
            if table.is_file() and full == (run.variant == methods.FULL):
                found[stage_of(name).section] = read_table(table, "training")
        return {stage: curve for stage, curve in found.items() if len(curve)}
