"""Publishing to MLflow: one run per key however often, all of its content, and a store that can be moved."""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import fake_results
import pandas as pd
import pytest

from mcsmoe.report import plots
from mcsmoe.tracking import store as tracking
from mcsmoe.tracking.record import RunRecord


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a store in it, made once because a new database takes seconds."""
    folder = tmp_path_factory.mktemp("a place with space") / "results"
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patch.chdir(tmp_path_factory.mktemp("cwd"))
    tracking.publish(None, folder, [])
    patch.undo()
    return folder


@pytest.fixture(autouse=True)
def _embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def record(task: str, variant: str = "msmoe", experts: int = 4, **changes: Any) -> RunRecord:
    groups = fake_results.groups(experts, 1)
    made = RunRecord(
        *(task, variant, experts, 0),
        parameters={"method": {"merge": "frequency", "capacity": None}, "ratios": [4, 2]},
        tags={"verdict": "within noise"},
        metrics={"score": 0.93, "score_ci_low": 0.91, "score_ci_high": 0.95, "cost/bytes_on_disk": 8.06e6},
        curves={"recover": fake_results.training_curve(40, 1.5, 3, teacher=True)},
        tables={"groups": groups},
        figures={"groups": partial(plots.grouping, groups)},
    )
    return dataclasses.replace(made, **changes)


def runs_of(results: Path, task: str, uri: str | None = None) -> list[Any]:
    """Every run of the task's experiment, those marked deleted too."""
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(uri or tracking.embedded_uri(results))
    experiment = client.get_experiment_by_name(f"mcsmoe/{task}")
    return list(client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL))


def downloaded(results: Path, run_id: str, path: str, into: Path) -> Path:
    from mlflow import MlflowClient

    return Path(MlflowClient(tracking.embedded_uri(results)).download_artifacts(run_id, path, str(into)))


def test_publishing_twice_leaves_one_run_per_key(results: Path) -> None:
    made = [record("twice"), record("twice", experts=2), record("twice", "full", 8)]
    first = tracking.publish(None, results, made)
    second = tracking.publish(None, results, made)
    assert [one.action for one in first] == ["created"] * 3
    assert [one.action for one in second] == ["unchanged"] * 3
    assert [one.run_id for one in first] == [one.run_id for one in second]
    runs = runs_of(results, "twice")
    assert sorted(run.info.run_id for run in runs) == sorted(one.run_id for one in first)
    assert {run.info.run_name for run in runs} == {"msmoe 4e seed 0", "msmoe 2e seed 0", "full 8e seed 0"}
    assert all(run.info.status == "FINISHED" for run in runs)


