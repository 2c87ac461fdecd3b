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
from mcsmoe.workflow.compared_methods import resolve
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
    ("per_task", {"SST-2": {"finetune": {"epoch": 1}}}, ["per_task.SST-2.finetune", "epoch"]),
    ("per_task", {"MRPC": {}}, ["per_task.MRPC", "tasks"]),
    ("per_task", {"SST-2": {"data": {"folder": "x"}}}, ["per_task.SST-2.data", "folder"]),
    ("per_task", {"SST-2": {"data": {"train_rows": 9, "selection_rows": 9}}}, ["data.selection_rows is 9", "9"]),
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


IMPOSSIBLE = [
    ("finetune/learning_rate", float("nan"), "finetune.learning_rate is nan"),
    ("finetune/learning_rate", float("inf"), "finetune.learning_rate is inf"),
    ("pretrain/mean_span", -float("inf"), "pretrain.mean_span is -inf"),
    ("recover/steps", 10**30, "recover.steps is a number of 100 bits"),
    ("recover/steps", 10**12, "recover.steps is 1000000000000; it must be at most"),
    ("compress/rank", 65, "compress.rank is 65"),
    ("per_task", {"SST-2": {"compress": {"rank": 65}}}, "per_task.SST-2.compress.rank is 65"),
    ("per_task", {"SST-2": {"compress": {"initial_fraction": 0.9}}}, "per_task.SST-2.compress.initial_fraction is 0.9"),
    ("model/architecture/num_sparse_encoder_layers", 5, "num_sparse_encoder_layers is 5, but"),
    (
        "model/architecture/num_sparse_decoder_layers",
        3,
        "num_sparse_decoder_layers is 3, which cannot be spread evenly",
    ),
    ("model/architecture/feed_forward_proj", "gated-gelu", "feed_forward_proj"),
    ("model/tokenizer", {"vocab_size": 16, "sentinels": 13}, "sentinels is 13"),
    (
        "merge",
        {"exclude_layers": ["encoder.block.0.layer.1.mlp"]},
        "no sparse layer of the model; there are encoder.block.1",
    ),
    ("merge", {"capacity": 3}, "merge.capacity is 3, so 2 groups hold at most 6 of 8"),
    ("methods", {"msmoe": {"base": "msmoe", "capacity": 1}}, "methods.msmoe.capacity is 1"),
    ("finetune", {"accumulation": 33}, "finetune.accumulation is 33, but finetune.batch_size only 32"),
    ("recover", {"patience": 2}, "recover.patience is 2, but recover.select_every is 0"),
    ("recover", {"z_weight": 0.1}, "recover.z_weight is 0.1, but recover.balance_weight is 0"),
    ("finetune/precision", "fp16", "finetune.precision is 'fp16'"),
    ("processes", 65, "processes is 65, but"),
    ("device", "tpu", "device is 'tpu'; use auto, cpu"),
    ("device", "cpu\n", "device is 'cpu\\n', which holds the character"),
    ("results", "-r", "results is '-r'"),
    ("results", "r{task}", "results is 'r{task}'"),
    ("results", "r\0", "which holds the character '\\x00'"),
    ("results", "", "results is '', which is empty"),
    ("model/checkpoint", "-model", "model.checkpoint is '-model'"),
    ("model/checkpoint", "${NOTHING_IS_SET_HERE:-}", "model.checkpoint is ''"),
    ("model/checkpoint", "../..//a b", "there is no such folder"),
    ("experts", [{}], "experts[0] is {}"),
    ("seeds", [2**40], "seeds[0] is"),
]


@pytest.mark.parametrize(("path", "value", "words"), IMPOSSIBLE, ids=[words for _, _, words in IMPOSSIBLE])
def test_what_cannot_be_is_refused_before_any_work(path: str, value: Any, words: str) -> None:
    made = json.loads(json.dumps(DEFAULT))
    node = made
    *parents, last = path.split("/")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        configuration.complete(made)
    assert "\n" not in str(caught.value)


def test_a_value_that_no_json_has_is_named() -> None:
    import datetime

    for value in (datetime.date(2020, 1, 1), b"8", {8}, [[[[[[[[[[[[[[]]]]]]]]]]]]]], {1: 2}):
        with pytest.raises(ValueError, match=r"compress\.rank"):
            configuration.complete(DEFAULT | {"compress": {"rank": value}})


