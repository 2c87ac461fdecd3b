"""Bad configurations: each refused with one message that names the field, the value and the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcsmoe import methods
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow import options
from mcsmoe.workflow.schema import schema, section

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(DEFAULT))
    node = made
    *parents, last = path.split("/")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return made


def test_the_default_is_complete_and_its_own_fixed_point() -> None:
    once = configuration.complete(DEFAULT)
    assert once["recover"]["temperature"] == 2.0
    assert configuration.complete(once) == once


def test_every_key_has_a_description_and_optional_ones_a_default() -> None:
    def walk(part: dict[str, Any], path: str) -> None:
        for key, inner in part.get("properties", {}).items():
            if "properties" in inner:
                walk(inner, f"{path}{key}.")
            else:
                assert inner.get("description"), f"{path}{key} has no description"
                assert "default" in inner or key == "tasks" or path == "per_task.", f"{path}{key} has no default"

    walk(schema(), "")


BAD = [
    ("finetune/lerning_rate", 1.0, ["finetune.lerning_rate", "learning_rate"]),
    ("finetun", {}, ["finetun", "finetune"]),
    ("finetune/steps", "many", ["finetune.steps", '"many"', "integer"]),
    ("finetune/learning_rate", "1e-4", ["finetune.learning_rate", "1.0e-4"]),
    ("experts", [4, 9], ["experts", "9", "8 experts"]),
    ("calibration/samples", 0, ["calibration.samples", "0", "at least 1"]),
    ("tasks", ["SST-3"], ["SST-3", "SST-2"]),
    ("tasks", [], ["tasks", "empty"]),
    ("variants", ["msmo"], ["variants", "msmo", "msmoe"]),
    (
        "methods",
        {"mine": {"base": "msmoe", "similarity": "router-logit"}},
        ["methods.mine.similarity", "router-logits"],
    ),
    ("methods", {"mine": {"base": "nothing"}}, ["methods.mine.base", "nothing"]),
    ("compress/keep", 0, ["compress.keep", "0", "above 0"]),
    ("compress/keep", 1.5, ["compress.keep", "1.5", "at most 1"]),
    ("compress/initial_fraction", 0.9, ["compress.initial_fraction", "0.9", "steps"]),
    ("data/selection_rows", 10**6, ["data.selection_rows", "1000000", "fewer"]),
    ("model/checkpoint", "/nowhere/at/all", ["model.checkpoint", "/nowhere/at/all"]),
    ("per_task", {"COPA": {"finetune": {"epoch": 1}}}, ["per_task.COPA.finetune", "epoch"]),
    ("per_task", {"MRPC": {}}, ["per_task.MRPC", "tasks"]),
    ("per_task", {"COPA": {"data": {"folder": "x"}}}, ["per_task.COPA.data", "folder"]),
    ("per_task", {"COPA": {"data": {"train_rows": 9, "selection_rows": 9}}}, ["data.selection_rows is 9", "9"]),
    ("zero_shot", True, ["variants names 'mcsmoe'", "zero_shot: false"]),
    ("seeds", [0, 0], ["seeds", "twice"]),
]


@pytest.mark.parametrize(("path", "value", "words"), BAD, ids=[f"{path}={value}" for path, value, _ in BAD])
def test_a_bad_value_is_named_with_its_remedy(path: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        configuration.complete(changed(path, value))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_experts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    with pytest.raises(ValueError, match=r"model\.checkpoint.*t5.*without experts"):
        configuration.complete(changed("model/checkpoint", str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"without config\.json"):
        configuration.complete(changed("model/checkpoint", str(tmp_path)))


def test_data_files_are_checked_before_any_work(tmp_path: Path) -> None:
    import pandas as pd

    files = changed("data/source", "files") | {"tasks": ["SST-2"]}
    files["data"]["folder"] = str(tmp_path)
    with pytest.raises(ValueError, match="SST-2"):
        configuration.complete(files)
    folder = tmp_path / "SST-2"
    folder.mkdir()
    rows = pd.DataFrame({"sentence": ["good"], "label": [1], "idx": [0]})
    rows.to_parquet(folder / "validation.parquet")
    with pytest.raises(ValueError, match="train"):
        configuration.complete(files)
    rows.drop(columns="label").to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match="label"):
        configuration.complete(files)
    (folder / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"train\.parquet"):
        configuration.complete(files)


def test_names_of_methods_are_those_of_the_registries() -> None:
    from mcsmoe import grouping, merge, similarity

    assert set(methods.SIMILARITIES) == set(similarity.BASES)
    assert set(methods.MERGES) == set(merge.METHODS)
    assert set(methods.GROUPINGS) == set(grouping.METHODS)


def test_settings_survive_the_way_over_a_command_line() -> None:
    import argparse
    import shlex

    for name in ("finetune", "recover", "compress", "pretrain", "calibration", "merge", "evaluate", "cost"):
        settings = configuration.complete(DEFAULT)[name] | ({"files": ["a b.txt", "c"]} if name == "pretrain" else {})
        parser = argparse.ArgumentParser()
        options.add_section(parser, name)
        back = options.settings(parser.parse_args(shlex.split(options.as_flags(settings))), name)
        assert back == {key: settings[key] for key in section(name)}