def test_a_run_holds_parameters_tags_and_metrics(results: Path) -> None:
    (done,) = tracking.publish(None, results, [record("content")])
    (run,) = runs_of(results, "content")
    assert run.info.run_id == done.run_id
    wanted = {"method.merge": "frequency", "method.capacity": "None", "ratios": "[4, 2]", "experts": "4", "seed": "0"}
    assert wanted.items() <= run.data.params.items()
    assert {"verdict": "within noise", "variant": "msmoe", "task": "content"}.items() <= run.data.tags.items()
    assert run.data.metrics["score_ci_low"] == 0.91
    assert run.data.metrics["cost/bytes_on_disk"] == 8.06e6


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"score": 0.5}},
        {"curves": {"recover": fake_results.training_curve(41, 1.5, 3)}},
        {"tables": {"groups": fake_results.groups(4, 2)}},
        {"figures": {"groups": partial(plots.grouping, fake_results.groups(4, 2))}},
        {"parameters": {"method": {"merge": "uniform"}}},
    ],
    ids=["metric", "curve", "table", "figure", "parameter"],
)
def test_changed_content_replaces(results: Path, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    task = f"changed-{request.node.callspec.id}"
    (old,) = tracking.publish(None, results, [record(task)])
    (new,) = tracking.publish(None, results, [record(task, **changes)])
    assert new.action == "replaced"
    (run,) = runs_of(results, task)
    assert run.info.run_id == new.run_id != old.run_id
    folders = [path.name for path in (results / tracking.ARTIFACTS / task).iterdir()]
    assert folders == [new.run_id], "the replaced run's artefacts must go with it"


def test_a_run_left_by_a_killed_publication_is_replaced(results: Path) -> None:
    from mlflow import MlflowClient

    tracking.publish(None, results, [record("killed", "full", 8)])
    client = MlflowClient(tracking.embedded_uri(results))
    experiment = client.get_experiment_by_name("mcsmoe/killed").experiment_id
    tags = {"workflow.key": record("killed").key, "workflow.origin": "embedded"}
    orphan = client.create_run(experiment, tags=tags).info.run_id
    hidden = client.create_run(experiment, tags=tags).info.run_id
    client.delete_run(hidden)
    someone_elses = client.create_run(experiment, tags={"note": "by hand"}).info.run_id
    (done,) = tracking.publish(None, results, [record("killed")])
    left = {run.info.run_id for run in runs_of(results, "killed")}
    assert done.run_id in left
    assert not {orphan, hidden} & left
    assert someone_elses in left
    assert len(left) == 3


def test_curves_have_every_step(results: Path) -> None:
    from mlflow import MlflowClient

    curve = fake_results.training_curve(1203, 1.5, 7, teacher=True)  # more points than one call takes
    (done,) = tracking.publish(None, results, [record("curves", curves={"recover": curve})])
    client = MlflowClient(tracking.embedded_uri(results))
    for column in ("loss", "distillation_loss", "learning_rate", "seconds", "tokens"):
        history = sorted(client.get_metric_history(done.run_id, f"recover/{column}"), key=lambda point: point.step)
        assert [point.step for point in history] == curve["step"].tolist()
        assert [point.value for point in history] == pytest.approx(curve[column].tolist(), abs=0)
    assert client.get_metric_history(done.run_id, "recover/kept_fraction") == [], "nothing was pruned"
    run = client.get_run(done.run_id)
    assert (run.info.end_time - run.info.start_time) / 1000 == pytest.approx(1203 * 0.05, abs=0.01)


def test_artefacts_can_be_fetched_from_a_path_with_a_space(results: Path, tmp_path: Path) -> None:
    picture = tmp_path / "own.png"
    plots.usage(fake_results.routing(0)).savefig(picture)
    file = tmp_path / "notes.txt"
    file.write_text("kept")
    made = record("artefacts")
    made = dataclasses.replace(made, figures={**made.figures, "own": picture}, files=[file])
    (done,) = tracking.publish(None, results, [made])
    table = pd.read_csv(downloaded(results, done.run_id, "tables/groups.csv", tmp_path))
    pd.testing.assert_frame_equal(table, fake_results.groups(4, 1), check_dtype=False)
    assert downloaded(results, done.run_id, "figures/groups.png", tmp_path).read_bytes().startswith(b"\x89PNG")
    assert downloaded(results, done.run_id, "figures/own.png", tmp_path).read_bytes() == picture.read_bytes()
    assert downloaded(results, done.run_id, "notes.txt", tmp_path).read_text() == "kept"


def test_nothing_is_left_in_the_working_folder(results: Path, tmp_path: Path) -> None:
    tracking.publish(None, results, [record("litter")])
    assert list(tmp_path.iterdir()) == []


def test_a_moved_results_folder_finds_its_artefacts(results: Path, tmp_path: Path) -> None:
    (done,) = tracking.publish(None, results, [record("moved")])
    moved = tmp_path / "elsewhere" / "results"
    shutil.copytree(results, moved)
    (again,) = tracking.publish(None, moved, [record("moved")])
    assert (again.action, again.run_id) == ("unchanged", done.run_id)
    (run,) = runs_of(moved, "moved")
    assert run.info.artifact_uri.startswith(moved.as_uri())
    assert downloaded(moved, done.run_id, "tables/groups.csv", tmp_path).is_file()
    (new,) = tracking.publish(None, moved, [record("moved", metrics={"score": 0.1})])
    assert (moved / tracking.ARTIFACTS / "moved" / new.run_id).is_dir()
    assert (results / tracking.ARTIFACTS / "moved" / done.run_id).is_dir(), "the copy's origin is not touched"


def test_on_a_server_other_workflows_keep_their_runs(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "server.db"
    shutil.copy(results / tracking.DATABASE, server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{server}")
    (one,) = tracking.publish(None, tmp_path / "one", [record("shared")])
    (two,) = tracking.publish(None, tmp_path / "two", [record("shared")])
    (new,) = tracking.publish(None, tmp_path / "one", [record("shared", metrics={"score": 0.2})])
    assert [one.action, two.action, new.action] == ["created", "created", "replaced"]
    runs = runs_of(results, "shared", f"sqlite:///{server}")
    active = {run.info.run_id for run in runs if run.info.lifecycle_stage == "active"}
    assert active == {two.run_id, new.run_id}
    assert not (tmp_path / "one").exists(), "with a server nothing is embedded"


def test_bad_input_is_named(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'bad/msmoe/4e/seed0' is there twice"):
        tracking.publish(None, results, [record("bad"), record("bad")])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9 does not answer.*MLFLOW_TRACKING_URI"):
        tracking.publish("http://127.0.0.1:9", results, [record("bad")])


def test_ui_command_is_local_and_survives_the_shell(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(tracking.ui_command(results))
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--backend-store-uri") + 1] == f"sqlite:///{results}/mlflow.db"
    assert {"MLFLOW_DISABLE_TELEMETRY=true", "DO_NOT_TRACK=true"} <= set(words)
    assert Path(words[words.index("ui") - 1]).name == "mlflow"
    assert words[words.index("--port") + 1] in tracking.ui_address()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org/mlflow")
    assert "https://example.org/mlflow" in tracking.ui_command(results)


def test_telemetry_is_off(results: Path) -> None:
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()


def test_final_metrics_have_the_same_names_for_every_variant() -> None:
    summary = fake_results.summary(tasks=("sst2",))
    metrics, cost = fake_results.metrics(summary), fake_results.cost(summary)
    found = []
    for row in summary.to_dict("records"):
        mine = (metrics["variant"] == row["variant"]) & (metrics["experts"] == row["experts"])
        costs = cost[(cost["variant"] == row["variant"]) & (cost["experts"] == row["experts"])].iloc[0].to_dict()
        found.append(tracking.final_metrics(row, metrics[mine], costs))
    assert {frozenset(names) for names in found} == {frozenset(found[0])}
    assert found[1]["score"] == summary["value"].iloc[1]
    assert found[1]["metrics/f1"] == pytest.approx(summary["value"].iloc[1] - 0.01)
    assert found[1]["cost/bytes_on_disk"] == summary["bytes_on_disk"].iloc[1]
    assert math.isnan(found[0]["score_p_value"]), "the full model is compared with nothing"


def test_publishing_that_is_killed_while_the_store_is_made_is_simply_done_again(tmp_path: Path) -> None:
    """MLflow makes its tables one by one; a database with some of them opens no more."""
    script = (
        "import sys\n"
        "from sqlalchemy import event\n"
        "from sqlalchemy.engine import Engine\n"
        "from mcsmoe.tracking import store as tracking\n"
        "made = []\n"
        "@event.listens_for(Engine, 'before_cursor_execute')\n"
        "def stop(connection, cursor, statement, *rest):\n"
        "    if 'CREATE TABLE' in statement:\n"
        "        made.append(statement)\n"
        "    if len(made) == 12:\n"
        "        import os, signal\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "record = tracking.RunRecord('COPA', 'full', 8, 0, metrics={'score': 0.5})\n"
        "tracking.publish(None, sys.argv[1], [record])\n"
    )
    results = tmp_path / "results"
    killed = subprocess.run([sys.executable, "-c", script, str(results)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(results.glob(".mlflow.db.partial*"))
    assert not (results / "mlflow.db").exists()
    (left,) = results.glob(".mlflow.db.partial*")
    left.with_name(f"{left.name}-journal").touch()  # as it stands there for the length of a statement
    record = tracking.RunRecord("COPA", "full", 8, 0, metrics={"score": 0.5})
    (published,) = tracking.publish(None, results, [record])
    assert published.action == "created"
    assert not list(results.glob(".mlflow.db*"))
