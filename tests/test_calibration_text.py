"""Calibration files: what is text is read as it is, every kind of row; what is not is refused by file, row and field."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mcsmoe.calibration.rows import Row, read_rows, rows_of
from mcsmoe.calibration.text import batches, packed

GOOD = {"text": "old miller counts grain"}
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'nobody' %}{{ raise_exception('unknown role') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}"
)


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """Characters as tokens (a space is 3); a start token (1) before every text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<s>", "<unk>", *map(chr, range(32, 127))]
    raw = Tokenizer(models.WordLevel({token: number for number, token in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), "isolated")
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>")
    made.chat_template = template
    return made


def ids(text: str, start: bool = True) -> list[int]:
    return ([1] if start else []) + [ord(letter) - 29 if 32 <= ord(letter) < 127 else 2 for letter in text]


def jsonl(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parquet(folder: Path, **columns: Any) -> Path:
    file = folder / "rows.parquet"
    pq.write_table(pa.table(columns), file)
    return file


def tokens(rows: list[Row], encoder_decoder: bool = False, **how: Any) -> list[list[int]]:
    """Real tokens of every row, in any order."""
    settings = {"samples": 99, "batch_size": 3, "max_tokens": 500, "seed": 0, "tokenizer": tokenizer()} | how
    found = []
    for one in batches(rows, encoder_decoder=encoder_decoder, **settings):
        for row in range(len(one["input_ids"])):
            inside = one["attention_mask"][row].bool()
            labels = one["labels"][row]
            found.append((one["input_ids"][row][inside].tolist(), labels[labels >= 0].tolist()))
    if encoder_decoder:
        return sorted(found)
    assert all(one == two for one, two in found)
    return sorted(one for one, _ in found)


# -- what is read ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (GOOD, ids(GOOD["text"])),
        ({"input": "ab", "target": "cd"}, ids("ab") + ids("cd")),
        ({"input": "ab", "target": None, "text": None}, ids("ab")),
        ({"input": None, "target": "cd", "text": "ab"}, ids("ab")),
        ({"prompt": "ab", "completion": "cd"}, ids("abcd")),
        ({"prompt": "ab"}, ids("ab")),
        ({"prompt": "ab", "completion": None}, ids("ab")),
        (
            {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
            "<user>ab<assistant>c",
        ),
        ({"messages": [{"role": "user", "content": "ab"}], "tools": [{"name": "add"}]}, "<tools>add<user>ab"),
        ({"messages": [{"role": "user", "content": "ab"}], "tools": '[{"name": "add"}]'}, "<tools>add<user>ab"),
        ({"messages": [{"role": "user", "content": "ab"}], "text": "not this"}, "<user>ab"),
        (
            {"prompt": [{"role": "user", "content": "ab"}], "completion": [{"role": "assistant", "content": "c"}]},
            "<user>ab<assistant>c",
        ),
        ({"messages": [{"role": "a", "content": None, "tool_calls": [{"name": "f"}]}]}, "<a>"),
        ({"input_ids": [5, 6, 7]}, [5, 6, 7]),
        ({"input_ids": [5, 6], "labels": [7]}, [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [5, 6, 7]),
        ({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [5, 6, -100, -100]}, [5, 6]),
        ({"input_ids": [5, 6], "labels": [7, -100]}, [5, 6, 7]),
    ],
)
def test_every_kind_of_row_becomes_its_tokens(row: dict[str, Any], wanted: Any, tmp_path: Path) -> None:
    assert tokens(read_rows(jsonl(tmp_path, row))) == [ids(wanted, start=False) if isinstance(wanted, str) else wanted]


def test_an_encoder_decoder_model_reads_and_answers(tmp_path: Path) -> None:
    def pairs(*rows: Any) -> Any:
        return tokens(read_rows(jsonl(tmp_path, *rows)), encoder_decoder=True)

    assert pairs({"input": "ab", "target": "cd"}) == [(ids("ab"), ids("cd"))]
    assert pairs({"prompt": "ab", "completion": "cd"}) == [(ids("ab"), ids("cd"))]
    assert pairs({"input_ids": [5, 6], "labels": [5, 6]}) == [([5, 6], [5, 6])]
    assert pairs(GOOD) == [(ids(GOOD["text"])[:12], ids(GOOD["text"])[12:])]
    assert pairs({"messages": [{"role": "u", "content": "abc"}]}) == [(ids("<u>", False), ids("abc", False))]
    with pytest.raises(ValueError, match=r"line 1: field 'labels' has -100 before its end"):
        pairs({"input_ids": [5, 6], "labels": [-100, 7]})


def test_tables_say_the_same_as_lines(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    for rows in (
        [GOOD, {"text": "seven birds"}],
        [{"input_ids": [5, 6], "labels": [7]}, {"input_ids": [8, 9], "labels": [5]}],
        [{"messages": talk}, {"messages": talk[:1]}],
        [{"prompt": "ab", "completion": "cd"}] * 2,
    ):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        one, two = read_rows(jsonl(tmp_path, *rows)), read_rows(parquet(tmp_path, **columns))
        assert [row.fields for row in one] == [row.fields for row in two]
        assert tokens(one) == tokens(two)
    # Every message of a column has every field, null where a row had none.
    filled = [{"role": "user", "content": "ab", "name": None}, {"role": "tool", "content": "c", "name": "f"}]
    (row,) = read_rows(parquet(tmp_path, messages=[filled]))
    assert "name" not in row.fields["messages"][0]


def test_separators_marks_and_blank_lines(tmp_path: Path) -> None:
    texts = ["first part\u2028second", "old\x85miller", "seven\x0cbirds"]
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + f"{texts[0]}\n\n  \n{texts[1]}\r\n{texts[2]}\n".encode())
    rows = read_rows(file)
    assert [row.fields["text"] for row in rows] == texts
    assert [row.place for row in rows] == [f"{file}: line {number}" for number in (1, 4, 5)]
    assert [row.fields["text"] for row in read_rows(jsonl(tmp_path, *({"text": text} for text in texts)))] == texts


def test_columns_nobody_asked_for_are_told_of_and_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mcsmoe")
    read_rows(jsonl(tmp_path, {**GOOD, "meta": 3}, {**GOOD, "meta": {"a": [1]}, "id": None}))
    assert "read are 'text'; not read are 'id', 'meta'" in caplog.text
    odd = pa.array([b"x"], pa.binary()), pa.array([10**18], pa.timestamp("ns")), pa.array([[[1]]])
    (row,) = read_rows(parquet(tmp_path, text=["a"], image=odd[0], time=odd[1], nested=odd[2]))
    assert dict(row.fields) == {"text": "a"}


def test_rows_without_tokens_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mcsmoe")
    rows = read_rows(jsonl(tmp_path, GOOD, {"text": ""}, {"text": " \n\t"}))
    assert tokens(rows) == [ids(GOOD["text"])]
    assert "2 of 3 calibration rows give no tokens and are left out" in caplog.text
    for empty in ({"text": ""}, {"input_ids": []}, {"messages": []}):
        with pytest.raises(ValueError, match=r"rows\.jsonl: line 1 and all others drawn give no tokens"):
            tokens(read_rows(jsonl(tmp_path, empty)))


# -- what is refused ---------------------------------------------------------------------------------------------
NOT_TEXT: list[tuple[dict[str, Any], str]] = [
    *(
        ({**({"input": "a", "target": "b"} | {field: value})} if field != "text" else {"text": value}, field)
        for field in ("text", "input", "target")
        for value in (12, 1.5, True, ["river", "stone"], {"a": "b"}, [{"role": "user", "content": "hi"}], "\ud83d")
    ),
    ({"text": None}, "text"),
    ({"prompt": 3, "completion": "a"}, "prompt"),
    ({"prompt": "a", "completion": {"b": 1}}, "completion"),
    ({"prompt": "a", "completion": [{"role": "user", "content": "a"}]}, "completion"),
    ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "completion"),
    ({"prompt": ["a"]}, "prompt"),
    ({"messages": "hello"}, "messages"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"messages": ["hello"]}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages"),
    ({"messages": [], "tools": "no JSON"}, "tools"),
    ({"messages": [], "tools": ["add"]}, "tools"),
    *(
        ({"input_ids": value} if field == "input_ids" else {"input_ids": [5], field: value}, field)
        for field in ("input_ids", "labels")
        for value in ("river", 5, [5.0], [5.5], [True], [None], ["5"], [[5, 6]], {"a": 1}, [5, -1])
    ),
    ({"input_ids": None, "labels": [1]}, "input_ids"),
    ({"input_ids": [5, 6], "attention_mask": [1]}, "attention_mask"),
    ({"input_ids": [5, 6], "attention_mask": [1, 2]}, "attention_mask"),
]


@pytest.mark.parametrize(("row", "field"), NOT_TEXT)
def test_what_is_not_what_its_field_holds_is_refused(row: dict[str, Any], field: str, tmp_path: Path) -> None:
    first = {"input_ids": [5]} if "input_ids" in row else {name: "a" for name in row if name != "tools"}
    first = {"messages": [{"role": "user", "content": "a"}]} if "messages" in row else first
    with pytest.raises(ValueError, match=rf"rows\.jsonl: line 2.*'{field}'") as refused:
        read_rows(jsonl(tmp_path, first, row))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None]),
        pa.array([["a"], ["b"]]),
        pa.array([b"a", b"b"], pa.binary()),
        pa.array([{"role": "user"}] * 2),
        pa.array([1, 2]),
        pa.array([None, None], pa.null()),
        pa.array([1, 2], pa.timestamp("s")),
    ],
    ids=str,
)
def test_columns_that_are_not_text_are_refused(column: pa.Array, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.parquet: row \d.*text"):
        read_rows(parquet(tmp_path, text=column))


def test_rows_of_two_kinds_and_of_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: field 'text' is missing .there are 'input', 'target'"):
        read_rows(jsonl(tmp_path, GOOD, {"input": "a", "target": "b"}))
    with pytest.raises(ValueError, match=r"line 1: field 'text' is missing .there are no fields"):
        read_rows(jsonl(tmp_path, {}, GOOD))
    with pytest.raises(ValueError, match=r"line 1: has 'content'; calibration is one text a line"):
        read_rows(jsonl(tmp_path, {"content": "a"}))
    with pytest.raises(ValueError, match=r"there are no rows in it"):
        read_rows(parquet(tmp_path, text=pa.array([], pa.string())))
    for name, data in (("a.txt", b"\n \n"), ("a.jsonl", b"\xef\xbb\xbf\n"), ("b.jsonl", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"there are no rows in it"):
            read_rows(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.csv: calibration is"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"not readable as parquet"):
        read_rows(tmp_path / "a.parquet")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"no such file"):
        read_rows(tmp_path / "folder.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 40]}, r"line 2: field 'input_ids' has token 40, and the model has 40 embeddings"),
        ({"input_ids": [5], "labels": [99]}, r"line 2: field 'labels' has token 99"),
    ],
)
def test_ids_beyond_the_embeddings_are_refused_in_every_row(row: Any, message: str, tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, {"input_ids": [39]}, row))
    with pytest.raises(ValueError, match=message):
        tokens(rows, vocabulary=40, samples=1)
    assert len(tokens(rows, vocabulary=None)) == 2


