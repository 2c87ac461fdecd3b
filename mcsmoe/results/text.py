"""The words at the end of a workflow."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def ending(results: Path) -> str:
    """The result table, where the report is, and how to open the tracked runs; empty until everything is summarised."""
    from mcsmoe.artefacts.layout import Places
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.results.summary import as_text

    file = Path(Places(str(results)).summary)
    if not file.is_file():
        return ""
    summary = read_table(file, "summary")
    report = Places(str(results)).report
    return "\n".join(
        [
            "",
            as_text(summary),
            "",
            f"report:   {report}",
            f"MLflow:   {shlex.join([sys.executable, 'workflow_scripts/ui.py', '--results', str(results)])}",
            "",
        ]
    )
