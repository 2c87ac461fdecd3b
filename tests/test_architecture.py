"""What may import what, and that the library stands alone: installed, it needs nothing of the repository."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_switch import model

import mcsmoe
from mcsmoe.workflow.provenance import modules_used

ROOT = Path(__file__).resolve().parents[1]
LAYERS: list[set[str]] = [
    {"types", "device", "interruptions", "refusals"},
    {"align", "projections", "artefacts", "statistics", "grouping", "console"},
    {"methods", "modules"},
    {"similarity"},
    {"merge", "compress", "criteria", "refit"},
    {"adapters", "data"},
    {"checkpoint", "workflow"},
    {"evaluate"},
    {"train"},
    {"calibration", "export"},
    {"transform", "report"},
    {"results"},
    {"tracking"},
    {"cli"},
    {"__main__"},
]
"""Packages and single modules of ``mcsmoe/``, from the ground up; each may import those below it (docs/architecture.md)."""

PURE = {"types", "methods", "align", "statistics", "grouping", "similarity", "merge", "compress", "criteria", "refit"}
"""Arithmetic: no models of a library, no files."""

HEAVY = {"transformers", "pandas", "pyarrow", "safetensors", "mlflow", "snakemake", "datasets"}


def modules() -> Iterator[tuple[str, Path]]:
    """(package or module directly in ``mcsmoe/``, file) of everything but the package's own door."""
    for file in sorted((ROOT / "mcsmoe").rglob("*.py")):
        first = file.relative_to(ROOT / "mcsmoe").parts[0].removesuffix(".py")
        if first != "__init__":
            yield first, file


def imports(file: Path) -> set[str]:
    """Names of the modules that ``file`` imports, at the top or inside a function; not those for type hints alone."""
    tree = ast.parse(file.read_text())
    hints = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_every_package_has_a_place() -> None:
    placed = set().union(*LAYERS)
    missing = {first for first, _ in modules()} - placed
    assert not missing, f"say in LAYERS, and in docs/architecture.md, above what {missing} stands"
    assert sum(map(len, LAYERS)) == len(placed)


def test_no_import_goes_up_or_sideways() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = [
        f"{file.relative_to(ROOT)} imports mcsmoe.{other}"
        for first, file in modules()
        for other in {name.split(".")[1] for name in imports(file) if name.startswith("mcsmoe.")}
        if other in level and other != first and level[other] >= level[first]
    ]
    assert not wrong, "\n".join(wrong)


def test_arithmetic_imports_no_models_and_no_files() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for first, file in modules()
        if first in PURE
        for name in imports(file)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_a_merge_method_reruns_no_grouping_and_methods_rerun_no_training() -> None:
    def reached(script: str) -> set[str]:
        return {str(file.relative_to(ROOT)) for file in modules_used(ROOT / "workflow_scripts" / f"{script}.py")}

    assert not [file for file in reached("group") if file.startswith("mcsmoe/merge/")]
    for script in ("finetune", "recover", "evaluate", "collect_routing"):
        assert "mcsmoe/methods.py" not in reached(script)
    for script in ("finetune", "prune", "recover"):
        assert not [file for file in reached(script) if file.startswith(("mcsmoe/merge/", "mcsmoe/grouping/"))]


def test_the_page_names_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for first in sorted({first for first, _ in modules()} - {"__main__"}):
        assert f"`{first}`" in page or f"`{first}/`" in page, f"docs/architecture.md does not say what {first} is for"


@pytest.mark.workflow  # installs, and starts the library three times
def test_a_plain_install_works_from_any_folder(tmp_path: Path) -> None:
    """Not editable, and far from the repository: the command line, a merge, and the schema that it reads."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(ROOT / "mcsmoe", source / "mcsmoe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (place,) = venv.glob("lib/python*/site-packages")
    # Dependencies are those of the tests' own environment; the editable install there is found only after this one.
    (place / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", place, source], check=True, capture_output=True)
    shutil.rmtree(source)
    mcsmoe.save(model(), tmp_path / "full")
    rows = [{"input_ids": [2 + (row + word) % 90 for word in range(8)], "labels": [3, 4, 5]} for row in range(8)]
    (tmp_path / "tokens.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    away = tmp_path / "elsewhere"
    away.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def python(*words: str) -> str:
        command = [venv / "bin" / "python", *words]
        done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    merging = ["merge", "../full", "--calibration", "../tokens.jsonl", "--experts", "2", "--out", "merged"]
    python("-m", "mcsmoe", *merging)
    check = (
        "import mcsmoe, pathlib; from mcsmoe.workflow import config; print(pathlib.Path(mcsmoe.__file__).parent);"
        "config.complete({'tasks': ['COPA']}); mcsmoe.load('merged')"
    )
    assert python("-c", check).strip() == str(place / "mcsmoe")


@pytest.mark.parametrize("folder", ["mcsmoe", "workflow_scripts"])
def test_no_file_is_long(folder: str) -> None:
    lines = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert max(lines.values()) <= 400, {str(file): count for file, count in lines.items() if count > 400}
