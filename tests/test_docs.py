"""The documentation: links lead somewhere, names exist, commands are understood, examples run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pandas as pd
import pytest
import yaml
from faults import loaded

from mcsmoe import methods
from mcsmoe.cli import main as cli
from mcsmoe.workflow import config
from mcsmoe.workflow.schema import schema

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["Snakefile", "mcsmoe", "rules", "workflow_scripts", "profiles", "envs", "config.yaml"]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = (*("config", "docs", "benchmarks", "envs", "mcsmoe", "profiles", "rules", "tests", "workflow_scripts"),)
# Programs that are not ours, whose options are theirs to check.
SYSTEM = {
    *("$EDITOR", "awk", "bash", "cat", "cd", "cp", "curl", "docker", "do", "done", "echo", "export", "for", "git"),
    *(
        "grep",
        "head",
        "kill",
        "ls",
        "mkdir",
        "mlflow",
        "mv",
        "pip",
        "pre-commit",
        "rm",
        "sacct",
        "scancel",
        "sed",
        "sleep",
    ),
    *("source", "squeue", "tail", "tar", "tee", "while", "xargs"),
}


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


# -- links and names ---------------------------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on GitHub."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", prose(page)):
        link = target[0] or target[1]
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {link}, which is not there"
        assert ROOT in file.resolve().parents, f"{page.name} links to {link}, outside the project"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {link}; {file.name} has no such heading"


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n## `model.tokenizer`, and more\n## Twice\n## Twice\n```sh\n# no heading\n```\n")
    assert anchors(page) == {"a-title", "modeltokenizer-and-more", "twice", "twice-1"}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)(?:::\w+)?`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{page.name} names {name}, which {file} does not have"


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_method_is_described() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    choices = schema()["properties"]["methods"]["additionalProperties"]["properties"]
    named = [*methods.BUILTIN, *methods.SIMILARITIES, *methods.GROUPINGS, *methods.MERGES, methods.TASK_SPECIFIC]
    for key in ("alignment", "decomposition", "linkage", "budget"):
        named += choices[key]["enum"]
    named += schema()["properties"]["evaluate"]["properties"]["protocol"]["enum"][1:]
    assert [name for name in named if f"`{name}`" not in text] == []
    for name, method in methods.BUILTIN.items():
        row = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert row is not None, f"{name} has no row"
        if method.merge is not None and method.alignment != "none":
            assert f"`{method.alignment}`" in row[0]


def test_the_files_of_a_citation_are_readable() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["preferred-citation"]["authors"][0]["family-names"] == "Li"
    assert "2310.01334" in str(cited["preferred-citation"])


# -- commands ----------------------------------------------------------------------------------------------------
def commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a piece of shell, as words; heredocs, comments and variables set before are left out."""
    block = re.sub(r"<<'?(\w+)'?(.*?\n)(?:.*?\n)??\1\n", r"\2", block, flags=re.DOTALL)
    block = re.sub(r"(^|\s)#[^\n]*", r"\1", block).replace("\\\n", " ")
    lexer = shlex.shlex(block, posix=True, punctuation_chars=";&|<>\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if word and set(word) <= set(";&|\n"):
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(word)


def understood(words: list[str]) -> None:
    """Raise AssertionError unless the program is there and takes the options."""
    program, *rest = words
    if ">" in rest:
        rest = rest[: rest.index(">")]
    for word in words:
        if re.match(rf"({'|'.join(FOLDERS)})/", word):
            assert (ROOT / word).exists(), f"{word} is not there"
    if program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "mcsmoe":
        cli.parser().parse_args(rest)
    elif program == "snakemake":
        snakemake_takes(rest)
    elif program in ("python", "pytest"):
        if program == "python" and rest[0].endswith(".py"):
            script_takes(ROOT / rest[0], rest[1:])
    elif program not in SYSTEM:
        assert (ROOT / program).is_file(), f"{program} is no program of ours; if it is of the system, add it to SYSTEM"


def script_takes(script: Path, options: list[str]) -> None:
    assert script.is_file(), f"{script} is not there"
    spec = util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    if script.parent.name == "workflow_scripts":
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *options])
            module.parse()
        return
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for option in options:
        if option.startswith("--"):
            assert re.search(rf"{option}\b", done.stdout), f"{script.name} has no option {option}"


