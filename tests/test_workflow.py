"""The real workflow on tiny input: artefacts, caching, partial reruns, bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from faults.project import TINY, Project, tables

from mcsmoe.artefacts.tables import SCHEMAS, read_table

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def done(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of it to work on, as where a user moves a project that has run."""
    place = tmp_path_factory.mktemp("work flow") / "a clone"
    shutil.copytree(finished.place, place)
    return Project(place)


def test_artefacts_have_their_schemas_and_checkpoints_load(done: Project) -> None:
    run = done.results / "COPA" / "seed0"
    for name, path in tables(done).items():
        if not name.startswith("data/"):
            schema = next(s for s in SCHEMAS if path.stem == s or (path.parent.name == "examples" and s == "examples"))
            read_table(path, schema)
    routing = read_table(run / "routing.parquet", "routing")
    assert routing.groupby("layer")["frequency"].sum().tolist() == pytest.approx([1.0, 1.0])
    groups = read_table(run / "msmoe" / "2e" / "groups.parquet", "groups")
    assert groups.groupby(["layer", "group"])["weight"].sum().tolist() == pytest.approx([1.0] * 4)
    assert groups["dominant"].sum() == 4  # two experts on average in two layers
    summary = read_table(done.results / "summary.parquet", "summary")
    assert summary["variant"].tolist() == TINY["variants"]
    sizes = summary.set_index("variant")["parameters"]
    assert sizes["mcsmoe"] < sizes["msmoe"] == sizes["averaging"] < sizes["full"]
    assert summary["p_value"].isna().tolist() == [True, False, False, False, False]
    check = (
        "import transformers, sys\n"
        "for folder in sys.argv[1:]:\n"
        "    _, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "    transformers.AutoTokenizer.from_pretrained(folder)\n"
        "assert 'mcsmoe' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", check, run / "full", run / "permuted"], check=True)


def test_published_runs_are_in_the_store_once(done: Project) -> None:
    done.run("--force", "publish")
    check = (
        "import mlflow, json, sys\n"
        "mlflow.set_tracking_uri('sqlite:///' + sys.argv[1])\n"
        "experiments = [e for e in mlflow.search_experiments() if 'COPA' in e.name]\n"
        "runs = mlflow.search_runs([e.experiment_id for e in experiments], output_format='list')\n"
        "print(json.dumps([len(experiments), sorted(r.data.tags['variant'] for r in runs)]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", check, str(done.results / "mlflow.db")], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout.splitlines()[-1]) == [1, sorted(TINY["variants"])]


def test_a_second_run_does_nothing(done: Project) -> None:
    assert done.planned() == {}
    # Summary, report and publication say what was configured, word for word.
    done.configure(TINY | {"tasks": ["copa"]})
    assert set(done.planned()) <= {"summarise", "draw_report", "publish"}
    done.configure(TINY)
    assert "Nothing to be done" in done.run()


def test_a_changed_merge_option_reruns_grouping_and_what_follows(done: Project) -> None:
    done.configure(TINY | {"methods": {"msmoe": {"base": "msmoe", "similarity": "weight"}}})
    planned = done.planned()
    done.configure(TINY)
    assert planned["group"] == planned["merge"] == planned["recover"] == planned["compress"] == 1
    assert planned["evaluate"] == planned["profile_cost"] == 2
    assert not {"prepare", "finetune", "permute", "collect_routing", "cache_teacher"} & set(planned)


def test_changed_code_reruns_the_rules_that_use_it(done: Project) -> None:
    def planned_with(module: str) -> set[str]:
        path = done.place / "mcsmoe" / module
        text = path.read_text()
        path.write_text(text + "\n# changed\n")
        found = set(done.planned())
        path.write_text(text)
        return found

    at_the_end = {"summarise", "draw_report", "publish"}
    after_grouping = {"group", "merge", "recover", "compress", "evaluate", "profile_cost"} | at_the_end
    assert planned_with("grouping/dominant.py") == after_grouping
    assert planned_with("report/page.py") == {"draw_report"}
    assert planned_with("tracking/store.py") == {"publish"}
    assert done.planned() == {}


def test_bad_input_touches_nothing(done: Project) -> None:
    before = {name: path.stat().st_mtime_ns for name, path in tables(done).items()}
    bad = {
        "calibration.samples": TINY | {"calibration": {"samples": 0}},
        "experts": TINY | {"experts": [5]},
        "variants": TINY | {"variants": ["full", "mmsmoe"]},
        "nonsense": TINY | {"nonsense": 1},
    }
    for field, config in bad.items():
        done.configure(config)
        output = done.run(expect=1)
        assert field in output
        assert "Traceback" not in output
    done.configure(TINY)
    assert {name: path.stat().st_mtime_ns for name, path in tables(done).items()} == before
    assert done.planned() == {}