def test_a_text_of_tokens_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, GOOD, {"text": "wide ~"}))
    assert len(tokens(rows, vocabulary=98)) == 2
    with pytest.raises(ValueError, match=r"line 2: its text has token 97 .'~'., and the model has 97 embeddings"):
        tokens(rows, vocabulary=97)


def test_padding_never_lies_beyond_the_embeddings(tmp_path: Path) -> None:
    rows, given = read_rows(jsonl(tmp_path, {"input_ids": [5, 6]}, {"input_ids": [5]})), tokenizer()
    given.pad_token = "~"
    (one,) = batches(rows, given, False, 9, 9, 9, 0, vocabulary=50)
    assert int(one["input_ids"].max()) < 50
    assert one["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_messages_that_the_template_does_not_take_are_refused(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, {"messages": [{"role": "nobody", "content": "a"}]}))
    with pytest.raises(ValueError, match=r"line 1: the tokenizer's chat template does not take.*unknown role"):
        tokens(rows)
    with pytest.raises(ValueError, match=r"line 1: has messages, but the tokenizer has no chat template"):
        tokens(rows, tokenizer=tokenizer(None))


def test_rows_in_memory_are_checked_too() -> None:
    assert tokens(rows_of([{"input": "ab", "target": "c"}], "examples")) == [ids("ab") + ids("c")]
    with pytest.raises(ValueError, match=r"examples: row 2: field 'target' is null"):
        rows_of([{"input": "a", "target": "b"}, {"target": None, "input": "a"}] * 1 + [{"target": 3}], "examples")


def test_rows_are_drawn_once_each_and_the_same_by_seed(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, *({"input_ids": [number] * 3} for number in range(1, 40))))
    drawn = tokens(rows, samples=10, seed=3)
    assert len({one[0] for one in drawn}) == 10
    assert drawn == tokens(rows, samples=10, seed=3) != tokens(rows, samples=10, seed=4)
    assert torch.equal(*(batches(rows, None, False, 9, 9, 2, 1)[0]["input_ids"] for _ in range(2)))


@pytest.mark.parametrize(
    ("texts", "length", "expected"),
    [
        ([[1, 2, 3], [4, 5]], 4, [[1, 2, 3, 9]]),
        ([[1, 2, 3], [4, 9], [5]], 3, [[1, 2, 3], [9, 4, 9]]),
        ([[1]], 4, [[1, 9]]),
    ],
)
def test_texts_are_joined_by_their_end_and_cut(texts: list[list[int]], length: int, expected: list[list[int]]) -> None:
    assert packed(texts, length, end=9) == expected


def test_two_sided_texts_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder-decoder"):
        batches(read_rows(jsonl(tmp_path, GOOD)), tokenizer(), True, 9, 2, 99, 0, pack=8)
