"""The structure that a newcomer relies on: names that agree, arithmetic that imports no model, digests that follow code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mcsmoe import provenance

ROOT = Path(__file__).resolve().parents[1]
RULES = sorted(path.stem for path in (ROOT / "rules").glob("*.smk") if path.stem != "common")

NUMERICAL = [
    *("mcsmoe.types", "mcsmoe.routing", "mcsmoe.similarity", "mcsmoe.align", "mcsmoe.grouping", "mcsmoe.merge"),
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
    order = ["input", "output", "log", "benchmark", "conda", "threads", "resources", "params", "message", "shell"]
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
    assert "mcsmoe/tracking.py" in names["publish"]
    assert sum("mcsmoe/tracking.py" in found for found in names.values()) == 1


def test_mlflow_is_imported_in_one_place_only() -> None:
    importers = [
        str(path.relative_to(ROOT))
        for folder in ("mcsmoe", "workflow_scripts", "rules")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".smk") and re.search(r"^\s*(import|from) mlflow", path.read_text(), re.MULTILINE)
    ]
    assert importers == ["mcsmoe/tracking.py"]
