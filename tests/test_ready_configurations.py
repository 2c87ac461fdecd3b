"""The ready configurations: the documented numbers of jobs are those of the dry runs, and work is shared in the DAG."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from faults import loaded

from mcsmoe import methods
from mcsmoe.data.tasks import load_task
from mcsmoe.report import published
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow.compared_methods import resolve

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configurations.md"
FILES = {"config.yaml": ROOT / "config.yaml"} | {file.stem: file for file in sorted((ROOT / "config").glob("*.yaml"))}
PAPER = ("paper", "paper_compat", "ablations")
NEEDS_FILES = ("sst2", "real", "methods")
SHARED = Path(os.environ.get("MCSMOE_SHARED", ROOT.parent / "shared")).resolve()

# Before Snakemake in a process that may be a fork, and in a module that every other Python imports at start.
NO_NETWORK = """
import socket
def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError(f"a dry run reached for the network: {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
def unknown(host, *rest, **options):
    raise OSError(f"a dry run asked for the address of {host}")
socket.getaddrinfo = unknown
"""
PLAN = f"{NO_NETWORK}\nimport sys\nfrom snakemake.cli import main\nsys.exit(main())\n"
PROGRAMS = ("sitecustomize.py", "plan.py", "reach.py")
REACH = f"{NO_NETWORK}\nsocket.create_connection(('huggingface.co', 443))\n"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without results, with a program that plans and cannot reach the network."""
    folder = tmp_path_factory.mktemp("dry runs")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    (folder / "plan.py").write_text(PLAN)
    (folder / "reach.py").write_text(REACH)
    started = [sys.executable, "-c", "import socket; socket.create_connection(('huggingface.co', 443))"]
    for program in (started, [*loaded.LAUNCH, "--light", folder / "reach.py"]):
        cut = subprocess.run(program, env=without_network(folder), capture_output=True, text=True, check=False)
        assert "a dry run asked for the address of huggingface.co" in cut.stderr
    return folder


def without_network(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "MCSMOE_SHARED": str(SHARED)}


@cache
def dry_run(name: str, folder: Path, *settings: str) -> str:
    """Output of a dry run in ``folder``, where nothing has been made."""
    if name in NEEDS_FILES and not (SHARED / "data").is_dir():
        pytest.skip(f"MCSMOE_SHARED names no folder with data: {SHARED}")
    command = [*loaded.LAUNCH, "--light", folder / "plan.py", "--snakefile", ROOT / "Snakefile", "--directory", folder]
    command += ["--configfile", FILES[name], "--cores", "2", "--dry-run", "--printshellcmds"]
    command += ["--config", *settings] if settings else []
    done = subprocess.run(
        [*map(str, command)], env=without_network(folder), capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


def counts(output: str) -> dict[str, int]:
    """Jobs by rule, and ``total``, from the table that Snakemake prints first."""
    table = output.split("Job stats:")[1].split("\n\n")[0]
    return {rule: int(number) for rule, number in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def commands(output: str) -> set[str]:
    return set(re.findall(r"^Shell command: (python .*|.*workflow_scripts.*)$", output, re.MULTILINE))


def documented() -> dict[str, dict[str, int]]:
    """Jobs by configuration and rule, from the page's table."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    start = next(number for number, row in enumerate(cells) if row[0] == "rule")
    names, found = cells[start][1:], dict[str, dict[str, int]]()
    for row in cells[start + 2 :]:
        for name, cell in zip(names, row[1:], strict=True):
            if cell:
                found.setdefault(name, {})[row[0]] = int(cell)
        if row[0] == "total":
            return found
    raise AssertionError("the table of jobs has no total")


def read(name: str) -> dict[str, Any]:
    return configuration.complete(yaml.safe_load(FILES[name].read_text()), check_data=False)


def test_every_configuration_is_documented() -> None:
    assert set(documented()) == set(FILES), f"give every configuration a column and a row in {PAGE.name}"
    text = PAGE.read_text()
    for file in FILES.values():
        assert f"| `{file.relative_to(ROOT)}` |" in text


@pytest.mark.workflow
@pytest.mark.parametrize("name", FILES)
def test_the_documented_jobs_are_those_of_the_dry_run(name: str, empty: Path) -> None:
    found = counts(dry_run(name, empty))
    assert found == documented()[name]
    assert found["total"] == sum(number for rule, number in found.items() if rule != "total")
    made = [path for path in empty.rglob("*") if path.is_file() and ".snakemake" not in path.parts]
    assert {path.name for path in made if path.suffix != ".pyc"} <= {*PROGRAMS, ".lock"}


@pytest.mark.workflow
@pytest.mark.parametrize("name", FILES)
def test_work_is_shared(name: str, empty: Path) -> None:
    """The numbers that follow from the methods, not from the page."""
    config, found = read(name), counts(dry_run(name, empty))
    known = resolve(config)
    runs, chosen = len(config["tasks"]) * len(config["seeds"]), [known[variant] for variant in config["variants"]]
    assert found["prepare"] == len(config["seeds"])
    assert found["prepare_data"] == found["collect_routing"] == runs
    given = config["zero_shot"] or not config["finetuned"]
    assert found["take_full" if given else "finetune"] == runs
    assert ("finetune" in found) != given
    # Parents are made, too, whether or not they are compared.
    made = {method.name: method for method in chosen}
    made |= {method.parent: known[method.parent] for method in chosen if method.parent}
    in_sequence = [each for each in made.values() if each.in_sequence]
    sequences = sum(len(config["experts"]) if each.fewer else 1 for each in in_sequence)
    assert found.get("reduce", 0) == runs * sequences
    merged = [
        each for each in made.values() if each.merge not in (None, methods.TASK_SPECIFIC) and not each.in_sequence
    ]
    aligned = {each.alignment for each in merged} & {"weight", "weight-input", "activation"}
    assert found.get("permute", 0) == runs * len(aligned)
    assert found.get("group", 0) == found.get("merge", 0) == runs * len(config["experts"]) * len(merged)
    assert found.get("collect_gradients", 0) == (runs if any(each.needs_gradients for each in made.values()) else 0)
    trained = any(each.recover or each.compress for each in made.values())
    assert found.get("cache_teacher", 0) == (runs if trained else 0)
    sizes = {each.name: len(config["experts"]) if each.fewer else 1 for each in chosen}
    final = config["evaluate"]["stages"] == "final"
    evaluated = runs * sum(sizes[each.name] * (1 if final else max(1, len(methods.stages(each)))) for each in chosen)
    assert found["evaluate"] == found["profile_cost"] == evaluated


@pytest.mark.workflow
def test_ablations_take_over_what_the_paper_run_has_made(empty: Path) -> None:
    shared = "results=results/paper"
    paper, ablations = (commands(dry_run(name, empty, shared)) for name in ("paper", "ablations"))
    assert len(ablations) == documented()["ablations"]["total"] - 1  # all has no command
    same = Counter(re.findall(r"workflow_scripts/(\w+)\.py", "\n".join(paper & ablations)))
    tasks = len(read("ablations")["tasks"])
    once = {"prepare_data", "finetune", "permute", "collect_routing", "cache_teacher", "group", "merge", "recover"}
    assert {rule for rule, number in same.items() if number == tasks} == once | {"compress"}
    assert same["prepare"] == 1
    assert same["evaluate"] == same["profile_cost"] == 3 * tasks  # full, msmoe and mcsmoe
    said = re.search(r"which is (\d+) of its (\d+) jobs", PAGE.read_text())
    assert said is not None
    assert [int(said[1]), int(said[2])] == [sum(same.values()), documented()["ablations"]["total"]]


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_published_ones(name: str) -> None:
    config = read(name)
    assert config["model"]["checkpoint"] == published.MODELS[published.FINE_TUNED]
    assert config["experts"] == [published.EXPERTS[published.FINE_TUNED][0]]
    assert tuple(config["merge"]["exclude_layers"]) == published.LEFT_OUT[published.FINE_TUNED]
    assert config["data"]["source"] == "hub"
    assert config["calibration"]["samples"] == 256
    for task in config["tasks"]:
        choice = load_task(task).published
        for stage in ("finetune", "recover", "compress"):
            settings = configuration.stage_settings(config, stage, task)
            assert (settings["batch_size"], settings["learning_rate"]) == (choice.batch_size, choice.learning_rate)
            assert (settings["warmup_steps"], settings["weight_decay"], settings["schedule"]) == (16, 0.01, "linear")
            if stage != "finetune":
                assert (settings["distillation_weight"], settings["temperature"]) == (0.2, 2.0)
        compress = configuration.stage_settings(config, "compress", task)
        assert (compress["rank"], compress["keep"], compress["steps"]) == (32, 0.1, 10000)
        assert compress["initial_fraction"] * compress["steps"] == pytest.approx(400)
        assert compress["final_fraction"] * compress["steps"] == pytest.approx(1600)


def test_methods_and_tasks_are_those_of_the_tables() -> None:
    scores = published.scores()
    main = scores[(scores["setting"] == published.FINE_TUNED) & (scores["table"] == "2")]
    for name in ("paper", "paper_compat"):
        assert set(read(name)["variants"]) == set(main["method"])
        assert set(read(name)["tasks"]) == set(main["task"])
    printed = pd.read_csv(published.FOLDER / "scores.csv", dtype=str)
    printed = printed[printed["table"].isin(list("345678"))]
    ablations = read("ablations")
    assert set(ablations["variants"]) == set(printed["method"])
    assert set(ablations["tasks"]) == set(printed["task"])
    plain = {
        name: {key: value for key, value in changes.items() if key != "description"}
        for name, changes in ablations["methods"].items()
    }
    assert plain == published.ABLATIONS
    zero = scores[scores["setting"] == published.ZERO_SHOT]
    assert set(read("zero-shot")["tasks"]) == set(zero["task"])
    assert read("paper_compat")["evaluate"]["protocol"] == "paper_compat"
    assert read("zero-shot")["zero_shot"] is True
