"""Task files and what they make of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mcsmoe.artefacts.tables import write_table
from mcsmoe.data.tasks import METRICS, Task, known_tasks, load_task
from mcsmoe.evaluate import metrics

REAL = {  # published sizes: README of the data
    "SST-2": (67349, 872),
    "COPA": (400, 100),
    "MultiRC": (27243, 4848),
    "WinoGrande": (10234, 1267),
    "SQuAD": (11877, 10570),
}


def sst2(labels: tuple[Any, ...] = (0, 1), idx: tuple[int, ...] = (4, 7)) -> pd.DataFrame:
    return pd.DataFrame({"sentence": ["a dull film ", "a good  film "], "label": list(labels), "idx": list(idx)})


def own(tmp_path: Path, **changes: Any) -> Path:
    """A user's own task file; a field set to None is left out."""
    fields: dict[str, Any] = {
        "name": "weather",
        "description": "what the sky looks like",
        "columns": {"text": "string", "kind": "string"},
        "prompt": "sky: {{ text }}",
        "choices": ["grey", "blue"],
        "label": "kind",
        "label_values": ["g", "b"],
        "protocol": "rank",
        "metrics": ["accuracy"],
    }
    file = tmp_path / "weather.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (fields | changes).items() if v is not None}))
    return file


def test_all_tasks_load_and_pin_a_commit() -> None:
    assert set(known_tasks()) == {*REAL, "MRPC", "WikiQA", "HotpotQA", "OpenBookQA", "Language"}
    for name in known_tasks():
        task = load_task(name)
        assert task.name == name
        if task.is_language:  # from the generator, files or installed packages
            assert task.hub is None
            continue
        assert task.hub is not None
        assert len(task.hub.revision) == 40
        assert task.hub.repository.count("/") == 1


def test_published_hyper_parameters_are_the_papers() -> None:
    found = {name: load_task(name).published for name in known_tasks()}
    assert (found["SST-2"].batch_size, found["SST-2"].learning_rate) == (64, 1e-4)
    assert (found["WinoGrande"].batch_size, found["WinoGrande"].learning_rate) == (32, 1e-5)
    assert found["COPA"].batch_size == 8
    assert found["OpenBookQA"].batch_size is None


def test_metric_names_are_those_the_evaluation_computes() -> None:
    assert set(METRICS) == set(metrics.METRICS)


def test_examples_of_fixed_choices(tmp_path: Path) -> None:
    made = load_task("sst2").examples(sst2(), "train", "f.parquet")
    assert made["idx"].tolist() == ["4", "7"]
    assert made["input"].tolist() == ["review: a dull film", "review: a good film"]
    assert made["target"].tolist() == ["negative", "positive"]
    assert made["references"].tolist() == [["negative"], ["positive"]]
    assert made["label"].tolist() == [0, 1]
    write_table(tmp_path / "examples.parquet", made, "examples")


def test_examples_of_choices_per_row() -> None:
    rows = {"premise": ["It rained."], "choice1": ["He sang."], "choice2": ["He got wet."], "question": ["effect"]}
    made = load_task("COPA").examples(pd.DataFrame({**rows, "idx": [3], "label": [1]}), "train").iloc[0]
    assert made["choices"] == ["He sang.", "He got wet."]
    assert (made["target"], made["label"]) == ("He got wet.", 1)
    assert "effect" in made["input"]


def test_labels_by_value_and_by_row() -> None:
    rows = {
        "sentence": ["A met B as _ was in.", "A left B as _ was late."],
        "option1": ["A", "A"],
        "option2": ["B", "B"],
    }
    made = load_task("WinoGrande").examples(pd.DataFrame({**rows, "answer": ["2", "1"]}), "train")
    assert made["target"].tolist() == ["B", "A"]
    assert made["idx"].tolist() == ["0", "1"]
    book = {"id": ["7-1"], "question_stem": ["The sun is"], "answerKey": ["C"]}
    choices = {"text": ["a star", "a moon", "a lamp"], "label": ["C", "A", "B"]}
    assert (
        load_task("OpenBookQA").examples(pd.DataFrame({**book, "choices": [choices]}), "validation")["target"][0]
        == "a star"
    )


def test_generated_answers_keep_all_references() -> None:
    row = {"id": "x", "title": "t", "context": "It is red or  dark\nred.", "question": "Which colour?"}
    answers = {"text": ["red", "dark\nred"], "answer_start": [6, 14]}
    made = load_task("SQuAD").examples(pd.DataFrame([{**row, "answers": answers}]), "validation").iloc[0]
    assert made["references"] == ["red", "dark red"]
    assert (made["target"], made["label"], made["choices"]) == ("red", -1, [])


def test_multirc_groups_answers_of_a_question() -> None:
    base = {"paragraph": "p", "question": "q", "answer": "a", "label": 1}
    ids = [(0, 0, 0), (0, 0, 1), (0, 1, 2)]
    rows = [{**base, "idx": dict(zip(("paragraph", "question", "answer"), i, strict=True))} for i in ids]
    made = load_task("MultiRC").examples(pd.DataFrame(rows), "train")
    assert made["group"].tolist() == ["0-0", "0-0", "0-1"]
    assert made["idx"].tolist() == ["0-0-0", "0-0-1", "0-1-2"]


