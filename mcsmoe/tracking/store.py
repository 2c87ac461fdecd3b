"""The one place that knows MLflow: what a workflow measured, published so that publishing again replaces.

One experiment per task, one flat run per variant, number of experts and seed. A run is found again by its key, not by
its id, and carries a digest of everything logged; an unchanged run is left alone, a changed one is logged anew and
only then is the old one deleted, so that a publication killed half-way loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlparse

from mcsmoe.artefacts.atomic import atomic_file, explained, unwritable
from mcsmoe.console import progress
from mcsmoe.tracking.address import DATABASE, EMBEDDED, embedded_uri, store_of, without_credentials
from mcsmoe.tracking.record import RunRecord, content_digest, final_metrics, flatten, points, write_artefacts

__all__ = [
    "Publication",
    "RunRecord",
    "check_published",
    "embedded_uri",
    "final_metrics",
    "publish",
    "store_of",
    "ui_address",
    "ui_command",
]

log = logging.getLogger(__name__)

ARTIFACTS, MARKER = "mlartifacts", "published.json"
_KEY, _ORIGIN, _DIGEST = "workflow.key", "workflow.origin", "workflow.digest"
_METRICS_PER_CALL, _VALUES_PER_CALL = 900, 100  # MLflow's REST interface takes 1,000 in all, and 100 parameters

# Read when mlflow is imported. Nothing leaves the machine; a dead server is reported in seconds, not minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


@dataclass(frozen=True)
class Publication:
    """What became of one record: ``created``, ``replaced`` or ``unchanged``."""

    key: str
    run_id: str
    action: str


# -- how to look at it -------------------------------------------------------------------------------------------
def ui_command(results: str | Path, store_uri: str | None = None, port: int = 5000) -> str:
    """The shell command that opens the MLflow UI on this machine only; for a server, where to find it."""
    uri = store_of(results, store_uri)
    if urlparse(uri).scheme in ("http", "https"):
        return f"open {shlex.quote(without_credentials(uri))} in a browser"
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") in (None, str(beside)) and not beside.exists() else str(beside)
    # Job runners of the server serve its hosted-model features only and cost memory and start-up time.
    settings = ["MLFLOW_DISABLE_TELEMETRY=true", "DO_NOT_TRACK=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"]
    root = (Path(results).resolve() / ARTIFACTS).as_uri()
    words = [program, "ui", "--backend-store-uri", uri, "--default-artifact-root", root]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return shlex.join(["env", *settings, *words])


def ui_address(port: int = 5000) -> str:
    """Where the UI that ``ui_command`` starts shows the experiments, as model training and not as chat traces."""
    return f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"


def _mlflow() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_DISABLE_TELEMETRY"], os.environ["DO_NOT_TRACK"] = "true", "true"
    logging.getLogger("alembic").setLevel(logging.WARNING)  # tells of every migration of a new database
    import mlflow

    return mlflow


def _local_path(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path)) if uri.startswith("file:") else Path(uri)


class _Store:
    """A client of one store, and what differs between the embedded one and a server."""

    def __init__(self, uri: str, results: Path) -> None:
        self.mlflow = _mlflow()
        self.results, self.embedded = results, uri == embedded_uri(results)
        self.root = results / ARTIFACTS
        self.pictures: dict[str, bytes] = {}
        self.origin = EMBEDDED if self.embedded else hashlib.sha256(str(results).encode()).hexdigest()[:16]
        try:
            if self.embedded and not (results / DATABASE).exists():
                self._found(results / DATABASE)
            self.client = self.mlflow.MlflowClient(tracking_uri=uri)
            self.client.search_experiments(max_results=1)
        except Exception as error:
            if (told := unwritable(results / DATABASE, error)) is not None:
                raise told from error
            remedy = (
                f"move {results / DATABASE} away and publish again"
                if self.embedded
                else "start the server, or unset MLFLOW_TRACKING_URI to use the embedded store"
            )
            name, why = without_credentials(uri), str(error).replace(uri, without_credentials(uri)).splitlines()
            raise ValueError(f"the MLflow store {name} does not answer ({' '.join(why[:1])}); {remedy}") from error
        if self.embedded:
            _relocate(results / DATABASE, self.root)

    def _found(self, database: Path) -> None:
        """Make an empty store that appears only once whole: MLflow's own, half-made by a killed process, opens no more."""
        with atomic_file(database) as partial:
            client = self.mlflow.MlflowClient(tracking_uri=f"sqlite:///{partial}")
            client.search_experiments(max_results=1)
            engine = getattr(client._tracking_client.store, "engine", None)
            if engine is not None:
                engine.dispose()

    def experiment(self, task: str) -> str:
        """Id of the task's experiment, made or restored if need be."""
        name = f"mcsmoe/{task}"
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        location = (self.root / quote(task, safe="")).as_uri() if self.embedded else None
        # The kind makes the UI open on runs and charts, not on the traces of a chat application.
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": f"Merged and compressed experts of {task}: one run per variant, experts and seed.",
        }
        return str(self.client.create_experiment(name, artifact_location=location, tags=tags))

    def runs(self, experiment: str) -> dict[str, list[Any]]:
        """This workflow's runs of an experiment by key; in the embedded store those marked deleted, too."""
        from mlflow.entities import ViewType

        view = ViewType.ALL if self.embedded else ViewType.ACTIVE_ONLY
        found: dict[str, list[Any]] = {}
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [experiment], f"tags.`{_ORIGIN}` = '{self.origin}'", view, max_results=1000, page_token=token
            )
            for run in page:
                found.setdefault(run.data.tags.get(_KEY, ""), []).append(run)
            token = page.token
            if not token:
                return found

    def remove(self, run: Any) -> None:
        """Delete a run; from the embedded store for good, with its artefacts."""
        if run.info.lifecycle_stage != "deleted":
            self.client.delete_run(run.info.run_id)
        if not self.embedded:
            return
        folder = _local_path(run.info.artifact_uri).parent
        if folder.name == run.info.run_id and self.root in folder.parents:
            shutil.rmtree(folder, ignore_errors=True)
        # What `mlflow gc` calls; without it the run stays in the database, hidden, and the file grows.
        purge = getattr(self.client._tracking_client.store, "_hard_delete_run", None)
        if purge is not None:
            purge(run.info.run_id)


