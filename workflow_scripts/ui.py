"""Open the MLflow UI on the runs that the workflow published, on this machine only."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from mcsmoe import console

EXAMPLE = "python workflow_scripts/ui.py --results results"


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results")
    parser.add_argument("--port", type=int, default=5000, help="port on this machine")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.tracking.address import embedded_uri, store_of, without_credentials
    from mcsmoe.tracking.store import check_published, ui_command

    uri = store_of(arguments.results)
    if uri == embedded_uri(arguments.results):
        check_published(arguments.results)
    elif uri.startswith(("http://", "https://")):
        print(f"the runs are on a server: open {without_credentials(uri)} in a browser")
        return
    words = shlex.split(ui_command(arguments.results, port=arguments.port))
    os.execvp(words[0], words)


if __name__ == "__main__":
    console.run(main, parse())
