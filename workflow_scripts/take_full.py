"""Take a checkpoint as the full model of a task, untrained: its files are linked, or copied where they cannot be."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console

EXAMPLE = "python workflow_scripts/take_full.py --model base --out full"


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="written: checkpoint folder")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import os
    import shutil

    from mcsmoe.artefacts.atomic import atomic_directory

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    # Hidden files stay: Snakemake dates a folder by one of them, and a link would date every task's by the last.
    visible = shutil.ignore_patterns(".*")
    with atomic_directory(arguments.out) as partial:
        shutil.copytree(arguments.model, partial, copy_function=link_or_copy, dirs_exist_ok=True, ignore=visible)


if __name__ == "__main__":
    console.run(main, parse())