def test_hotpotqa_gold_paragraphs_on_request() -> None:
    context = {"title": ["Ann", "Bob"], "sentences": [["Ann lives.", " She sings."], ["Bob sleeps."]]}
    row = {"id": "h", "question": "Who?", "answer": "Ann", "type": "bridge", "level": "easy", "context": context}
    frame = pd.DataFrame([{**row, "supporting_facts": {"title": ["Ann"], "sent_id": [0]}}])
    task = load_task("HotpotQA")
    assert task.examples(frame, "train")["input"][0] == "answer: Who? text: Ann: Ann lives. She sings. Bob: Bob sleeps."
    assert task.examples(frame, "train", compat=True)["input"][0] == "answer: Who? text: Ann: Ann lives. She sings."


@pytest.mark.parametrize(
    ("frame", "parts"),
    [
        (sst2(labels=(0, 2)), ["row 1", "label is 2", "0: negative, 1: positive"]),
        (sst2(labels=(-1, 1)), ["row 0", "label is -1", "hidden"]),
        (sst2(idx=(4, 4)), ["rows 0 and 1", "'4'"]),
        (sst2().iloc[:0], ["no rows"]),
        (sst2().drop(columns="label"), ["column 'label' is missing", "nyu-mll/glue"]),
        (sst2().assign(sentence=["a", None]), ["row 1", "column 'sentence' is empty"]),
        (sst2(labels=(0, None)), ["row 1", "hidden"]),
    ],
)
def test_bad_rows(frame: pd.DataFrame, parts: list[str]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the parts are the match
        load_task("SST-2").examples(frame, "train", "f.parquet")
    for part in ["SST-2, split train, f.parquet", *parts]:
        assert part in str(raised.value)


def test_an_answer_without_text() -> None:
    row = {"id": "x", "title": "t", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    with pytest.raises(ValueError, match="row 0: references gives"):
        load_task("SQuAD").examples(pd.DataFrame([row]), "validation")


def test_own_task_by_path(tmp_path: Path) -> None:
    task = load_task(own(tmp_path))
    made = task.examples(pd.DataFrame({"text": ["dark", "clear"], "kind": ["g", "b"]}), "train")
    assert made["target"].tolist() == ["grey", "blue"]


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'SST2x' is not a known task; did you mean 'SST-2'\?.*WinoGrande"):
        load_task("SST2x")
    with pytest.raises(ValueError, match=r"absent\.yaml does not exist"):
        load_task("absent.yaml")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prompts": "x"}, "'prompts' is not a known field"),
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"prompt": "{{ txt }}"}, "prompt uses 'txt', which is not among columns"),
        ({"prompt": "{{ text "}, "prompt is not valid Jinja"),
        ({"prompt": 3}, "prompt is 3, which is not text"),
        ({"protocol": "guess"}, "protocol is 'guess'; use one of rank, generate"),
        ({"metrics": ["accurate"]}, "metrics is 'accurate'; use one of accuracy"),
        ({"metrics": "accuracy"}, "not a list"),
        ({"columns": {"text": "str", "kind": "string"}}, "columns.text is 'str'; use one of string"),
        ({"label": "sort"}, "label is 'sort', which is not among columns"),
        ({"choices": None}, "needs choices and label"),
        ({"choices": ["grey", "grey"]}, "names one twice"),
        ({"protocol": "generate"}, "needs references"),
        ({"choices": "[text, other]"}, "choices uses 'other'"),
        ({"hub": {"repository": "a/b"}}, "hub is {'repository': 'a/b'}, with a field missing"),
        ({"name": "a/b"}, "cannot name a folder"),
    ],
)
def test_bad_task_files(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    file = own(tmp_path, **changes)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the part is the match
        load_task(file)
    assert part in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: [")
    with pytest.raises(ValueError, match="not readable YAML"):
        load_task(file)
    file.write_text("just text")
    with pytest.raises(ValueError, match="not a mapping of fields"):
        load_task(file)


def test_prompts_cannot_reach_into_python(tmp_path: Path) -> None:
    task = load_task(own(tmp_path, prompt="{{ text.__class__.__mro__ }}"))
    with pytest.raises(Exception, match="unsafe"):
        task.examples(pd.DataFrame({"text": ["dark"], "kind": ["g"]}), "train")


@pytest.mark.parametrize("name", list(REAL))
def test_real_files(shared: Path, name: str) -> None:
    from mcsmoe.data import sources

    task: Task = load_task(name)
    source = {"kind": "files", "folder": str(shared / "data")}
    sources.check(source, task)
    for split, rows in zip(("train", "validation"), REAL[name], strict=True):
        frame = sources.load_split(source, task, split, 0)
        assert len(frame) == rows
        made = task.examples(frame.head(300), split)
        assert made["idx"].is_unique
        assert (made["label"] >= 0).all() == (task.protocol == "rank")
        if task.protocol == "rank":
            assert all(row.target == row.choices[row.label] for row in made.itertuples())
        else:
            for context, answers in zip(frame["context"].head(300), made["references"], strict=True):
                assert all(answer in " ".join(context.split()) for answer in answers)
