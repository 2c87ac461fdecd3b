"""Lines end at a newline only, whatever else stands in them; a line that cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcsmoe.data.lines import check_text, json_lines, lines

SEPARATORS = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r")


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_only_a_newline_ends_a_line(separator: str, tmp_path: Path) -> None:
    text = f"first{separator}second"
    file = tmp_path / "a.txt"
    file.write_bytes(f"{text}\nnext\r\nlast".encode())
    assert list(lines(file)) == [(1, text), (2, "next"), (3, "last")]
    file.write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    assert list(json_lines(file)) == [(1, {"text": text})]


def test_a_byte_order_mark_and_blank_lines_have_no_say(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\r\n\n  \n{"a": 1}\n\n{"a": 2}\n')
    assert list(json_lines(file)) == [(4, {"a": 1}), (6, {"a": 2})]
    file.write_bytes("\ufefftext\n\ufeffmark within".encode())
    assert list(lines(file)) == [(1, "text"), (2, "\ufeffmark within")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2]", "line 2 is a list, not an object"),
        (b"[", "line 2 begins a JSON array"),
        (b'"text"', "line 2 is text, not an object"),
        (b"null", "line 2 is null, not an object"),
        (b"{'a': 1}", "line 2 is not JSON"),
        (b'{"a": 1} {"a": 2}', "line 2 is not JSON"),
        (b'{"a": 1, "a": 2}', "line 2 is not readable as JSON .field 'a' stands there twice"),
        (b'{"a": "\xff"}', "line 2 is not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2 is not readable as JSON"),
        (b"[" * 100_000, "line 2 is nested too deep|line 2 begins a JSON array"),
        ('{"a": 1}'.encode("utf-16"), "line 2 is not UTF-8"),
    ],
)
def test_a_line_that_is_no_object_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl: {message}"):
        list(json_lines(file))


def test_half_a_character_is_no_text() -> None:
    assert check_text("a\U0001f600", "here") == "a\U0001f600"
    with pytest.raises(ValueError, match=r"here holds half a character .U\+D83D at 1"):
        check_text("a\ud83d", "here")
