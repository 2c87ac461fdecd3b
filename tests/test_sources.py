"""Rows and text from the generator, from files and from a copy of the hub."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcsmoe.data import sources
from mcsmoe.data.columns import arrow_schema
from mcsmoe.data.tasks import known_tasks, load_task

SYNTHETIC = {"kind": "synthetic", "train_rows": 40, "validation_rows": 24}


def folder(base: Path, name: str, suffix: str) -> dict[str, Any]:
    """The generator's rows of a task as files."""
    task = load_task(name)
    for split in sources.SPLITS:
        frame = sources.load_split(SYNTHETIC, task, split, 0)
        path = base / name / f"{split}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".parquet":
            sources.write_rows(path, frame, task)
        elif suffix == ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_csv(path, index=False)
    return {"kind": "files", "folder": str(base)}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
@pytest.mark.parametrize("name", ["SST-2", "WinoGrande", "MultiRC", "SQuAD", "HotpotQA"])
def test_formats_give_the_same_examples(tmp_path: Path, name: str, suffix: str) -> None:
    task = load_task(name)
    source = folder(tmp_path, name, suffix)
    if suffix == ".csv" and name in ("MultiRC", "SQuAD", "HotpotQA"):
        with pytest.raises(ValueError, match=r"which CSV cannot hold; use parquet or JSON lines"):
            sources.check(source, task)
        return
    sources.check(source, task)
    for split in sources.SPLITS:
        found = task.examples(sources.load_split(source, task, split, 0), split)
        wanted = task.examples(sources.load_split(SYNTHETIC, task, split, 0), split)
        pd.testing.assert_frame_equal(found, wanted)


@pytest.mark.parametrize("name", [name for name in known_tasks() if name != "OpenBookQA"])
def test_written_files_have_the_hubs_schema(tmp_path: Path, name: str) -> None:
    folder(tmp_path, name, ".parquet")
    schema = pq.read_schema(tmp_path / name / "train.parquet")
    assert schema.equals(arrow_schema(load_task(name).columns))


def test_files_by_split_and_by_task(tmp_path: Path) -> None:
    task = load_task("SST-2")
    folder(tmp_path, "SST-2", ".parquet")
    files = {split: str(tmp_path / "SST-2" / f"{split}.parquet") for split in sources.SPLITS}
    for given in (files, {"SST-2": files}):
        source = {"kind": "files", "files": given}
        sources.check(source, task)
        assert len(sources.load_split(source, task, "validation", 0)) == 24
    with pytest.raises(ValueError, match="SST-2 has no training split"):
        sources.check({"kind": "files", "files": {"validation": files["validation"]}}, task)


def test_row_limits_take_rows_at_random_and_whole_groups(tmp_path: Path) -> None:
    source = folder(tmp_path, "SST-2", ".parquet") | {"train_rows": 10}
    task = load_task("SST-2")
    first, again, other = (sources.load_split(source, task, "train", seed)["idx"].tolist() for seed in (0, 0, 1))
    assert len(first) == 10
    assert first == again == sorted(first)
    assert first != other
    source, task = folder(tmp_path, "MultiRC", ".parquet") | {"train_rows": 10}, load_task("MultiRC")
    made = task.examples(sources.load_split(source, task, "train", 0), "train")
    assert made.groupby("group").size().tolist() == [4, 4]


def test_selection_is_disjoint_complete_and_never_splits_a_group() -> None:
    task = load_task("MultiRC")
    made = task.examples(sources.load_split(SYNTHETIC, task, "train", 0), "train")
    train, selection = sources.split_selection(made, 10, 3)
    assert sorted([*train["idx"], *selection["idx"]]) == sorted(made["idx"])
    assert not set(train["group"]) & set(selection["group"])
    assert 10 <= len(selection) < 14
    by_share = sources.split_selection(made, fraction=0.5, seed=3)[1]
    assert len(by_share) == 20
    assert selection["idx"].tolist() == sources.split_selection(made, 10, 3)[1]["idx"].tolist()
    assert selection["idx"].tolist() != sources.split_selection(made, 10, 4)[1]["idx"].tolist()
    for rows in (0, 40):
        with pytest.raises(ValueError, match="must leave rows on both sides"):
            sources.split_selection(made, rows, 3)


