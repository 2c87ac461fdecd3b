"""Scores, paired tests and costs of every run, joined into one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.artefacts.layout import Places, RunPlaces
from mcsmoe.data.task import LANGUAGE
from mcsmoe.methods import FULL

if TYPE_CHECKING:
    import pandas as pd

_COST = ("parameters", "bytes_on_disk", "packed_bytes", "flops", "latency_ms", "peak_memory_bytes")
_KEYS = ("task", "variant", "experts", "seed", "stage")


@dataclass(frozen=True)
class Run:
    """One evaluated checkpoint, and where its tables lie."""

    task: str
    seed: int
    variant: str
    experts: int
    checkpoint: str
    places: RunPlaces

    @staticmethod
    def all(entries: Iterable[Mapping[str, Any]], results: Path) -> list[Run]:
        """The runs that the workflow lists."""
        places = Places(str(results))
        return [Run(**entry, places=places.run(entry["task"], entry["seed"])) for entry in entries]

    @property
    def stage(self) -> str:
        return self.checkpoint.rpartition("/")[2]

    @property
    def labels(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _KEYS}

    def table(self, kind: str) -> Path:
        """Path of ``predictions``, ``metrics``, ``cost``, ``training`` or ``selection`` of the checkpoint."""
        return Path(self.places.table(self.checkpoint, kind))

    @property
    def groups(self) -> Path | None:
        """The grouping that the checkpoint rests on, if it merged anything itself."""
        path = Path(self.places.groups(self.variant, self.experts))
        return path if path.is_file() else None


def summarise(runs: Sequence[Run], resamples: int) -> pd.DataFrame:
    """Table ``summary``: the main metric of every run, against the full model on the same examples.

    Raises:
        ValueError: predictions that are not of the full model's examples; names the run.
    """
    import pandas as pd

    from mcsmoe.artefacts.tables import SCHEMAS, read_table
    from mcsmoe.evaluate.confidence import paired

    full = {(run.task, run.seed): run for run in runs if run.variant == FULL}
    rows = []
    for run in runs:
        metrics = read_table(run.table("metrics"), "metrics")
        cost = read_table(run.table("cost"), "cost").iloc[0]
        row: dict[str, Any] = {str(name): value for name, value in metrics.iloc[0].items()}
        row |= {key: cost[key] for key in _COST}
        reference = full.get((run.task, run.seed))
        row |= {
            "difference": float("nan"),
            "p_value": float("nan"),
            "test": "none",
            "verdict": "no full model to compare",
        }
        if reference is run:
            row |= {"difference": 0.0, "verdict": "reference"}
        elif reference is not None:
            texts = row["protocol"] == LANGUAGE
            kind = "documents" if texts else "predictions"
            found = paired(
                read_table(reference.table("predictions"), kind),
                read_table(run.table("predictions"), kind),
                row["metric"],
                positive="" if texts else positive_of(run),
                resamples=resamples,
                seed=run.seed,
            )
            row |= {
                "difference": found.difference,
                "p_value": found.p_value,
                "test": found.test,
                "verdict": found.verdict,
            }
        rows.append(row)
    return pd.DataFrame(rows)[SCHEMAS["summary"].names]


def positive_of(run: Run) -> str:
    """The class that a two-way F1 counts, from the examples that were evaluated."""
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.evaluate.metrics import positive_answer

    examples = read_table(Path(run.places.examples("validation")), "examples")
    return positive_answer(examples["choices"].tolist())


def as_text(summary: pd.DataFrame) -> str:
    """The result table for a terminal, one block per task."""
    lines = []
    for task, rows in summary.groupby("task", sort=False):
        metric, n = rows["metric"].iloc[0], rows["n"].iloc[0]
        lines += [f"{task}: {metric}, {n} units of the validation split, 95 % intervals", ""]
        head = (
            "variant",
            "experts",
            "seed",
            metric,
            "interval",
            "vs full",
            "verdict",
            "parameters",
            "on disk",
            "latency",
        )
        table = [head]
        for row in rows.to_dict("records"):
            table.append(
                (
                    row["variant"],
                    str(row["experts"]),
                    str(row["seed"]),
                    f"{row['value']:.3f}",
                    f"{row['ci_low']:.3f}-{row['ci_high']:.3f}",
                    "" if row["variant"] == FULL else f"{row['difference']:+.3f}",
                    row["verdict"],
                    f"{row['parameters'] / 1e6:.2f} M",
                    f"{row['bytes_on_disk'] / 1e6:.2f} MB",
                    f"{row['latency_ms']:.1f} ms",
                )
            )
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.append("")
    return "\n".join(lines).rstrip()
