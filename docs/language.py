"""Print what each method loses on a task of language, and the claims that this decides, as docs/results.md shows them.

A document counts once however many seeds there are: its sums over the seeds' models are compared, by a paired bootstrap over
documents, and p-values are corrected for the number of claims (Holm, 1979). A claim stands as confirmed or refuted where the
corrected p is below .05 and every seed says the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    import pandas as pd

    from mcsmoe.evaluate.confidence import Comparison

EXAMPLE = "python docs/language.py --results results/language --experts 12 8 4"
CLAIMS = {
    "alignment: `msmoe` over `unaligned`": ("msmoe", "unaligned"),
    "frequency: `unaligned` over `averaging`": ("unaligned", "averaging"),
    "router logits: `msmoe` over `random-groups`": ("msmoe", "random-groups"),
    "adaptive budget: `msmoe` over `uniform-budget`": ("msmoe", "uniform-budget"),
    "merging over pruning: `msmoe` over `pruning`": ("msmoe", "pruning"),
    "merge, then compress: `mcsmoe` over `compression`": ("mcsmoe", "compression"),
    "merging over REAP: `msmoe` over `reap-pruning`": ("msmoe", "reap-pruning"),
    "HC-SMoE over REAP": ("hc-smoe", "reap-pruning"),
    "REAM over REAP": ("ream", "reap-pruning"),
    "REAM over M-SMoE": ("ream", "msmoe"),
    "HOPE over REAP": ("hope", "reap-pruning"),
    "`gram` over HOPE": ("gram", "hope"),
    "`gram` over REAP": ("gram", "reap-pruning"),
    "`mass` over REAP": ("mass", "reap-pruning"),
    "REAP over frequency": ("reap-pruning", "frequency-pruning"),
    "REAP over random pruning": ("reap-pruning", "random-pruning"),
    "refit of `gram`": ("gram-refit", "gram"),
    "refit of REAP": ("reap-pruning-refit", "reap-pruning"),
    "`gram` refitted over REAP refitted": ("gram-refit", "reap-pruning-refit"),
    "`gram` refitted over M-SMoE refitted": ("gram-refit", "msmoe-refit"),
    "affine novices over deleting, `gram`": ("gram-affine", "gram"),
    "refit over affine novices, `gram`": ("gram-refit", "gram-affine"),
    "predicted budget over uniform, `gram`": ("gram-predicted", "gram"),
    "predicted budget over uniform, refitted": ("gram-predicted-refit", "gram-refit"),
    "refit over a short recovery: `gram-refit` over `reap-recovered`": ("gram-refit", "reap-recovered"),
    "recovery after the refit": ("gram-refit-recovered", "gram-refit"),
    "recovery: REAP over M-SMoE": ("reap-recovered", "msmoe-recovered"),
    "recovered: `gram` over REAP": ("gram-recovered", "reap-recovered"),
    "recovered: HOPE over REAP": ("hope-recovered", "reap-recovered"),
    "recovered: REAM over REAP": ("ream-recovered", "reap-recovered"),
    "recovered: HC-SMoE over REAP": ("hc-smoe-recovered", "reap-recovered"),
    "recovered: REAP over frequency": ("reap-recovered", "frequency-pruning-recovered"),
    "recovered: REAP over random pruning": ("reap-recovered", "random-pruning-recovered"),
    "recovered: refitted before over not, `gram`": ("gram-refit-recovered", "gram-recovered"),
    "recovered: affine novices over the refit, `gram`": ("gram-affine-recovered", "gram-refit-recovered"),
    "recovered: predicted budget over uniform, refitted": ("gram-predicted-refit-recovered", "gram-refit-recovered"),
    "refitted: HOPE over REAP": ("hope-refit", "reap-pruning-refit"),
    "refitted: HC-SMoE over REAP": ("hc-smoe-refit", "reap-pruning-refit"),
    "calibrated on code over on docstrings, `gram`": ("gram-code", "gram-docstrings"),
    "both by halves over code alone, refitted": ("refit-half", "refit-code"),
    "both by halves over docstrings alone, refitted": ("refit-half", "refit-docstrings"),
}
BY_DOMAIN = {
    "on code, calibrated on it over on docstrings, `gram`": ("gram-code", "gram-docstrings", "code"),
    "on docstrings, calibrated on them over on code, `gram`": ("gram-docstrings", "gram-code", "docstrings"),
    "on code, calibrated on it over on docstrings, refitted": ("refit-code", "refit-docstrings", "code"),
    "on docstrings, calibrated on them over on code, refitted": ("refit-docstrings", "refit-code", "docstrings"),
}
WORST = {
    "`max-min` over halves in the worst domain, `gram`": ("gram-max-min", "gram-half"),
    "`max-min` over halves in the worst domain, refitted": ("refit-max-min", "refit-half"),
}
BYTES = ("gram-refit", "gram-refit-4-bit")
"""Methods that are held against fewer bits alone: against the most bits a weight that take no more bytes."""
_RESAMPLES = 20_000
_LEVEL = 0.05

Folders = Mapping[str, Mapping[int, Path]]


@dataclass(frozen=True)
class Claim:
    """One comparison: what it is called, of how many experts, and what was found."""

    name: str
    experts: int
    made: Comparison
    by_seed: list[float]  # nats a token lost less


def found(results: Path, task: str, experts: int) -> dict[str, dict[int, Path]]:
    """By method and seed, the folder of the evaluation of its last checkpoint."""
    made: dict[str, dict[int, Path]] = {}
    for seed in sorted((results / task).glob("seed*")):
        number = int(seed.name.removeprefix("seed"))
        for folder in sorted(file.parent for file in seed.rglob("metrics.parquet")):
            parts = folder.relative_to(seed).parts
            method = parts[0].removesuffix("_evaluation")
            if len(parts) > 1 and parts[1] != f"{experts}e" and not keeps_all(method):
                continue
            if (folder / "predictions.parquet").is_file():
                made.setdefault(method, {})[number] = folder
    # Of a run that goes on, what is complete: seeds have the same sizes, so one of them tells.
    return {
        method: seeds for method, seeds in made.items() if any(costs(folder).is_file() for folder in seeds.values())
    }


def keeps_all(method: str) -> bool:
    """Rounding alone, and compression alone, keep every expert."""
    return method == "compression" or re.fullmatch(r"\d+-bit", method) is not None


# -- methods -----------------------------------------------------------------------------------------------------
def rows(folders: Folders) -> Iterable[str]:
    """The table of methods, the best first: means over seeds, of several intervals the widest."""
    import pandas as pd

    from mcsmoe.artefacts.tables import read_table

    tables = {
        method: pd.concat([read_table(folder / "metrics.parquet", "metrics") for folder in seeds.values()])
        for method, seeds in folders.items()
    }
    domains = [name for name in tables["full"]["metric"].unique() if name.startswith("nats_lost/")]
    names = [name.partition("/")[2] for name in domains]
    yield f"| method | MB | nats | lost | {' | '.join(names)} | by seed | divergence | same top token | loops |"
    yield "|---" * (8 + len(domains)) + "|"

    def lost(method: str) -> float:
        return float(tables[method].query("metric == 'nats_lost'")["value"].mean())

    for method in sorted(tables, key=lost):
        metric = {str(name): part for name, part in tables[method].groupby("metric")}
        cells = [f"`{method}`", f"{size(folders[method]) / 1e6:.2f}", f"{metric['nats']['value'].mean():.3f}"]
        for name in ("nats_lost", *domains):
            part = metric[name]
            half = float((part["ci_high"] - part["ci_low"]).max() / 2)
            cells.append("" if method == "full" else f"{part['value'].mean():+.4f} ± {half:.4f}")
        each = [f"{value:+.3f}" for value in metric["nats_lost"]["value"]]
        cells += ["" if method == "full" else ", ".join(each), f"{metric['divergence']['value'].mean():.4f}"]
        cells += [f"{metric[name]['value'].mean():.1%}" if name in metric else "" for name in ("agreement", "looping")]
        yield f"| {' | '.join(cells)} |"


def overview(by_number: Mapping[int, Folders]) -> Iterable[str]:
    """Nats a token lost by method, a column for each number of experts, the best in the middle column first."""
    import pandas as pd

    from mcsmoe.artefacts.tables import read_table

    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for number, folders in by_number.items():
        for method, seeds in folders.items():
            parts = [read_table(folder / "metrics.parquet", "metrics").set_index("metric") for folder in seeds.values()]
            lost = pd.DataFrame([part.loc["nats_lost"] for part in parts])
            half = float((lost["ci_high"] - lost["ci_low"]).max() / 2)
            found.setdefault(method, {})[number] = float(lost["value"].mean()), half, size(seeds) / 1e6
    numbers = list(by_number)
    middle = numbers[len(numbers) // 2]
    yield f"| nats a token lost, MB | {' | '.join(f'{number} experts' for number in numbers)} |"
    yield "|---" * (1 + len(numbers)) + "|"
    worst = (float("inf"),)
    for method, cells in sorted(found.items(), key=lambda one: one[1].get(middle, worst)):
        if method == "full":
            continue
        told = [f"{cells[n][0]:.4f} ± {cells[n][1]:.4f}, {cells[n][2]:.2f}" if n in cells else "" for n in numbers]
        if keeps_all(method):
            told = [told[0], *("the same" for _ in told[1:])]
        yield f"| `{method}` | {' | '.join(told)} |"


def size(seeds: Mapping[int, Path]) -> float:
    """Bytes of a method's weights at 16 bits, rounded ones at theirs."""
    from mcsmoe.artefacts.tables import read_table

    measured = next(file for file in map(costs, seeds.values()) if file.is_file())
    return float(read_table(measured, "cost")["packed_bytes"].iloc[0])