# -- bad files ---------------------------------------------------------------------------------------------------
def _break(base: Path, how: str) -> None:
    file = base / "SST-2" / "train.parquet"
    frame = pd.read_parquet(file)
    if how == "missing":
        file.unlink()
    elif how == "damaged":
        file.write_bytes(b"PAR1 this is not parquet")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "column":
        frame.drop(columns="sentence").to_parquet(file)
    elif how == "type":
        frame.assign(label=frame["label"].astype(str)).to_parquet(file)
    elif how == "rows":
        frame.iloc[:0].to_parquet(file)
    elif how == "twice":
        (base / "SST-2" / "train.csv").write_text("sentence,label,idx\n")
    elif how == "folder":
        (base / "SST-2").rename(base / "sst")


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("missing", "has no training split"),
        ("damaged", "is not readable as parquet"),
        ("empty", "is empty"),
        ("column", "column 'sentence' is missing (there are label, idx)"),
        ("type", "column 'label' is of type"),
        ("rows", "has no rows"),
        ("twice", "has two files for split 'train'"),
        ("folder", "which has no folder 'SST-2'"),
    ],
)
def test_bad_files_are_found_by_the_check(tmp_path: Path, how: str, part: str) -> None:
    source = folder(tmp_path, "SST-2", ".parquet")
    _break(tmp_path, how)
    for attempt in (sources.check, lambda s, t: sources.load_split(s, t, "train", 0)):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the part is the match
            attempt(source, load_task("SST-2"))
        assert part in str(raised.value)
        assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("suffix", "text", "part"),
    [
        (".jsonl", "not json\n", "not readable as jsonl"),
        (".jsonl", '{"sentence": "a", "label": 1}\n', "column 'idx' is missing"),
        (".csv", "sentence,label\na,1\n", "column 'idx' is missing"),
        (".csv", "sentence,label,idx\n", "has no rows"),
        (".csv", "sentence,label,idx\na,one,1\n", "does not hold the columns"),
        (".jsonl", '{"sentence": "a", "label": "one", "idx": 1}\n', "does not hold the columns"),
    ],
)
def test_bad_text_files(tmp_path: Path, suffix: str, text: str, part: str) -> None:
    file = tmp_path / f"train{suffix}"
    file.write_text(text)
    source = {"kind": "files", "files": {"train": str(file), "validation": str(file)}}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the part is the match
        sources.load_split(source, load_task("SST-2"), "train", 0)
    assert part in str(raised.value)
    assert str(file) in str(raised.value)


