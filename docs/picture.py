"""Draw score, or loss, against bytes of one task, the picture of the README, from a finished run.

As it was made: python docs/picture.py --results results --task Language --out docs/images/tradeoff.svg
"""

from __future__ import annotations

from pathlib import Path

EXAMPLE = "python docs/picture.py --results results --task Language --out docs/images/tradeoff.svg"


def main(results: Path, task: str, out: Path) -> None:
    import matplotlib as mpl
    import pandas as pd

    from mcsmoe.artefacts.atomic import atomic_file
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.report import language, plots

    summary = read_table(results / "summary.parquet", "summary")
    rows = summary[summary["task"] == task]
    if rows.empty:
        raise ValueError(f"--task is {task!r}, of which {results} has no rows; it has {sorted(set(summary['task']))}")
    if language.is_language(rows):
        files = sorted((results / task).rglob("metrics.parquet"))
        metrics = pd.concat([read_table(file, "metrics") for file in files], ignore_index=True)
        figure = language.against_bytes(
            dict(language.lost(rows, metrics))[""], "generated text: nats a token lost, and bytes"
        )
    else:
        figure = plots.tradeoff(rows, f"generated {task}: {rows['metric'].iloc[0]} against bytes on disk")
    # Without a date and with ids from the name, the same run gives the same file. On white: pages may be dark.
    with atomic_file(out) as partial, mpl.rc_context({"svg.hashsalt": task}):
        figure.savefig(partial, format=out.suffix[1:], metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    from mcsmoe import console

    parser = console.parser((__doc__ or "").splitlines()[0], EXAMPLE)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results")
    parser.add_argument("--task", required=True, help="task to draw")
    parser.add_argument("--out", type=Path, required=True, help="written: .svg or .png")
    console.run(lambda given: main(given.results, given.task, given.out), parser.parse_args())
