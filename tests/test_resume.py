"""A training that is killed goes on where it was and ends the same, in the real workflow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults.project import Project, same_results

pytestmark = pytest.mark.workflow

RUN, CHECKPOINT = "COPA/seed0", "model.safetensors"


@pytest.mark.parametrize(
    ("rule", "stage", "made"),
    [
        # The first goes on to the end of the workflow, the others to the end of the stage that was killed.
        ("prepare", "base/seed0", None),
        ("finetune", f"{RUN}/full", f"{RUN}/full"),
        ("prune", f"{RUN}/task-specific-2e-pruned", f"{RUN}/task-specific/2e/pruned"),
        ("recover", f"{RUN}/msmoe-2e-recovered", f"{RUN}/msmoe/2e/recovered"),
        ("compress", f"{RUN}/mcsmoe-2e-compressed", f"{RUN}/mcsmoe/2e/compressed"),
    ],
)
def test_a_killed_training_resumes_and_ends_the_same(
    finished: Project, tmp_path: Path, rule: str, stage: str, made: str | None
) -> None:
    killed = Project(tmp_path / "killed run")
    # What came before is taken over, so that each test kills the stage it is about.
    for part in ("data", "base", "COPA"):
        shutil.copytree(finished.results / part, killed.results / part)
    shutil.copytree(finished.place / ".snakemake", killed.place / ".snakemake")
    targets = [] if made is None else [f"results/{made}"]
    before = made and (killed.results / made / CHECKPOINT).stat().st_mtime_ns
    state = killed.results / ".state" / stage
    killed.kill_when(lambda: any(state.glob("step-*.safetensors")), *targets, "--forcerun", rule)
    assert not list(killed.results.rglob("published.json"))
    killed.run(*targets)
    assert any("resuming after step" in path.read_text() for path in (killed.results / "logs" / rule).rglob("*.log"))
    assert not state.exists()
    if made is None:
        same_results(finished, killed)
    else:
        assert (killed.results / made / CHECKPOINT).stat().st_mtime_ns != before
        same_results(finished, killed, ended=False)