def _relocate(database: Path, root: Path) -> None:
    """Let a store whose folder was moved or copied find its artefacts: MLflow keeps absolute locations only."""
    connection = sqlite3.connect(database, timeout=30)
    try:
        rows = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for experiment, name, location in rows:
            folder = quote(name.removeprefix("mcsmoe/"), safe="")
            wanted = (root / folder).as_uri()
            ours = _local_path(location or "").parent.name == ARTIFACTS or name == "Default"
            if location == wanted or not ours:
                continue
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (wanted, experiment)
            )
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (wanted, len(location) + 1, experiment, len(location) + 1, f"{location}/"),
            )
        connection.commit()
    finally:
        connection.close()


def check_published(results: str | Path) -> None:
    """Check that what ``published.json`` of a results folder names stands whole in the store beside it.

    Raises:
        ValueError: nothing was published, or the list or the store is missing or damaged; names the file and the remedy.
    """
    marker, database = Path(results) / MARKER, Path(results) / DATABASE
    again = "delete it and run the workflow again, which publishes anew"
    try:
        listed = {run["run_id"]: run["key"] for run in json.loads(marker.read_text())["runs"]}
    except FileNotFoundError as error:
        raise ValueError(f"{marker}: is missing, so nothing has been published; run the workflow") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{marker}: not a list of published runs ({error}); {again}") from error
    if not database.is_file():
        raise ValueError(f"{database}: is missing, which {marker} was published to; delete {marker} and run again")
    try:
        with contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            query = "SELECT run_uuid, value FROM tags WHERE key = ?"
            kept = dict(connection.execute(query, (_KEY,)).fetchall()) if state == "ok" else {}
    except sqlite3.Error as error:
        state, kept = str(error), {}
    if state != "ok":
        raise ValueError(f"{database}: damaged ({state}); move it away, delete {marker} and run again")
    lost = sorted(key for run, key in listed.items() if kept.get(run) != key)
    if lost:
        raise ValueError(f"{marker}: run {lost[0]!r} is not in {database} as it says; {again}")


