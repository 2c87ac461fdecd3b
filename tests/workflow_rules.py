"""Print the rules of the workflow as Snakemake understood them, as JSON. Started as a program, not a test module.

Usage: python tests/workflow_rules.py FOLDER CONFIGURATION ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from snakemake.api import SnakemakeApi
from snakemake.settings.types import ConfigSettings, OutputSettings, ResourceSettings

ROOT = Path(__file__).resolve().parents[1]


def rules(folder: Path, configuration: Path) -> dict[str, dict[str, Any]]:
    """Per rule: file, script and digest of its code, logs, environment, message."""
    with SnakemakeApi(OutputSettings()) as api:
        parsed = api.workflow(
            ResourceSettings(cores=1),
            config_settings=ConfigSettings(configfiles=[configuration]),
            snakefile=ROOT / "Snakefile",
            workdir=folder,
        )
        found = {}
        for rule in parsed._workflow.rules:
            params, log = dict(rule.params.items()), dict(rule.log.items())
            found[rule.name] = {
                "file": Path(str(rule.snakefile)).name,
                "script": params.get("script") and str((folder / params["script"]).resolve()),
                "code": params.get("code"),
                **{name: str(file) for name, file in log.items()},
                "environment": rule.conda_env and Path(str(rule.conda_env)).name,
                "message": rule.message,
            }
        return found


if __name__ == "__main__":
    place, *configurations = map(Path, sys.argv[1:])
    print(json.dumps([rules(place, configuration.resolve()) for configuration in configurations]))
