"""Lines of text files, and JSON lines, whatever characters stand in them: the one place that says where a line ends."""

from __future__ import annotations

import codecs
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    r"""Lines that are not blank, each with its number in the file, from 1.

    A line ends at ``\n`` or ``\r\n`` and nowhere else (form feeds, U+0085 and U+2028 are characters of a text); a byte
    order mark at the start is passed over; the encoding is UTF-8 whatever the locale.

    Raises:
        ValueError: bytes that are not UTF-8; names the file and the line.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            data = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                byte = data[error.start]
                raise ValueError(
                    f"{path}: line {number} is not UTF-8 text (byte {byte:#04x} at {error.start}); save the file as UTF-8"
                ) from error
            if text.strip():
                yield number, text


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file of JSON lines, each with the number of its line; blank lines have no say.

    Raises:
        ValueError: a line that is not one JSON object, or one that names a field twice; names the file and the line.
        OSError: the file cannot be read.
    """
    for number, text in lines(path):
        where = f"{path}: line {number}"
        try:
            found = json.loads(text, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            if text.lstrip()[:1] == "[":
                raise ValueError(f"{where} begins a JSON array; write one object a line (JSON lines)") from error
            raise ValueError(
                f"{where} is not JSON ({error.msg}, column {error.colno}); write one object a line"
            ) from error
        except RecursionError as error:
            raise ValueError(f"{where} is nested too deep to be read; write one plain object a line") from error
        except ValueError as error:
            raise ValueError(f"{where} is not readable as JSON ({error}); correct it") from error
        if not isinstance(found, dict):
            raise ValueError(f"{where} is {kind_of(found)}, not an object; write one object a line (JSON lines)")
        yield number, found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands there twice")
    return made


def kind_of(value: Any) -> str:
    """What a value is, in words for messages."""
    named = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        bytes: "bytes",
        list: "a list",
        tuple: "a list",
        dict: "an object",
    }
    return named.get(type(value), f"a {type(value).__name__}")


def check_text(value: Any, where: str) -> str:
    """``value`` where it is text that a tokenizer can take.

    Raises:
        ValueError: it is something else, or holds half a character (a lone surrogate); begins with ``where``.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} is {kind_of(value)}, not text; correct the row or leave it out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise ValueError(
            f"{where} holds half a character ({half} at {error.start}), which is no text; correct the row or leave it out"
        ) from error
    return value


def shown(value: Any) -> str:
    """``value`` for a message: short, however large it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    return " ".join(brief.repr(value).split())
