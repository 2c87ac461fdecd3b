"""The structure that a newcomer relies on: names that agree, arithmetic that imports no model, digests that follow code."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mcsmoe.workflow import provenance

ROOT = Path(__file__).resolve().parents[1]
RULES = sorted(path.stem for path in (ROOT / "rules").glob("*.smk") if path.stem != "common")

NUMERICAL = [
    *(
        "mcsmoe.types",
        "mcsmoe.statistics.routing",
        "mcsmoe.similarity",
        "mcsmoe.align",
        "mcsmoe.grouping",
        "mcsmoe.merge",
    ),
    *("mcsmoe.compress.lowrank", "mcsmoe.compress.residual", "mcsmoe.train.losses"),
]
FORBIDDEN = ["transformers", "snakemake", "mlflow", "pandas", "pyarrow", "datasets", "accelerate"]


# One interpreter for all: a fork for each has imported nothing of ours before, and torch, which every one may have, only once.
_IMPORTED = """
import importlib, os, sys, torch
for module in sys.argv[2:]:
    if os.fork() == 0:
        importlib.import_module(module)
        print(module, *(name for name in sys.argv[1].split() if name in sys.modules), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, module
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What of FORBIDDEN each numerical module brings in when it is imported alone."""
    command = [sys.executable, "-c", _IMPORTED, " ".join(FORBIDDEN), *NUMERICAL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {module: forbidden for module, *forbidden in lines}


@pytest.mark.parametrize("module", NUMERICAL)
def test_numerical_modules_import_no_model_no_workflow_and_no_tracker(
    module: str, imported: dict[str, list[str]]
) -> None:
    assert imported[module] == []


@pytest.fixture(scope="module")
def understood(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rules as Snakemake understood them: those of the default, and of a model that is not trained."""
    folder = tmp_path_factory.mktemp("a folder")
    untrained = folder / "untrained.yaml"
    settings = {
        "zero_shot": True,
        "model": {"checkpoint": "some/model"},
        "tasks": ["COPA"],
        "variants": ["full", "msmoe"],
    }
    untrained.write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "tests" / "workflow_rules.py"), str(folder)]
    command += [str(ROOT / "config.yaml"), str(untrained)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trained, untouched = json.loads(done.stdout)
    assert "finetune" in set(trained) - set(untouched)
    assert "take_full" in set(untouched) - set(trained)
    return untouched | trained


def test_every_rule_has_a_file_and_every_file_a_rule(understood: dict[str, dict[str, Any]]) -> None:
    assert set(RULES) <= set(understood)
    # What a file has besides is its own rule with other files: the same script.
    for name, found in understood.items():
        assert name == "all" or understood[Path(found["file"]).stem]["script"] == found["script"]


@pytest.mark.parametrize("rule", RULES)
def test_rule_script_log_and_benchmark_share_a_name(rule: str, understood: dict[str, dict[str, Any]]) -> None:
    found = understood[rule]
    script = ROOT / "workflow_scripts" / f"{rule}.py"
    assert script.is_file()
    assert found["file"] == f"{rule}.smk"
    assert found["script"] == str(script)
    assert found["code"] == provenance.code_digest(script)
    assert found["messages"].startswith(f"results/logs/{rule}/")
    assert found["usage"].startswith(f"results/benchmarks/{rule}/")
    assert found["environment"] == "mcsmoe.yaml"
    assert found["message"]


@pytest.mark.parametrize("config", ["config.yaml", "tests/tiny_workflow.yaml"])
def test_snakemake_finds_nothing_to_complain_of(config: str, tmp_path: Path) -> None:
    # In a folder of its own: linting must not wait for a run in this one, nor leave anything here.
    command = [sys.executable, "-m", "snakemake", "--lint", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(tmp_path), "--configfile", str(ROOT / config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


_HELP = """
import contextlib, io, json, os, runpy, sys
shown = {}
for script in sys.argv[1:]:
    end, start = os.pipe()
    if os.fork() == 0:  # each in a process that has imported nothing of ours
        os.dup2(start, 1)
        sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
        os._exit(3)  # help ends a program
    os.close(start)
    with open(end) as text:
        shown[script] = text.read()
    assert os.wait()[1] == 0, script
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, str]:
    """What each stage's script shows when it is asked for help."""
    scripts = [str(ROOT / "workflow_scripts" / f"{rule}.py") for rule in RULES]
    done = subprocess.run(
        [sys.executable, "-c", _HELP, *scripts], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return {Path(script).stem: text for script, text in json.loads(done.stdout).items()}


@pytest.mark.parametrize("rule", RULES)
def test_every_stage_runs_alone_and_shows_an_example(rule: str, helped: dict[str, str]) -> None:
    assert "example:" in helped[rule]
    assert f"python workflow_scripts/{rule}.py" in helped[rule]


def test_a_digest_follows_the_modules_a_script_uses() -> None:
    used = {rule: set(provenance.modules_used(ROOT / "workflow_scripts" / f"{rule}.py")) for rule in RULES}
    names = {rule: {str(path.relative_to(ROOT)) for path in paths} for rule, paths in used.items()}
    assert "mcsmoe/train/loop.py" in names["finetune"]
    assert "mcsmoe/train/loop.py" not in names["group"]
    assert any(name.startswith("mcsmoe/merge") for name in names["merge"])
    assert not any(name.startswith("mcsmoe/merge") for name in names["finetune"])
    assert "mcsmoe/tracking/store.py" in names["publish"]
    assert sum("mcsmoe/tracking/store.py" in found for found in names.values()) == 1


def test_a_digest_sees_every_import_wherever_it_stands() -> None:
    for file in sorted((ROOT / "mcsmoe").rglob("*.py")) + sorted((ROOT / "workflow_scripts").glob("*.py")):
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert provenance._imports(file) == {name for name in found if name.startswith("mcsmoe.")}, file


def test_what_is_named_as_slow_is_a_test() -> None:
    for name in (ROOT / "tests" / "slow.txt").read_text().split():
        file, _, function = name.partition("::")
        assert f"\ndef {function}(" in (ROOT / file).read_text(), name


def test_mlflow_is_imported_in_one_place_only() -> None:
    importers = [
        str(path.relative_to(ROOT))
        for folder in ("mcsmoe", "workflow_scripts", "rules")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".smk") and re.search(r"^\s*(import|from) mlflow", path.read_text(), re.MULTILINE)
    ]
    assert importers == ["mcsmoe/tracking/store.py"]


def test_the_lock_has_every_requirement_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in (ROOT / "envs" / "requirements.lock").read_text().splitlines() if line]
    locked = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    given = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, given):
        if requirement.name != "torch":  # installed first and alone, by the version that pyproject.toml names
            version = locked.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not in the lock"
            assert version in requirement.specifier, f"{requirement} is locked to {version}"
    assert f"torch{Requirement(given[0]).specifier}" in (ROOT / "Makefile").read_text()


def test_hooks_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}