def costs(evaluation: Path) -> Path:
    """The table of costs of a checkpoint, beside its evaluation."""
    return evaluation.with_name(evaluation.name.removesuffix("_evaluation") + "_cost") / "cost.parquet"


def layers(folders: Folders) -> Iterable[str]:
    """Error by layer as calibration let expect it, and as it was measured: means over seeds, of methods that say it beforehand."""
    import pandas as pd

    from mcsmoe.artefacts.names import EXPECTED_ERROR, LAYER_ERROR
    from mcsmoe.artefacts.tables import read_table

    head = True
    for method, seeds in folders.items():
        table = pd.concat([read_table(folder / "metrics.parquet", "metrics") for folder in seeds.values()])
        value = table.groupby("metric", sort=False)["value"].mean()
        names = [name.partition("/")[2] for name in value.index if name.startswith(f"{EXPECTED_ERROR}/")]
        if not names:
            continue
        if head:
            yield f"| expected, measured | {' | '.join(names)} |"
            yield "|---" * (1 + len(names)) + "|"
            head = False
        cells = [f"{value[f'{EXPECTED_ERROR}/{name}']:.3f}, {value[f'{LAYER_ERROR}/{name}']:.3f}" for name in names]
        yield f"| `{method}` | {' | '.join(cells)} |"


