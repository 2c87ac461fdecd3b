"""Tasks of lm-eval on a model in memory: a local task, scored as by hand; skipped where the extra is not installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import mcsmoe
from mcsmoe.artefacts.tables import read_table
from mcsmoe.cli.main import main
from mcsmoe.evaluate import harness
from mcsmoe.train.decoder import train_byte_tokenizer

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" red", " blue"]
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"text": f"the {one} is", "label": number % 2} for number, one in enumerate(["sky", "sea", "rose", "sun", "moon"])
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


def saved(folder: Path) -> tuple[Any, Any, Path]:
    tokenizer = train_byte_tokenizer([row["text"] for row in ROWS] + [" red blue"] * 9, 300)
    model: Any = tiny_models.model("qwen3_moe", vocab_size=len(tokenizer))
    mcsmoe.save(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model, tokenizer, folder / "model"


def test_a_local_task_is_scored_as_by_hand(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    model, tokenizer, place = saved(folder)
    right = 0
    for row in ROWS:
        scores = []
        for choice in (" red", " blue"):
            context, whole = (tokenizer(text)["input_ids"] for text in (row["text"], row["text"] + choice))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole))))
        right += int(scores[1] > scores[0]) == row["label"]
    out = folder / "scores.parquet"
    assert main(["evaluate", str(place), "--tasks", str(folder / "tasks"), "--out", str(out)]) in (0, None)
    (found,) = read_table(out, "harness").query("metric == 'acc'").to_dict("records")
    assert (found["task"], found["n"]) == ("colours", 5)
    assert found["value"] == pytest.approx(right / 5)


def test_without_the_extra_or_tasks_there_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'mcsmoe\[lm-eval\]'"):
        harness.require()
    (folder / "none").mkdir()
    with pytest.raises(ValueError, match="which has no task file"):
        harness.split_names([str(folder / "none")])
    assert harness.split_names(["arc_easy", str(folder / "tasks")]) == (["arc_easy", "colours"], [folder / "tasks"])


def test_results_of_the_harness_are_rows_with_their_intervals() -> None:
    results = {
        "results": {
            "colours": {
                "alias": "c",
                "acc,none": 0.6,
                "acc_stderr,none": 0.1,
                "bpb,none": 2.0,
                "bpb_stderr,none": "N/A",
            }
        },
        "n-samples": {"colours": {"original": 9, "effective": 5}},
        "n-shot": {"colours": 2},
    }
    one, two = harness.rows_of(results).to_dict("records")
    assert (one["metric"], one["n"], one["shots"]) == ("acc", 5, 2)
    assert (one["ci_low"], one["ci_high"]) == (pytest.approx(0.404, abs=1e-3), pytest.approx(0.796, abs=1e-3))
    assert two["value"] == 2.0
    assert math.isnan(two["ci_low"])
    assert "acc 0.6000 [0.4040, 0.7960], n = 5, 2 shots" in harness.in_words(one)
