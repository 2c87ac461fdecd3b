"""Print what each method loses on a task of language, as docs/results.md shows it.

Means over seeds; the interval is over documents, of several seeds the widest. Claims compare two methods document by document,
by a bootstrap over documents of the first seed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXAMPLE = "python docs/language.py --results results/language --experts 8"
CLAIMS = {
    "alignment (`msmoe` over `unaligned`)": ("msmoe", "unaligned"),
    "frequency (`unaligned` over `averaging`)": ("unaligned", "averaging"),
    "router logits over random groups": ("msmoe", "random-groups"),
    "adaptive budget over uniform": ("msmoe", "uniform-budget"),
    "merging over pruning (`msmoe` over `pruning`)": ("msmoe", "pruning"),
    "merging over REAP": ("msmoe", "reap-pruning"),
    "REAM over REAP": ("ream", "reap-pruning"),
    "HOPE over REAP": ("hope", "reap-pruning"),
    "`gram` over REAP": ("gram", "reap-pruning"),
    "`gram` over random pruning": ("gram", "random-pruning"),
    "refit of `gram`": ("gram-refit", "gram"),
    "refit of REAP": ("reap-pruning-refit", "reap-pruning"),
    "affine novices over deleting": ("gram-affine", "gram"),
    "predicted budget over uniform": ("gram-predicted", "gram"),
    "`gram` refitted over 4 bits": ("gram-refit", "4-bit"),
    "`gram` refitted over 2 bits": ("gram-refit", "2-bit"),
}
_RESAMPLES = 10_000


def found(results: Path, task: str, experts: int) -> dict[str, dict[int, Path]]:
    """By method and seed, the folder of the evaluation of its last checkpoint."""
    made: dict[str, dict[int, Path]] = {}
    for seed in sorted((results / task).glob("seed*")):
        number = int(seed.name.removeprefix("seed"))
        for folder in sorted(file.parent for file in seed.rglob("metrics.parquet")):
            parts = folder.relative_to(seed).parts
            method = parts[0].removesuffix("_evaluation")
            # Rounding alone keeps every expert.
            if len(parts) > 1 and parts[1] != f"{experts}e" and not method.endswith("-bit"):
                continue
            made.setdefault(method, {})[number] = folder
    return made


def rows(folders: dict[str, dict[int, Path]]) -> Iterable[str]:
    """The table of methods, the best first."""
    from mcsmoe.artefacts.tables import read_table

    tables = {
        method: pd.concat([read_table(folder / "metrics.parquet", "metrics") for folder in seeds.values()])
        for method, seeds in folders.items()
    }
    domains = [name for name in tables["full"]["metric"].unique() if name.startswith("nats_lost/")]
    names = [name.partition("/")[2] for name in domains]
    yield f"| method | seeds | nats | lost | {' | '.join(names)} | divergence | same top token |"
    yield "|---" * (6 + len(domains)) + "|"

    def lost(method: str) -> float:
        return float(tables[method].query("metric == 'nats_lost'")["value"].mean())

    for method in sorted(tables, key=lost):
        metric = {str(name): part for name, part in tables[method].groupby("metric")}
        cells = [f"`{method}`", str(len(folders[method])), f"{metric['nats']['value'].mean():.3f}"]
        for name in ("nats_lost", *domains):
            part = metric[name]
            half = float((part["ci_high"] - part["ci_low"]).max() / 2)
            cells.append("" if method == "full" else f"{part['value'].mean():+.4f} ± {half:.4f}")
        cells += [f"{metric['divergence']['value'].mean():.4f}", f"{metric['agreement']['value'].mean():.1%}"]
        yield f"| {' | '.join(cells)} |"


def claims(folders: dict[str, dict[int, Path]]) -> Iterable[str]:
    """Pairs of methods, document by document."""
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.evaluate.confidence import paired

    yield "| claim | nats a token less | 95 % interval | p | verdict |"
    yield "|---|---|---|---|---|"
    for claim, (one, other) in CLAIMS.items():
        if one not in folders or other not in folders:
            continue
        seed = min(folders[one])
        tables = [read_table(folders[name][seed] / "predictions.parquet", "documents") for name in (other, one)]
        made = paired(tables[0], tables[1], "nats", resamples=_RESAMPLES)
        word = {"better": "confirmed", "worse": "refuted"}.get(made.verdict, "not decided")
        low, high = -made.high, -made.low
        yield f"| {claim} | {-made.difference:+.4f} | {low:+.4f} to {high:+.4f} | {made.p_value:.4f} | {word} |"


def main(results: Path, task: str, experts: int) -> None:
    folders = found(results, task, experts)
    if "full" not in folders:
        raise ValueError(
            f"--results is {results}, which has no evaluation of the full model on {task}; run the workflow"
        )
    tables = np.unique([len(seeds) for seeds in folders.values()])
    print("\n".join([*rows(folders), "", *claims(folders)]))
    if len(tables) > 1:
        print("\nnot every method has been run with every seed", file=sys.stderr)


if __name__ == "__main__":
    from mcsmoe import console

    parser = console.parser((__doc__ or "").splitlines()[0], EXAMPLE)
    parser.add_argument("--results", type=Path, required=True, help="folder of results")
    parser.add_argument("--task", default="Language", help="task of language")
    parser.add_argument("--experts", type=int, required=True, help="experts kept on average")
    console.run(lambda given: main(given.results, given.task, given.experts), parser.parse_args())
