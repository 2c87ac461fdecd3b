"""Open the MLflow UI on the runs that the workflow published, on this machine only."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from mcsmoe import console

EXAMPLE = "python workflow_scripts/ui.py --configfile config.yaml"


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"), help="configuration that was run")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import yaml

    from mcsmoe.tracking import ui_command

    results = Path((yaml.safe_load(arguments.configfile.read_text()) or {}).get("results", "results"))
    words = shlex.split(ui_command(results))
    os.execvp(words[0], words)


if __name__ == "__main__":
    console.run(main, parse())
