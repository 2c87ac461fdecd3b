"""Run the workflow on a small trained language model that comes with figures, and print its table beside them.

The model's folder holds calibration.parquet and validation.parquet (column input_ids: windows of tokens) and figures.json (what
methods lose, with half widths of 95 % intervals, by experts kept). Windows become texts, which nearly all give the same tokens
again. A method agrees if the two differ by less than their intervals together.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EXAMPLE = 'python docs/agreement.py --model "$MCSMOE_SHARED/models/prose-qwen3moe" --out results/prose'
METHODS: dict[str, dict[str, Any]] = {
    "frequency": {"base": "frequency-pruning"},
    "reap": {"base": "reap-pruning"},
    "man": {"base": "man"},
    "mass": {"base": "mass"},
    "hope": {"base": "hope"},
    "gram": {"base": "gram"},
    "redirect": {"base": "frequency-pruning", "dropped": "redirect"},
    "msmoe": {"base": "msmoe", "budget": "uniform", "alignment": "weight-dominant"},
    "ream": {"base": "ream"},
    "novice-constant": {"base": "gram", "dropped": "constant"},
    "novice-affine-16": {"base": "gram", "dropped": "affine", "novice_rank": 16},
}
"""By name in the figures: the method of a configuration. Random pruning is left out: what it drops is chance."""


def write_texts(model: Path, folder: Path) -> tuple[int, int]:
    """Windows as the files of a task of language; how many there are, and how many give the same tokens again."""
    import pandas as pd

    from mcsmoe.checkpoint.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    count = same = 0
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "calibration"), ("validation", "validation")):
        rows = [list(ids) for ids in pd.read_parquet(model / f"{name}.parquet")["input_ids"]]
        texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in rows]
        count, same = (
            count + len(rows),
            same + sum(tokenizer(texts)["input_ids"][n] == ids for n, ids in enumerate(rows)),
        )
        texts += texts[:1] if split == "train" else []  # one row is set aside to select checkpoints on
        table = pd.DataFrame({"idx": [f"{split}-{n}" for n in range(len(texts))], "domain": "prose", "text": texts})
        table.to_parquet(folder / f"{split}.parquet")
    return count, same


def configuration(model: Path, out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """What the workflow is given."""
    known = {name: how for name, how in METHODS.items() if any(name in kept for kept in figures["kept"].values())}
    return {
        "results": str(out),
        "tasks": ["Language"],
        "experts": [int(kept) for kept in figures["kept"]],
        "zero_shot": True,
        "variants": ["full", *(f"f-{name}{end}" for name in known for end in ("", "-refitted"))],
        "methods": {
            f"f-{name}{end}": {**how, "refit": refit}
            for name, how in known.items()
            for end, refit in (("", False), ("-refitted", True))
        },
        "device": "cpu",
        "data": {
            "source": "files",
            "folder": str(out / "texts"),
            "selection_rows": 1,
            "max_input": 64,
            "max_label": 64,
        },
        "model": {"checkpoint": str(model)},
        "calibration": {"samples": 192, "batch_size": 16},
        "evaluate": {"batch_size": 16, "continuations": 0},
        "cost": {"batch_size": 1, "input_tokens": 16, "label_tokens": 2, "repeats": 1},
    }


def rows(out: Path, figures: dict[str, Any]) -> Iterator[str]:
    """The table, and how many agree."""
    from mcsmoe.artefacts.tables import read_table

    place = out / "Language" / "seed0"
    full = read_table(place / "full_evaluation" / "metrics.parquet", "metrics").set_index("metric")["value"]["nats"]
    yield f"Full model: {full:.4f} nats a token; the figures say {figures['full']:.4f}.\n"
    yield "| experts | method | figures | workflow | | figures, refitted | workflow, refitted | |"
    yield "|---|---|---|---|---|---|---|---|"
    agree = tried = 0
    for kept, of_methods in figures["kept"].items():
        for name, figure in of_methods.items():
            cells = []
            for end, value, half in (("", *figure[:2]), ("-refitted", *figure[2:])):
                file = place / f"f-{name}{end}" / f"{kept}e" / "merged_evaluation" / "metrics.parquet"
                if not file.is_file():
                    continue
                lost = read_table(file, "metrics").set_index("metric").loc["nats_lost"]
                own = (lost["ci_high"] - lost["ci_low"]) / 2
                gap = lost["value"] - value
                word = "agrees" if abs(gap) <= math.hypot(own, half) else "loses less" if gap < 0 else "loses more"
                tried, agree = tried + 1, agree + (word == "agrees")
                cells += [f"{value:.4f} ± {half:.4f}", f"{lost['value']:.4f} ± {own:.4f}", word]
            if cells:
                yield f"| {kept} | {name} | {' | '.join(cells)} |"
    yield f"\n{agree} of {tried} agree."


def main(model: Path, out: Path, cores: str) -> None:
    figures = json.loads((model / "figures.json").read_text())
    out = out.resolve()
    count, same = write_texts(model, out / "texts" / "Language")
    print(f"{same} of {count} windows give the same tokens again", file=sys.stderr)
    given = out / "configuration.yaml"
    given.write_text(yaml.safe_dump(configuration(model.resolve(), out, figures), sort_keys=False))
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        cores,
        "--configfile",
        given,
        "--quiet",
        "rules",
        "progress",
    ]
    subprocess.run([*map(str, command)], cwd=ROOT, env={**os.environ}, check=True)
    print("\n".join(rows(out, figures)))


if __name__ == "__main__":
    from mcsmoe import console

    parser = console.parser((__doc__ or "").splitlines()[0], EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model and its figures")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--cores", default="all", help="cores that the workflow may take")
    console.run(lambda given: main(given.model, given.out, given.cores), parser.parse_args())