_TELEMETRY = ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def _in_a_clean_environment(code: str) -> str:
    """What ``code`` prints where nothing says yet that telemetry is off."""
    # MLflow sends nothing either where it finds itself in a test or in continuous integration.
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", code], env=kept, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_stage_switches_the_telemetry_of_the_hub_off() -> None:
    stage = "lambda _: print(importlib.import_module('huggingface_hub.constants').HF_HUB_DISABLE_TELEMETRY)"
    given = "argparse.Namespace(threads=1, log=None)"
    code = f"import argparse, importlib; from mcsmoe import console; console.run({stage}, {given})"
    assert _in_a_clean_environment(code) == "True"
    plain = "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    assert _in_a_clean_environment(plain) == "False", "the test would pass whatever the stage does"


def test_publishing_switches_the_telemetry_of_mlflow_off() -> None:
    off = "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    assert (
        _in_a_clean_environment(f"from mcsmoe.tracking import store as tracking; tracking._mlflow(); {off}") == "True"
    )
    assert _in_a_clean_environment(off) == "False", "the test would pass whatever publishing does"


def test_the_ui_tells_its_pages_to_send_nothing() -> None:
    handler = "from mlflow.server.handlers import get_ui_telemetry_handler as answer; from flask import Flask"
    asked = "context = Flask('x').app_context(); context.push(); print(answer().json['disable_ui_telemetry'])"
    environment = (
        "import os, shlex; from mcsmoe.tracking.store import ui_command; words = shlex.split(ui_command('results'))"
    )
    given = "os.environ.update(word.split('=', 1) for word in words[1 : words.index('ui') - 1])"
    assert _in_a_clean_environment(f"{environment}; {given}; {handler}; {asked}") == "True"


def test_make_switches_telemetry_off() -> None:
    exported = re.findall(r"^export (\w+) := (?:true|1)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(_TELEMETRY) <= set(exported)