# -- publishing --------------------------------------------------------------------------------------------------
def publish(store_uri: str | None, results: str | Path, records: Iterable[RunRecord]) -> list[Publication]:
    """Publish ``records``; runs published before from the same results folder are replaced, never doubled.

    Args:
        store_uri: an MLflow tracking URI; None takes ``MLFLOW_TRACKING_URI``, and without it the embedded store.
        results: the results folder; the embedded store is ``mlflow.db`` in it, its artefacts ``mlartifacts/`` beside.
        records: at most one per task, variant, number of experts and seed.

    Raises:
        ValueError: two records of one key, or a store that does not answer; names it and the remedy.
    """
    made = list(records)
    keys = [record.key for record in made]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"records: {twice[0]!r} is there twice; publish each variant, experts and seed once")
    folder = Path(results).resolve()
    with explained(folder / DATABASE):
        return _publish(_Store(store_of(folder, store_uri), folder), made)


def _publish(store: _Store, made: list[RunRecord]) -> list[Publication]:
    experiments = {task: store.experiment(task) for task in dict.fromkeys(record.task for record in made)}
    known = {task: store.runs(experiment) for task, experiment in experiments.items()}
    published = []
    for record in progress(made, "publish", total=len(made)):
        published.append(_publish_one(store, experiments[record.task], record, known[record.task].get(record.key, [])))
    return published


def _publish_one(store: _Store, experiment: str, record: RunRecord, old: list[Any]) -> Publication:
    digest = content_digest(record)

    def is_whole(run: Any) -> bool:
        info = run.info
        finished = info.status == "FINISHED" and info.lifecycle_stage == "active"
        return finished and run.data.tags.get(_DIGEST) == digest

    same = next((run for run in old if is_whole(run)), None)
    run_id = same.info.run_id if same is not None else _log_run(store, experiment, record, digest)
    action = "unchanged" if same is not None else ("replaced" if old else "created")
    for run in old:
        if run is not same:
            store.remove(run)
    log.debug("%s: %s", record.key, action)
    return Publication(record.key, run_id, action)


def _log_run(store: _Store, experiment: str, record: RunRecord, digest: str) -> str:
    from mlflow.entities import Metric, Param

    client = store.client
    now = int(time.time() * 1000)
    trained = sum(float(curve["seconds"].sum()) for curve in record.curves.values() if "seconds" in curve)
    start = now - int(trained * 1000)  # so that the UI's duration and time axis are those of the training
    tags = flatten(record.tags) | {"task": record.task, "variant": record.variant}
    tags |= {"experts": str(record.experts), "seed": str(record.seed)}
    # The digest tells what a finished run holds; one that was killed before its end never counts as finished.
    tags |= {_KEY: record.key, _ORIGIN: store.origin, _DIGEST: digest, "workflow.results": str(store.results)}
    tags |= {"mlflow.source.name": "mcsmoe", "mlflow.source.type": "PROJECT"}
    run_id = str(client.create_run(experiment, start_time=start, tags=tags, run_name=record.name).info.run_id)

    names = {"task": record.task, "variant": record.variant, "experts": record.experts, "seed": record.seed}
    parameters = [Param(name, text) for name, text in flatten({**names, **record.parameters}).items()]
    metrics = [Metric(name, value, now, 0) for name, value in record.metrics.items() if not math.isnan(value)]
    for stage, curve in record.curves.items():
        metrics += [Metric(*point) for point in points(stage, curve, start)]
        start += int(float(curve["seconds"].sum()) * 1000) if "seconds" in curve else 0
    # A call is a transaction of the store, so both go together as far as they do.
    while parameters or metrics:
        client.log_batch(run_id, metrics=metrics[:_METRICS_PER_CALL], params=parameters[:_VALUES_PER_CALL])
        metrics, parameters = metrics[_METRICS_PER_CALL:], parameters[_VALUES_PER_CALL:]
    with tempfile.TemporaryDirectory(prefix="mcsmoe-publish-") as scratch:
        write_artefacts(record, Path(scratch), store.pictures)
        if any(Path(scratch).iterdir()):
            client.log_artifacts(run_id, scratch)
    client.set_terminated(run_id, end_time=now)
    return run_id