def test_a_whole_number_may_be_written_with_a_point() -> None:
    made = configuration.complete(
        DEFAULT | {"experts": [4.0], "per_task": {"SST-2": {"finetune": {"steps": 5.0, "learning_rate": 1}}}}
    )
    assert repr(made["experts"]) == "[4]"
    assert repr(made["per_task"]["SST-2"]["finetune"]["steps"]) == "5"
    with pytest.raises(ValueError, match=r"experts\[0\] is 2\.5"):
        configuration.complete(DEFAULT | {"experts": [2.5]})


def test_sparse_layers_are_counted_and_named_as_the_model_has_them() -> None:
    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.train.pretrain import build_switch
    from mcsmoe.workflow.consistency import layer_names

    for layers, sparse in ((1, 1), (2, 1), (4, 2), (5, 2), (4, 4), (6, 3)):
        fields = {"d_model": 8, "d_kv": 2, "d_ff": 8, "num_heads": 1, "num_experts": 2, "num_layers": layers}
        fields |= {
            "num_decoder_layers": layers,
            "num_sparse_encoder_layers": sparse,
            "num_sparse_decoder_layers": sparse,
        }
        model = build_switch(fields, 16, seed=0)
        assert layer_names(fields) == adapter_for(model).layers(model)
        assert len(layer_names(fields)) == 2 * sparse


def test_activations_are_those_of_the_library() -> None:
    from transformers.activations import ACT2FN

    known = section("model")["architecture"]["properties"]["feed_forward_proj"]["enum"]
    assert set(known) <= set(ACT2FN)


def test_every_number_has_a_range_and_every_text_a_length() -> None:
    def walk(part: dict[str, Any], path: str) -> None:
        kinds = part.get("type", ())
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if {"integer", "number"} & set(kinds):
            assert {"minimum", "exclusiveMinimum"} & set(part), f"{path} has no lower bound"
            assert {"maximum", "exclusiveMaximum"} & set(part), f"{path} has no upper bound"
        if "string" in kinds:
            assert {"maxLength", "enum", "pattern"} & set(part), f"{path} is any text"
        for key, inner in part.get("properties", {}).items():
            walk(inner, f"{path}.{key}")
        for key in ("items", "additionalProperties"):
            if isinstance(part.get(key), dict):
                walk(part[key], f"{path}[]")

    walk(schema(), "")


def test_reap_prunes_every_layer_alike_as_published() -> None:
    assert methods.BUILTIN["reap"].budget == methods.BUILTIN["hc-smoe"].budget == "uniform"


def test_hc_smoe_is_the_published_one_in_the_workflow_and_on_the_command_line() -> None:
    """Average linkage on Euclidean distances of mean outputs, averaged by frequency."""
    for known in (resolve(configuration.complete({"tasks": ["SST-2"]})), methods.PRESETS):
        found = known["hc-smoe"]
        assert (found.similarity, found.grouping, found.linkage) == (
            "expert-output.distance",
            "hierarchical",
            "average",
        )
        assert (found.merge, found.budget, found.alignment) == ("frequency", "uniform", "none")


def test_no_preset_differs_from_the_method_of_its_name() -> None:
    for name, preset in methods.PRESETS.items():
        assert name not in methods.BUILTIN or preset == methods.BUILTIN[name]


NAMES = [
    "..",
    ".",
    "a/b",
    "",
    "m{x}",
    "<script>",
    "examples",
    "Full",
    "full_training",
    "permuted-activation",
    "a\nb",
    "x" * 81,
]
NAMES += [
    "-x",
    " x",
    "x ",
    "a\\b",
    "a*",
    "$(x)",
    "a;b",
    "seed0",
    "a-seed3-b",
    "~",
    ".hidden",
    "a'b",
    'a"b',
    "a\tb",
    "é" * 41,
]


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_a_method_that_cannot_name_a_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"methods|variants"):
        configuration.complete(DEFAULT | {"variants": ["full", name], "methods": {name: {"base": "msmoe"}}})


def test_ordinary_names_are_taken() -> None:
    names = ["my-method_2", "M SMoE (ours)", "größer", "v1.2+x", "fullest", "exam"]
    made = configuration.complete(DEFAULT | {"variants": names, "methods": {name: {"base": "msmoe"} for name in names}})
    assert made["variants"] == names