def test_text_that_looks_like_something_else_stays_text(tmp_path: Path) -> None:
    rows = [{"sentence": "2020-01-01", "option1": "1", "option2": "2", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    for file in ("a.jsonl", "a.csv"):
        source = {"kind": "files", "files": dict.fromkeys(sources.SPLITS, str(tmp_path / file))}
        assert sources.load_split(source, load_task("WinoGrande"), "train", 0).to_dict("records") == rows


def test_unknown_sources() -> None:
    with pytest.raises(ValueError, match=r"data\.source is 'web'; use one of"):
        sources.check({"kind": "web"}, load_task("SST-2"))
    with pytest.raises(ValueError, match="generator does not write task 'OpenBookQA'"):
        sources.check({"kind": "synthetic"}, load_task("OpenBookQA"))
    with pytest.raises(ValueError, match="split is 'test'"):
        sources.load_split(SYNTHETIC, load_task("SST-2"), "test", 0)
    with pytest.raises(ValueError, match=r"data\.folder is not set"):
        sources.check({"kind": "files"}, load_task("SST-2"))


# -- the hub -----------------------------------------------------------------------------------------------------
@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def mirror(base: Path, name: str) -> None:
    """A copy of a hub repository: parquet shards in a folder per configuration, which its card lists."""
    task = load_task(name)
    assert task.hub is not None
    repository = base / task.hub.repository
    rows = {split: sources.load_split(SYNTHETIC, task, split, 0) for split in sources.SPLITS}
    lines = ["---", "configs:", f"- config_name: {task.hub.config}", "  data_files:"]
    for split, frame in rows.items():
        half = len(frame) // 2
        for shard, part in enumerate((frame.iloc[:half], frame.iloc[half:])):
            sources.write_rows(repository / str(task.hub.config) / f"{split}-{shard:05d}-of-00002.parquet", part, task)
        lines += [f"  - split: {split}", f"    path: {task.hub.config}/{split}-*"]
    (repository / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["SST-2", "MultiRC", "HotpotQA"])
def test_hub_layout_gives_the_same_examples(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    mirror(tmp_path, name)
    task, source = load_task(name), {"kind": "hub", "mirror": str(tmp_path)}
    sources.check(source, task)
    for split in sources.SPLITS:
        found = task.examples(sources.load_split(source, task, split, 0), split)
        wanted = task.examples(sources.load_split(SYNTHETIC, task, split, 0), split)
        pd.testing.assert_frame_equal(found, wanted)


@pytest.mark.usefixtures("no_network")
def test_offline_never_touches_the_network(tmp_path: Path) -> None:
    task = load_task("MRPC")
    with pytest.raises(ValueError, match=r"data set nyu-mll/glue, configuration mrpc.*fetch it once online"):
        sources.load_split({"kind": "hub", "offline": True}, task, "train", 0)
    with pytest.raises(ValueError, match="holds no copy of nyu-mll/glue"):
        sources.load_split({"kind": "hub", "mirror": str(tmp_path)}, task, "train", 0)


@pytest.mark.usefixtures("no_network")
def test_hub_data_of_another_schema_names_the_column(tmp_path: Path) -> None:
    mirror(tmp_path, "SST-2")
    for file in (tmp_path / "nyu-mll/glue/sst2").glob("*.parquet"):
        pq.write_table(pq.read_table(file).rename_columns(["text", "label", "idx"]), file)
    with pytest.raises(ValueError, match="column 'sentence' is missing"):
        sources.load_split({"kind": "hub", "mirror": str(tmp_path)}, load_task("SST-2"), "train", 0)


# -- pre-training text -------------------------------------------------------------------------------------------
def test_corpus_from_files_skips_headings_and_empty_lines(tmp_path: Path) -> None:
    lines = ["", " = Title = \n", " First line . \n", " = = Part = = \n", "x = y holds .\n", "   ", None]
    pq.write_table(pa.table({"text": lines, "source": ["s"] * 7}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("One.\n\nTwo.\n")
    source = {"kind": "files", "files": [str(tmp_path / "a.parquet"), str(tmp_path / "b.txt")], "column": "text"}
    assert list(sources.corpus(source, 0)) == ["First line .", "x = y holds .", "One.", "Two."]


def test_bad_corpora(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1], "body": ["x"]}), tmp_path / "a.parquet")
    cases = [
        ({"kind": "files", "files": []}, "pretrain.files is empty"),
        ({"kind": "files", "files": ["gone.txt"]}, "gone.txt does not exist"),
        ({"kind": "files", "files": ["a.doc"]}, "convert it"),
        ({"kind": "files", "files": [str(tmp_path / "a.parquet")], "column": "words"}, "it has text, body"),
        ({"kind": "files", "files": [str(tmp_path / "a.parquet")], "column": "text"}, "of type int64"),
        ({"kind": "web"}, "pretrain.corpus is 'web'"),
    ]
    for source, part in cases:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the part is the match
            sources.check_corpus(source)
        assert part in str(raised.value)


def test_real_corpus(shared: Path) -> None:
    source = {"kind": "files", "files": [str(shared / "data/wikitext2/validation.parquet")], "column": "text"}
    texts = list(sources.corpus(source, 0))
    assert 1500 < len(texts) < 3760
    assert not any(text.startswith("= ") for text in texts)
