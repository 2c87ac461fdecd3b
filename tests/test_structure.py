"""The structure that a newcomer relies on: names that agree, arithmetic that imports no model, digests that follow code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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


@pytest.mark.parametrize("module", NUMERICAL)
def test_numerical_modules_import_no_model_no_workflow_and_no_tracker(module: str) -> None:
    check = f"import sys, {module}; print([n for n in {FORBIDDEN} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("rule", RULES)
def test_rule_script_log_and_benchmark_share_a_name(rule: str) -> None:
    text = (ROOT / "rules" / f"{rule}.smk").read_text()
    assert re.findall(r"^rule (\w+):", text, re.MULTILINE) == [rule]
    assert (ROOT / "workflow_scripts" / f"{rule}.py").is_file()
    for part in (f'script=script("{rule}")', f"{{LOGS}}/{rule}/", f"{{BENCHMARKS}}/{rule}/", f'code=code("{rule}")'):
        assert part in text, f"rule {rule} lacks {part}"
    # The order that snakefmt writes.
    order = ["input", "output", "log", "conda", "threads", "resources", "params", "message", "shell"]
    found = [text.index(f"\n    {word}:") for word in order if f"\n    {word}:" in text]
    assert found == sorted(found)
    assert f'"rules/{rule}.smk"' in (ROOT / "Snakefile").read_text()


@pytest.mark.parametrize("config", ["config.yaml", "tests/tiny_workflow.yaml"])
def test_snakemake_finds_nothing_to_complain_of(config: str, tmp_path: Path) -> None:
    # In a folder of its own: linting must not wait for a run in this one, nor leave anything here.
    command = [sys.executable, "-m", "snakemake", "--lint", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(tmp_path), "--configfile", str(ROOT / config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES)
def test_every_stage_runs_alone_and_shows_an_example(rule: str) -> None:
    script = ROOT / "workflow_scripts" / f"{rule}.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "example:" in done.stdout
    assert f"python workflow_scripts/{rule}.py" in done.stdout


def test_a_digest_follows_the_modules_a_script_uses() -> None:
    used = {rule: set(provenance.modules_used(ROOT / "workflow_scripts" / f"{rule}.py")) for rule in RULES}
    names = {rule: {str(path.relative_to(ROOT)) for path in paths} for rule, paths in used.items()}
    assert "mcsmoe/train/loop.py" in names["finetune"]
    assert "mcsmoe/train/loop.py" not in names["group"]
    assert any(name.startswith("mcsmoe/merge") for name in names["merge"])
    assert not any(name.startswith("mcsmoe/merge") for name in names["finetune"])
    assert "mcsmoe/tracking/store.py" in names["publish"]
    assert sum("mcsmoe/tracking/store.py" in found for found in names.values()) == 1


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