# -- claims ------------------------------------------------------------------------------------------------------
def compared(one: Mapping[int, Path], other: Mapping[int, Path], domain: str = "") -> tuple[Comparison, list[float]]:
    """``one`` against ``other`` over the seeds that both have, and by seed the nats a token that it loses less."""
    import pandas as pd

    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.evaluate.confidence import paired

    def documents(folder: Path) -> pd.DataFrame:
        table = read_table(folder / "predictions.parquet", "documents")
        return table[table["group"] == domain] if domain else table

    seeds = sorted(set(one) & set(other))
    sums, by_seed = [], []
    pairs = [(documents(other[seed]), documents(one[seed])) for seed in seeds]
    for before, after in pairs:
        by_seed.append(float((before["nats"].sum() - after["nats"].sum()) / before["tokens"].sum()))
    for side in range(2):
        joined = pd.concat([pair[side] for pair in pairs]).groupby(["idx", "group"], as_index=False, sort=False)
        sums.append(joined[["tokens", "nats"]].sum())
    return paired(sums[0], sums[1], "nats", resamples=_RESAMPLES), by_seed


def corrected(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of one false finding among all stays below what each is held against."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    made, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        made[index] = least
    return made


def claims_of(folders: Folders, experts: int) -> Iterable[Claim]:
    """Every claim that the methods which were run decide."""
    wanted = [(name, one, other, "") for name, (one, other) in CLAIMS.items()]
    wanted += [(name, one, other, domain) for name, (one, other, domain) in BY_DOMAIN.items()]
    for name, (one, other) in WORST.items():
        if one in folders and other in folders:
            wanted.append((name, one, other, worst_domain(folders[other])))
    controls = {name: size(seeds) for name, seeds in folders.items() if keeps_all(name) and name != "compression"}
    for method in (method for method in BYTES if method in folders):
        smaller = {name: taken for name, taken in controls.items() if taken <= size(folders[method])}
        if smaller:
            control = max(smaller, key=lambda name: smaller[name])
            sizes = f"{size(folders[method]) / 1e6:.2f} MB, {smaller[control] / 1e6:.2f} MB"
            wanted.append((f"`{method}` over `{control}` ({sizes})", method, control, ""))
    for name, one, other, domain in wanted:
        if one in folders and other in folders and set(folders[one]) & set(folders[other]):
            made, by_seed = compared(folders[one], folders[other], domain)
            yield Claim(name, experts, made, by_seed)


def worst_domain(seeds: Mapping[int, Path]) -> str:
    """The domain in which a method loses most, over all seeds."""
    import pandas as pd

    from mcsmoe.artefacts.tables import read_table

    table = pd.concat([read_table(folder / "metrics.parquet", "metrics") for folder in seeds.values()])
    part = table[table["metric"].str.startswith("nats_lost/") & (table["metric"] != "nats_lost/worst")]
    return str(part.groupby("metric")["value"].mean().idxmax()).partition("/")[2]


def verdict(claim: Claim, p_value: float) -> str:
    """What may be said of it."""
    less = -claim.made.difference
    # A model on which both choose the same, and lose the same, says neither.
    if p_value >= _LEVEL or any(value * less <= 0 for value in claim.by_seed):
        return "not decided"
    return "confirmed" if less > 0 else "refuted"


def claims(every: Sequence[Claim]) -> Iterable[str]:
    """The table of claims, a row each, a column for each number of experts."""
    numbers = list(dict.fromkeys(claim.experts for claim in every))
    p_values = corrected([claim.made.p_value for claim in every])
    said = {(claim.name, claim.experts): (claim, p_value) for claim, p_value in zip(every, p_values, strict=True)}
    yield f"| nats a token less | {' | '.join(f'{number} experts' for number in numbers)} |"
    yield "|---" * (1 + len(numbers)) + "|"
    for name in dict.fromkeys(claim.name for claim in every):
        cells = []
        for number in numbers:
            claim, p_value = said.get((name, number), (None, 1.0))
            if claim is None:
                cells.append("")
                continue
            low, high = -claim.made.high, -claim.made.low
            each = ", ".join(f"{value:+.3f}" for value in claim.by_seed)
            number_text = f"{-claim.made.difference:+.4f} ({low:+.4f} to {high:+.4f}; {each})"
            cells.append(f"{number_text} **{verdict(claim, p_value)}**")
        yield f"| {name} | {' | '.join(cells)} |"


def main(results: Path, task: str, numbers: Sequence[int]) -> None:
    every: list[Claim] = []
    print("\n".join(overview({experts: found(results, task, experts) for experts in numbers})))
    for experts in numbers:
        folders = found(results, task, experts)
        if "full" not in folders:
            raise ValueError(
                f"--results is {results}, which has no evaluation of the full model on {task}; run the workflow"
            )
        print(f"\n{experts} experts\n\n" + "\n".join([*rows(folders), "", *layers(folders)]))
        every += claims_of(folders, experts)
        seeds = {method: sorted(of) for method, of in folders.items()}
        short = [method for method, of in seeds.items() if of != seeds["full"]]
        if short:
            print(f"not run with every seed: {', '.join(short)}", file=sys.stderr)
    print(f"\n{len(every)} claims\n\n" + "\n".join(claims(every)))


if __name__ == "__main__":
    from mcsmoe import console

    parser = console.parser((__doc__ or "").splitlines()[0], EXAMPLE)
    parser.add_argument("--results", type=Path, required=True, help="folder of results")
    parser.add_argument("--task", default="Language", help="task of language")
    parser.add_argument("--experts", type=int, nargs="+", required=True, help="experts kept on average")
    console.run(lambda given: main(given.results, given.task, given.experts), parser.parse_args())
