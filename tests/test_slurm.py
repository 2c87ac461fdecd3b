"""The tiny workflow through a real one-node SLURM: failures, cancellation, a time limit, a restarted controller, and the rest.

Runs only where it is asked for (``MCSMOE_SLURM=1``) and SLURM is installed: it takes minutes, and starting daemons needs
root. ``tests/slurm/node.sh install`` installs SLURM from Debian's packages, ``pip install -e '.[slurm]'`` the plugin. With
``MCSMOE_SLURM=install`` the test installs SLURM itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.project import TINY, Project, differences, kill, tables

ROOT = Path(__file__).resolve().parents[1]
NODE = ROOT / "tests" / "slurm" / "node.sh"
ASKED = os.environ.get("MCSMOE_SLURM", "")
CONFIG = TINY | {"variants": ["full", "msmoe"]}

pytestmark = pytest.mark.workflow

# What happens to the first try of a job; the second finds the marker gone and runs as it should.
FAIL = "raise SystemExit('made to fail')"
HANG = "__import__('time').sleep(900)"
WAIT = "__import__('time').sleep(15)"
TROUBLE = {"permute": FAIL, "merge": HANG, "evaluate": HANG, "finetune": WAIT}
BROKEN = "profile_cost"  # fails until it is mended


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a running node; its daemons end with the tests."""
    if ASKED not in ("1", "install"):
        pytest.skip("takes minutes; set MCSMOE_SLURM=1 to run it")
    if os.geteuid() != 0:
        pytest.skip("starting slurmd needs root")
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("the plugin is not installed; pip install -e '.[slurm]'")
    if shutil.which("slurmd") is None:
        if ASKED != "install" or shutil.which("apt-get") is None:
            pytest.skip(f"slurmd is not installed; run {NODE} install")
        subprocess.run([NODE, "install"], check=True)
    folder = tmp_path_factory.mktemp("slurm")
    # Ended from outside, too, the tests end what they have started.
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 1))
    subprocess.run([NODE, "start", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run([NODE, "stop", folder], check=True)
        signal.signal(signal.SIGTERM, before)


class ClusterProject(Project):
    """A copy of the project, with troubles built into its scripts, whose jobs go to the node."""

    def __init__(self, place: Path, node: Path) -> None:
        super().__init__(place, CONFIG)
        self.node = node
        for stage, trouble in TROUBLE.items():
            self.insert(stage, f"trouble-{stage}", trouble)
            (place / f"trouble-{stage}").touch()
        self.insert(BROKEN, "", f"if __import__('pathlib').Path('broken').exists(): {FAIL}")
        (place / "broken").touch()

    def insert(self, stage: str, marker: str, action: str) -> None:
        path = self.place / "workflow_scripts" / f"{stage}.py"
        text = path.read_text()
        start = "from __future__ import annotations\n"
        assert start in text
        if marker:
            test = f"__import__('pathlib').Path({marker!r})"
            action = f"if {test}.exists():\n    {test}.unlink()\n    {action}"
        path.write_text(text.replace(start, f"{start}\n{action}\n", 1))

    def environment(self) -> dict[str, str]:
        plugins = importlib.util.find_spec("snakemake_executor_plugin_slurm")
        assert plugins is not None
        assert plugins.origin is not None
        return {
            **{key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"},
            "SLURM_CONF": str(self.node / "slurm.conf"),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(Path(plugins.origin).parents[1]), os.environ.get("PYTHONPATH")])
            ),
        }

    def start(self, *arguments: str, output: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        """With the profile as it is shipped, less memory and time, one retry, and faster looks at the queue."""
        rules = [path.stem for path in (self.place / "rules").glob("*.smk") if path.stem != "common"]
        small = [f"{rule}:mem_mb=900" for rule in rules] + ["evaluate:runtime=1 + 4 * (attempt - 1)"]
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm"),
                *("--set-resources", *small, "--retries", "1", "--latency-wait", "5"),
                *("--set-threads", "profile_cost=1", "--slurm-init-seconds-before-status-checks", "11", *arguments),
            ],
            cwd=self.place,
            env=self.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=True)
        return done.stdout

    def job_of(self, rule: str, process: subprocess.Popen[str], deadline: float) -> str:
        """Number of the running SLURM job of ``rule``, waited for."""
        while time.monotonic() < deadline and process.poll() is None:
            for line in self.slurm("squeue", "--noheader", "--states=running", "--format=%i %k").splitlines():
                number, _, comment = line.partition(" ")
                if f"rule_{rule}" in comment:
                    return number
            time.sleep(0.3)
        kill(process) if process.poll() is None else print(process.communicate()[0][-3000:])
        raise AssertionError(f"no job of {rule} was running in time:\n{self.slurm('squeue', '--states=all')}")

    def wait_for(self, stage: str, process: subprocess.Popen[str]) -> None:
        """Until the script of ``stage`` has come to its trouble."""
        while (self.place / f"trouble-{stage}").exists():
            assert process.poll() is None, "the workflow ended before"
            time.sleep(0.1)

    def seen(self) -> Counter[tuple[str, str]]:
        """Number of SLURM jobs by rule and state."""
        found: Counter[tuple[str, str]] = Counter()
        for line in self.slurm("squeue", "--noheader", "--states=all", "--format=%T %k").splitlines():
            state, _, comment = line.partition(" ")
            rule = re.search(r"rule_(\w+?)(_wildcards|$)", comment)
            found[(rule[1] if rule else comment, state)] += 1
        return found


