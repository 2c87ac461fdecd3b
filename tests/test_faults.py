"""Nothing finished is lost and nothing half-done is believed: kills, full disks, damage, missing permissions.

The short ones always run. MCSMOE_FAULTS=1 adds those that run the workflow; docs/faults.md has the tables of the long runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_results
import pyarrow.parquet as pq
import pytest
import torch
from faults import damage, disk, kill
from faults.project import ROOT, Project, half_made, leftovers
from faults.specimens import SPECIMENS, content
from safetensors.torch import load_file

from mcsmoe.artefacts.atomic import atomic_directory, atomic_file
from mcsmoe.artefacts.digests import SEAL, SUMS, check_seal
from mcsmoe.artefacts.tables import read_table, write_table
from mcsmoe.artefacts.tensors import read_sealed, write_sealed
from mcsmoe.tracking import store as tracking
from mcsmoe.workflow.run import hold_lock

long = pytest.mark.skipif(not os.environ.get("MCSMOE_FAULTS"), reason="runs the workflow often; set MCSMOE_FAULTS=1")


# -- damage ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(damage.CHECKED))
def test_damage_is_noticed_by_name(kind: str, tmp_path: Path) -> None:
    found = list(damage.outcomes(kind, tmp_path, flips=2))
    assert [one for one in found if one.outcome not in damage.GOOD] == []
    assert sum(one.outcome == "noticed" for one in found) > len(found) / 2


def test_a_bit_anywhere_in_a_table_counts(tmp_path: Path) -> None:
    path = tmp_path / "routing.parquet"
    write_table(path, fake_results.routing(0), "routing")
    whole, rows = path.read_bytes(), read_table(path, "routing")
    believed = []
    for place in range(0, len(whole), 5):
        hurt = bytearray(whole)
        hurt[place] ^= 1 << place % 8
        path.write_bytes(hurt)
        message, found = "", None
        try:
            found = read_table(path, "routing")
        except ValueError as error:
            message = str(error)
        if found is None:
            assert str(path) in message
        else:
            assert found.equals(rows), place
            believed.append(place)
    name = whole.rindex(SEAL.encode())
    assert set(believed) <= set(range(name, name + len(SEAL))), "only the entry's own name may be hit in vain"


def test_other_readers_see_plain_files(tmp_path: Path) -> None:
    frame = fake_results.groups(3, 0)
    write_table(tmp_path / "groups.parquet", frame, "groups")
    assert pq.read_table(tmp_path / "groups.parquet", page_checksum_verification=True).num_rows == len(frame)
    write_sealed(tmp_path / "one.safetensors", {"a": torch.arange(5)}, {"note": "kept"})
    assert load_file(tmp_path / "one.safetensors")["a"].tolist() == [0, 1, 2, 3, 4]
    assert read_sealed(tmp_path / "one.safetensors")[1]["note"] == "kept"
    SPECIMENS["stock checkpoint"].write(tmp_path / "full", 0)
    done = subprocess.run(
        ["sha256sum", "--check", SUMS], cwd=tmp_path / "full", capture_output=True, text=True, check=True
    )
    assert "model.safetensors: OK" in done.stdout


def test_files_without_a_digest_are_read_as_before(tmp_path: Path) -> None:
    frame = fake_results.groups(3, 0)
    write_table(tmp_path / "ours.parquet", frame, "groups")
    pq.write_table(pq.read_table(tmp_path / "ours.parquet"), tmp_path / "theirs.parquet")
    check_seal(tmp_path / "theirs.parquet")
    assert read_table(tmp_path / "theirs.parquet", "groups").equals(read_table(tmp_path / "ours.parquet", "groups"))


# -- what is tracked ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder.parent)
        done = tracking.publish(None, folder, [tracking.RunRecord("COPA", "full", 8, 0, metrics={"score": 0.5})])
    (folder / tracking.MARKER).write_text(json.dumps({"runs": [vars(one) for one in done]}))
    return folder


def test_damage_to_what_was_published_is_noticed_by_name(tracked: Path, tmp_path: Path) -> None:
    tracking.check_published(tracked)
    names = ("mlflow.db", "published.json")
    whole = {name: (tracked / name).read_bytes() for name in names}

    def refused(name: str, content: bytes | None) -> str:
        for each in names:
            (tmp_path / each).write_bytes(whole[each])
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="run") as caught:
            tracking.check_published(tmp_path)
        return str(caught.value)

    marker = whole["published.json"]
    assert "published.json: is missing" in refused("published.json", None)
    assert "published.json: not a list" in refused("published.json", marker[:-9])
    run = json.loads(marker)["runs"][0]["run_id"]
    other = run.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    assert "published.json: run 'COPA/full/8e/seed0'" in refused(
        "published.json", marker.replace(run.encode(), other.encode())
    )
    assert "mlflow.db: is missing" in refused("mlflow.db", None)
    assert "mlflow.db: damaged" in refused("mlflow.db", whole["mlflow.db"][:-5000])
    assert "mlflow.db: damaged" in refused("mlflow.db", b"nonsense" + whole["mlflow.db"][8:])
    with contextlib.closing(sqlite3.connect(tracked / "mlflow.db")) as untouched:
        assert untouched.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# -- full disks --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        with disk.small_disk(8) as place:
            yield place
    except disk.NotPermitted as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", list(SPECIMENS))
def test_a_full_disk_costs_nothing_that_was_there(kind: str, small: Path) -> None:
    found = disk.one_save(kind, SPECIMENS[kind], small, 0.5)
    assert found.outcome in disk.GOOD, found


def test_a_full_disk_stops_publishing_with_one_message(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(small)
    disk.free(small)
    folder = small / "results"

    def record(score: float) -> tracking.RunRecord:
        return tracking.RunRecord(
            "COPA", "full", 8, 0, metrics={"score": score}, tables={"groups": fake_results.groups(3, 0)}
        )

    (first,) = tracking.publish(None, folder, [record(0.5)])
    disk.fill(small, 0)
    with pytest.raises(ValueError, match=r"mlflow\.db: cannot be written \(No space left.*free some space"):
        tracking.publish(None, folder, [record(0.75)])
    disk.free(small)
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        kept = store.execute("SELECT status FROM runs WHERE run_uuid = ?", (first.run_id,)).fetchone()
    assert kept == ("FINISHED",)
    (second,) = tracking.publish(None, folder, [record(0.75)])
    assert second.action == "replaced"


# -- permissions -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def unchangeable(folder: Path) -> Iterator[None]:
    """A folder that this user may not write into; root may unless it is marked immutable."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode
    ):
        pytest.skip("root may write everywhere, and chattr +i is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


@pytest.mark.parametrize("kind", ["table", "stock checkpoint", "routing statistics", "training state", "report"])
def test_a_folder_that_cannot_be_written_is_told_in_one_message(kind: str, tmp_path: Path) -> None:
    specimen = SPECIMENS[kind]
    path = tmp_path / "results" / specimen.name
    specimen.write(path, 0)
    before = content(specimen, tmp_path / "results")
    with unchangeable(path.parent), pytest.raises(ValueError, match="allow this user to write there") as caught:
        specimen.write(path, 1)
    assert str(path) in str(caught.value)
    assert content(specimen, tmp_path / "results") == before


def test_a_stage_without_permission_says_so_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stage = [
        sys.executable,
        str(ROOT / "workflow_scripts" / "generate_data.py"),
        "--task",
        "COPA",
        "--train-rows",
        "100",
    ]
    stage += ["--train", str(out / "train.parquet"), "--validation", str(out / "validation.parquet")]
    with unchangeable(out):
        for more, named in (([], "train.parquet"), (["--log", str(out / "logs" / "one.log")], "one.log")):
            done = subprocess.run([*stage, *more], capture_output=True, text=True, cwd=ROOT, check=False)
            assert done.returncode == 1
            (line,) = [line for line in done.stderr.splitlines() if "error" in line]
            assert f"{out / 'train.parquet' if not more else out / 'logs'}" in line
            assert named in line
            assert "allow this user to write there" in line
            assert "Traceback" not in done.stderr


def test_a_results_folder_that_cannot_be_written_stops_the_workflow_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with unchangeable(tmp_path / "results"), pytest.raises(ValueError, match=r"results is .* cannot be written"):
        hold_lock(tmp_path / "results")
    hold_lock(tmp_path / "results")


# -- kills -------------------------------------------------------------------------------------------------------
SAVE = """
import sys, time
from pathlib import Path
from mcsmoe.artefacts.atomic import atomic_directory, atomic_file
with atomic_directory(sys.argv[1]) as folder, atomic_file(sys.argv[2]) as file:
    (folder / "new").write_text("half")
    file.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_save_that_is_killed_leaves_what_was_there_and_its_litter_goes_with_the_next(tmp_path: Path) -> None:
    folder, file = tmp_path / "made", tmp_path / "one[1].txt"
    with atomic_directory(folder) as partial:
        (partial / "old").write_text("whole")
    with atomic_file(file) as partial:
        partial.write_text("whole")
    process = subprocess.Popen([sys.executable, "-c", SAVE, folder, file], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with atomic_file(file) as partial:  # the other process is alive: what it writes is left alone
        partial.write_text("another")
    assert len(leftovers(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (folder / "old").read_text() == "whole"
    assert file.read_text() == "another"
    assert len(leftovers(tmp_path)) == 2
    with atomic_directory(folder) as partial, atomic_file(file) as other:
        (partial / "new").write_text("whole")
        other.write_text("whole")
    assert leftovers(tmp_path) == []
    assert sorted(path.name for path in folder.iterdir()) == [SUMS, "new"]


def test_a_failing_save_leaves_no_trace(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "made") as partial:
        (partial / "old").write_text("whole")
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "made") as partial:
        (partial / "new").write_text(str(1 / 0))
    assert (tmp_path / "made" / "old").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


# -- the harness, on demand --------------------------------------------------------------------------------------
def test_the_harness_notices_what_it_looks_for(tmp_path: Path) -> None:
    SPECIMENS["table"].write(tmp_path / "groups.parquet", 0)
    SPECIMENS["compact checkpoint"].write(tmp_path / "merged", 0)
    assert half_made(tmp_path) == []
    (tmp_path / "groups.parquet").write_bytes((tmp_path / "groups.parquet").read_bytes()[:-9])
    (tmp_path / "merged" / "config.json").unlink()
    assert [message.partition(": ")[0] for message in half_made(tmp_path)] == [
        str(tmp_path / "groups.parquet"),
        str(tmp_path / "merged"),
    ]
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True, text=True)
    time.sleep(0.05)
    assert kill._alive_in_session(process.pid, grace=0) == 1
    kill.kill(process)
    assert kill._alive_in_session(process.pid) == 0


@long
@pytest.mark.workflow
def test_kills_at_random_moments_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kill", "--kills", "8", "--seed", "1", "--work", str(tmp_path / "kills")])
    with pytest.raises(SystemExit) as ended:
        kill.main()
    assert ended.value.code == 0


@long
@pytest.mark.workflow
@pytest.mark.parametrize("left", [50_000, 1_500_000])
def test_the_workflow_goes_on_after_a_full_disk(left: int, tmp_path: Path) -> None:
    reference = Project(tmp_path / "reference")
    reference.run()
    try:
        found = disk.workflow(tmp_path, reference, left)
    except disk.NotPermitted as error:
        pytest.skip(str(error))
    assert found.outcome in disk.GOOD, found
