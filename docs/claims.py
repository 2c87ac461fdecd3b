"""Write the tables of docs/results.md that compare methods: each with the full model, and the pairs that the paper's claims name.

As it was made: python docs/claims.py --results results/methods-generated --task COPA --experts 2
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

EXAMPLE = "python docs/claims.py --results results/methods-generated --task COPA --experts 2"
RESAMPLES = 20_000

CLAIMS = {
    "adaptive budget over uniform": ("msmoe", "budget-uniform"),
    "router-logits over random": ("msmoe", "similarity-random"),
    "router-logits over weight": ("msmoe", "similarity-weight"),
    "router-logits over weight-feature": ("msmoe", "similarity-weight-feature"),
    "router-logits over gradient": ("msmoe", "similarity-gradient"),
    "router-logits over feature": ("msmoe", "similarity-feature"),
    "router-logits over feature.abs": ("msmoe", "similarity-feature.abs"),
    "router-logits over router-weight": ("msmoe", "similarity-router-weight"),
    "alignment over none": ("msmoe", "no-alignment"),
    "frequency over uniform": ("msmoe", "weights-uniform"),
    "frequency over fisher": ("msmoe", "fisher"),
    "distillation over none": ("msmoe", "no-distillation"),
    "M-SMoE over pruning": ("msmoe", "pruning"),
    "M-SMoE over plain averaging": ("msmoe", "averaging"),
    "merging first over compression alone": ("mcsmoe", "compression"),
}
"""Claim: the method that the paper prefers, and the other."""

Right = NDArray[np.float64]


class Answers:
    """Which validation rows each method answers rightly, by seed, before recovery and after it."""

    def __init__(self, results: Path, task: str, experts: int, seeds: list[int]) -> None:
        from mcsmoe.artefacts.tables import read_table

        self.seeds = seeds
        folders = [results / task / f"seed{seed}" for seed in seeds]
        summary = read_table(results / "summary.parquet", "summary")
        self.variants = list(dict.fromkeys(summary["variant"]))  # in the order in which they were configured
        self.found: dict[tuple[str, str], Right] = {}
        for file in sorted(folders[0].rglob("predictions.parquet")):
            checkpoint = file.parent.relative_to(folders[0])
            variant, *rest = checkpoint.as_posix().removesuffix("_evaluation").split("/")
            if rest and rest[0] != f"{experts}e" and variant != "compression":
                continue
            when = "before" if rest and rest[-1] in ("merged", "pruned") else "after"
            files = [folder / checkpoint / file.name for folder in folders]
            if all(path.is_file() for path in files):
                tables = [read_table(path, "predictions").set_index("idx")["correct"] for path in files]
                same = [table.loc[tables[0].index].to_numpy(np.float64) for table in tables]
                self.found[variant, when] = np.stack(same)  # [S, N]

    def __getitem__(self, key: tuple[str, str]) -> Right | None:
        variant, when = key
        # The full model is one and the same before recovery and after it.
        return self.found.get((variant, "after" if variant == "full" else when))


def compared(one: Right, other: Right) -> tuple[float, float, list[float]]:
    """Difference of two methods over rows and seeds, its p-value, and the difference of each seed.

    With one seed McNemar's exact test; with more, the rows' differences are averaged over the seeds, whose rows are the same,
    and their signs are flipped at random (Fisher's randomisation test), so that a row counts once.

    Args:
        one, other: [S, N] 1 where seed ``s`` answers row ``n`` rightly.
    """
    from mcsmoe.evaluate.confidence import mcnemar

    difference_SN = one - other
    by_seed = difference_SN.mean(axis=1).tolist()
    if len(by_seed) == 1:
        return by_seed[0], mcnemar(other[0] > 0, one[0] > 0), by_seed
    rows_N = difference_SN.mean(axis=0)
    moved = rows_N[rows_N != 0]
    flips = np.random.default_rng(0).choice([-1.0, 1.0], size=(RESAMPLES, len(moved)))
    as_far = np.abs(flips @ moved) >= abs(moved.sum()) - 1e-9
    return float(rows_N.mean()), (1 + int(as_far.sum())) / (1 + RESAMPLES), by_seed


def _score(right_SN: Right) -> str:
    scores = right_SN.mean(axis=1)
    each = f" ({', '.join(f'{score:.3f}' for score in scores)})" if len(scores) > 1 else ""
    return f"{scores.mean():.3f}{each}"


def methods_table(answers: Answers) -> Iterable[str]:
    """Each method against the full model."""
    from mcsmoe.evaluate.confidence import verdict

    yield "| method | before recovery | against full | p | after recovery | against full | p |"
    yield "|---|---|---|---|---|---|---|"
    for variant in answers.variants:
        cells = []
        for when in ("before", "after"):
            made, full = answers[variant, when], answers["full", when]
            if made is None or full is None:
                cells += ["", "", ""]
                continue
            difference, p_value, _ = compared(made, full)
            against = "reference" if variant == "full" else f"{difference:+.3f} {verdict(difference, p_value)}"
            cells += [_score(made), against, "" if variant == "full" else f"{p_value:.3f}"]
        yield f"| `{variant}` | {' | '.join(cells)} |"


def claims_table(answers: Answers) -> Iterable[str]:
    """The pairs of ``CLAIMS``, in points of accuracy."""
    yield "| claim | before recovery | p | after recovery | p |"
    yield "|---|---|---|---|---|"
    for claim, (one, other) in CLAIMS.items():
        cells = []
        for when in ("before", "after"):
            left, right = answers[one, when], answers[other, when]
            if left is None or right is None:
                cells += ["", ""]
                continue
            difference, p_value, by_seed = compared(left, right)
            each = f" ({', '.join(f'{100 * value:+.1f}' for value in by_seed)})" if len(by_seed) > 1 else ""
            cells += [f"{100 * difference:+.1f}{each}", f"{p_value:.3f}"]
        yield f"| {claim} | {' | '.join(cells)} |"


def main(results: Path, task: str, experts: int) -> None:
    seeds = sorted(int(folder.name.removeprefix("seed")) for folder in (results / task).glob("seed*"))
    if not seeds:
        raise ValueError(f"--task is {task!r}, of which {results} has no run; give the folder of a finished workflow")
    answers = Answers(results, task, experts, seeds)
    print(f"seeds: {', '.join(map(str, seeds))}\n")
    print("\n".join([*methods_table(answers), "", *claims_table(answers)]))


if __name__ == "__main__":
    from mcsmoe import console

    parser = console.parser((__doc__ or "").splitlines()[0], EXAMPLE)
    parser.add_argument("--results", type=Path, required=True, help="folder of results")
    parser.add_argument("--task", required=True, help="task whose methods are compared")
    parser.add_argument("--experts", type=int, default=2, help="experts kept on average")
    console.run(lambda given: main(given.results, given.task, given.experts), parser.parse_args())