@pytest.fixture(scope="module")
def first(node: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClusterProject, str, Counter[tuple[str, str]]]:
    """The project after a first run that met every trouble, what it said, and the SLURM jobs there were."""
    project = ClusterProject(tmp_path_factory.mktemp("on slurm") / "a clone", node)
    process = project.start()
    try:
        deadline = time.monotonic() + 400
        # The controller is restarted while a training runs, which goes on.
        training = project.job_of("finetune", process, deadline)
        project.wait_for("finetune", process)
        subprocess.run([NODE, "stop-controller", node], check=True)
        subprocess.run([NODE, "start-controller", node], check=True)
        assert training in project.slurm("squeue", "--noheader", "--states=all", "--format=%i").split()
        # Somebody else cancels a job.
        merging = project.job_of("merge", process, deadline)
        project.wait_for("merge", process)
        project.slurm("scancel", merging)
        output, _ = process.communicate(timeout=500)
    finally:
        kill(process)
    assert process.returncode == 1, output[-6000:]
    return project, output, project.seen()


def finished(seen: Counter[tuple[str, str]], rule: str) -> dict[str, int]:
    return {state: count for (name, state), count in seen.items() if name == rule}


def test_every_job_is_a_slurm_job_that_ends_once(first: Any) -> None:
    _, _, seen = first
    for rule in ("generate_data", "prepare_data", "prepare", "collect_routing", "cache_teacher", "group", "recover"):
        assert finished(seen, rule) == {"COMPLETED": 1}, rule


def test_a_failing_job_is_sent_again(first: Any) -> None:
    project, output, seen = first
    assert finished(seen, "permute") == {"FAILED": 1, "COMPLETED": 1}
    assert not (project.place / "trouble-permute").exists()
    assert "permute" in output


def test_a_job_cancelled_from_outside_is_sent_again(first: Any) -> None:
    _, _, seen = first
    assert finished(seen, "merge") == {"CANCELLED": 1, "COMPLETED": 1}


def test_a_job_over_its_time_is_ended_and_sent_again(first: Any) -> None:
    _, _, seen = first
    assert finished(seen, "evaluate") == {"TIMEOUT": 1, "COMPLETED": 2}


def test_jobs_outlive_the_controller(first: Any) -> None:
    _, _, seen = first
    assert finished(seen, "finetune") == {"COMPLETED": 1}


def test_what_fails_for_good_stops_only_what_needs_it(first: Any) -> None:
    project, output, seen = first
    assert finished(seen, BROKEN) == {"FAILED": 4}  # two checkpoints, tried twice
    assert "Traceback" not in output
    assert finished(seen, "summarise") == {}
    assert not (project.results / "summary.parquet").exists()


def test_the_second_run_does_what_is_missing_and_agrees_with_a_run_without_slurm(first: Any, tmp_path: Path) -> None:
    project, _, before = first
    made = {name: path.stat().st_mtime_ns for name, path in tables(project).items()}
    (project.place / "broken").unlink()
    output = project.run()
    assert "made to fail" not in output
    new = project.seen() - before
    once = {(rule, "COMPLETED"): 1 for rule in ("summarise", "draw_report", "publish")}
    assert new == Counter({(BROKEN, "COMPLETED"): 2, **once})
    assert all(path.stat().st_mtime_ns == made[name] for name, path in tables(project).items() if name in made)
    assert "Nothing to be done" in project.run("--dry-run")
    local = Project(tmp_path / "local", CONFIG)
    shutil.copytree(project.place / "workflow_scripts", local.place / "workflow_scripts", dirs_exist_ok=True)
    local.run()
    assert differences(local.results, project.results) == []


def test_the_profile_names_rules_that_exist() -> None:
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    texts = [path.read_text() for path in (ROOT / "rules").glob("*.smk")]
    rules = {name for text in texts for name in re.findall(r"^(?:use rule \w+ as|rule) (\w+)", text, re.MULTILINE)}
    assert set(profile["set-resources"]) <= rules