def snakemake_takes(options: list[str]) -> None:
    from snakemake.cli import get_argument_parser

    given, unknown = get_argument_parser().parse_known_args(options)
    assert unknown == [], f"snakemake has no {unknown}"
    for name in ("workflow_profile", "profile"):
        folder = getattr(given, name, None)
        assert folder is None or (ROOT / folder / "config.yaml").is_file(), f"no profile in {folder}"
    for file in given.configfile or []:
        path = ROOT / file
        if path.is_file():
            config.complete(yaml.safe_load(path.read_text()), check_data=False)
        else:
            assert str(file).startswith("tutorial/"), f"{file} is not there"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_understood(page: Path) -> None:
    for block in blocks(page, "sh"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for words in commands(block):
            try:
                understood(words)
            except SystemExit as error:
                if error.code != 0:  # --help ends a program, too, but without complaint
                    raise AssertionError(f"{page.name}: not understood: {shlex.join(words)}") from error


def test_shell_is_taken_apart_as_bash_does() -> None:
    block = "A=1 mcsmoe merge x \\\n  --out 'a; b'  # a comment\ncat > f <<'EOF'\nnot a command\nEOF\nmake a && make b | head\n"
    assert list(commands(block)) == [
        ["mcsmoe", "merge", "x", "--out", "a; b"],
        ["cat", ">", "f"],
        ["make", "a"],
        ["make", "b"],
        ["head"],
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["mcsmoe", "merge", "model", "--expert-count", "4", "--out", "x"],
        ["make", "nonsense"],
        ["snakemake", "--coers", "1"],
        ["snakemake", "--configfile", "config/nonsense.yaml"],
        ["python", "workflow_scripts/merge.py", "--nonsense"],
        ["python", "workflow_scripts/nonsense.py"],
        ["tests/nonsense.sh"],
        ["nonsense"],
    ],
    ids=shlex.join,
)
def test_a_wrong_command_is_found(words: list[str]) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        understood(words)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_configurations_that_are_shown_are_accepted(page: Path) -> None:
    for block in blocks(page, "yaml"):
        shown = yaml.safe_load(block)
        if isinstance(shown, dict) and set(shown) & set(schema()["properties"]):
            config.complete({"tasks": ["SST-2", "COPA"], **shown}, check_data=False)


# -- examples ----------------------------------------------------------------------------------------------------
def test_the_examples_of_extending_work(tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "docs" / "extending.md", "python"))
    assert code.count("assert ") >= 6
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment(ROOT), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_that_is_shown_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def environment(place: Path) -> dict[str, str]:
    """Where the programs of this interpreter and the library in ``place`` come first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return {**kept, "PATH": path, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}


def forked_programs(folder: Path) -> Path:
    """A folder with ``mcsmoe`` and ``python``, whose programs are forks of a process that has the libraries loaded.

    Twenty commands would else load them twenty times, which is most of their time. That commands and stages start by themselves
    is seen in ``test_cli``, ``test_compat`` and ``test_a_plain_install_works_from_any_folder``, and in ``test_jobs`` that a fork
    is what they would be.
    """
    launch = shlex.join(loaded.LAUNCH)
    installed = shlex.quote(str(Path(sys.executable).with_name("mcsmoe")))
    programs = {
        "mcsmoe": f'exec {launch} {installed} "$@"\n',
        "python": "script=$1; shift\n"
        f'if [ "$script" = - ]; then script=$(mktemp -p {shlex.quote(str(folder))}); cat > "$script"; fi\n'
        f'if [ "$script" = -c ]; then script=$(mktemp -p {shlex.quote(str(folder))}); echo "$1" > "$script"; shift; fi\n'
        f'exec {launch} "$script" "$@"\n',
    }
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.workflow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    place = tmp_path / "a fresh clone"
    for part in PARTS:
        source, target = ROOT / part, place / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    # What sets up, what never ends, and what would remove the evidence.
    left_out = ("make ", "source ", "python workflow_scripts/ui.py", "rm ")
    lines = [line for block in blocks(ROOT / "docs" / "tutorial.md", "sh") for line in block.splitlines()]
    script = "\n".join(line for line in lines if not line.startswith(left_out))
    assert len(lines) - len(script.splitlines()) == 4
    programs = environment(place)
    programs["PATH"] = os.pathsep.join([str(forked_programs(tmp_path / "programs")), programs["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        env=programs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    made = place / "tutorial"
    summary = pd.read_parquet(made / "results" / "summary.parquet").set_index("variant")
    assert list(summary.index) == ["full", "msmoe", "mcsmoe"]
    assert set(summary["task"]) == {"Reviews"}
    sizes = summary["bytes_on_disk"]
    assert sizes["mcsmoe"] < sizes["msmoe"] < sizes["full"]
    weights = {path.name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in made.iterdir()}
    assert weights["compressed"] < weights["merged"] < weights["model"]
    assert weights["stock"] < weights["dense"]
    last = done.stdout.rpartition("Job stats:")[2]
    assert "compress" in last
    assert "recover" not in last
