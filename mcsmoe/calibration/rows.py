"""Rows of calibration files, every value checked when it is read: what they hold is text, messages or token ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mcsmoe.data.lines import check_text, json_lines, kind_of, lines
from mcsmoe.types import IGNORED

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".parquet")
HELP = (
    "one text a line (.txt), or rows with text, with input and target, with prompt and completion, with messages, or "
    "with input_ids (.jsonl, .parquet)"
)


class Kind(NamedTuple):
    """What a row holds: fields that every row of a file needs, and fields that may be null or absent."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


KINDS = (
    Kind(("input_ids",), ("labels", "attention_mask")),
    Kind(("messages",), ("tools",)),
    Kind(("prompt", "completion"), ("tools",)),
    Kind(("input", "target")),
    Kind(("text",)),
    Kind(("prompt",), ("completion", "tools")),
    Kind(("input",), ("target",)),
)
"""The kinds of rows. A file is of the first kind whose needed fields no row lacks."""

FIELDS = tuple(dict.fromkeys(name for kind in KINDS for name in (*kind.needed, *kind.optional)))


@dataclass(frozen=True)
class Row:
    """One row: the fields of its file's kind that are not null, and where it stands, for messages.

    Fields are ``text``; ``input`` and perhaps ``target``; ``prompt`` and ``completion`` (perhaps empty), both text;
    ``messages`` and perhaps ``tools``; or ``input_ids`` and ``labels`` (perhaps empty), both without padding, and
    ``repeated`` where the labels are the inputs or -100 one by one.
    """

    fields: Mapping[str, Any]
    place: str


def read_rows(file: Path, elsewhere: Sequence[str] = ()) -> list[Row]:
    """Rows of a calibration file, all of one kind of ``KINDS``, every value checked; what is not read is said.

    Args:
        elsewhere: fields that the caller reads itself.

    Raises:
        ValueError: missing, unreadable, of another format, without rows; a row without the fields of the file's kind, or
            with a value that is not what the field holds. Names the file, the row and the field.
    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{file}: calibration is {HELP}")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        if suffix == ".txt":
            return _checked(
                [({"text": text}, f"{file}: line {number}") for number, text in lines(file)], file, elsewhere
            )
        if suffix == ".jsonl":
            return _checked([(row, f"{file}: line {number}") for number, row in json_lines(file)], file, elsewhere)
        return _checked(_parquet(file), file, elsewhere)
    except OSError as error:
        raise ValueError(f"{file}: not readable as {suffix[1:]} ({' '.join(str(error).split())})") from error


def rows_of(records: Iterable[Mapping[Any, Any]], where: str) -> list[Row]:
    """Rows that are in memory already, checked like those of a file; ``where`` names where they come from."""
    return _checked([(record, f"{where}: row {number}") for number, record in enumerate(records, 1)], where)


def _parquet(file: Path) -> list[tuple[dict[str, Any], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            twice = next((name for name in FIELDS if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"there are two columns {twice!r}")
            wanted = [name for name in names if name in FIELDS]
            # A column that nobody asked for is not read, but may have to be named.
            rest = dict.fromkeys(name for name in names if name not in FIELDS)
            rows = opened.read(columns=wanted).to_pylist() if wanted else [{}] * opened.metadata.num_rows
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: not readable as parquet ({' '.join(str(error).split())})") from error
    return [({**rest, **row}, f"{file}: row {number}") for number, row in enumerate(rows, 1)]


# -- the kind of a file ------------------------------------------------------------------------------------------
def _checked(
    records: Sequence[tuple[Mapping[str, Any], str]], where: object, elsewhere: Sequence[str] = ()
) -> list[Row]:
    if not records:
        raise ValueError(f"{where}: there are no rows in it; calibration is {HELP}")
    kind = _kind_of_all(records)
    used = (*kind.needed, *kind.optional)
    made = []
    for record, place in records:
        found = {name: value for name in used if (value := record.get(name)) is not None}
        missing = [name for name in kind.needed if name not in found]
        if missing:
            raise ValueError(
                f"{place}: field {missing[0]!r} is {'null' if missing[0] in record else 'missing'} (there are "
                f"{_names(record)}); correct the row or leave it out. All rows of a file have the same of these: {HELP}"
            )
        fields = {name: _CHECKS[name](value, f"{place}: field {name!r}") for name, value in found.items()}
        made.append(Row(_together(fields, place), place))
    unread = {name for record, _ in records for name in record if record[name] is not None or name not in FIELDS}
    if unread := unread - set(used) - set(elsewhere):
        log.info("%s: read are %s; not read are %s", where, _names(used), _names(unread))
    return made


def _kind_of_all(records: Sequence[tuple[Mapping[str, Any], str]]) -> Kind:
    """The first kind that all rows are of; where there is none, that of the first row that has one."""

    def of(record: Mapping[str, Any], kind: Kind) -> bool:
        return all(record.get(name) is not None for name in kind.needed)

    for kind in KINDS:
        if all(of(record, kind) for record, _ in records):
            return kind
    for record, _ in records:
        for kind in KINDS:
            if of(record, kind):
                return kind
    record, place = records[0]
    null = ", all null" if set(record) & set(FIELDS) else ""
    raise ValueError(f"{place}: has {_names(record)}{null}; calibration is {HELP}")


def _names(names: Iterable[str]) -> str:
    shown = sorted(map(repr, names))
    return ", ".join(shown[:8] + (["..."] if len(shown) > 8 else [])) or "no fields"


# -- values ------------------------------------------------------------------------------------------------------
def _ids(value: Any, where: str, least: int = 0) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {kind_of(value)}, not a list of token ids; correct the row or leave it out")
    for place, token in enumerate(value):
        if type(token) is not int:
            raise ValueError(
                f"{where} has {kind_of(token)} at {place}, not a token id; correct the row or leave it out"
            )
        if token < least:
            raise ValueError(f"{where} has {token} at {place}, which is no token id; correct the row or leave it out")
    return list(value)


def _labels(value: Any, where: str) -> list[int]:
    found = _ids(value, where, IGNORED)
    wrong = next((token for token in found if IGNORED < token < 0), None)
    if wrong is not None:
        raise ValueError(f"{where} has {wrong}, which is no token id; correct the row or leave it out")
    return found


def _mask(value: Any, where: str) -> list[int]:
    found = _ids(
        [int(one) if isinstance(one, bool) else one for one in value] if isinstance(value, list) else value, where
    )
    if set(found) - {0, 1}:
        raise ValueError(f"{where} has {max(found)}; it is a list of 0 and 1")
    return found


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages as a chat template takes them; fields that are null are left out, as tables fill them in, but content."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {kind_of(value)}, not a list of messages; correct the row or leave it out")
    made = []
    for place, message in enumerate(value):
        here = f"{where}, message {place + 1}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{here} is {kind_of(message)}, not an object with role and content; correct the row")
        check_text(message.get("role"), f"{here}: role")
        if isinstance(message.get("content"), str):
            check_text(message["content"], f"{here}: content")
        elif message.get("content") is None:
            if not message.get("tool_calls"):
                raise ValueError(f"{here}: content is {'null' if 'content' in message else 'missing'}; correct the row")
        elif not isinstance(message["content"], (list, tuple)):
            raise ValueError(f"{here}: content is {kind_of(message['content'])}, not text; correct the row")
        made.append({name: one for name, one in message.items() if one is not None or name == "content"})
    return made


def _tools(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):  # tables have no column for what differs by row, so it is written as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is text that is no JSON list of tools; correct the row") from error
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f"{where} is {kind_of(value)}, not a list of tools; correct the row or leave it out")
    return list(value)


def _words(value: Any, where: str) -> str | list[dict[str, Any]]:
    return _messages(value, where) if isinstance(value, (list, tuple)) else check_text(value, where)


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "text": check_text,
    "input": check_text,
    "target": check_text,
    "prompt": _words,
    "completion": _words,
    "messages": _messages,
    "tools": _tools,
    "input_ids": _ids,
    "labels": _labels,
    "attention_mask": _mask,
}


def _together(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """What the fields of one row say together: a mask takes padding away, two halves of a conversation are one."""
    if "input_ids" in fields:
        return _unpadded(fields, place)
    if "prompt" in fields:
        prompt, completion = fields["prompt"], fields.get("completion", [])
        if isinstance(prompt, list):
            if isinstance(completion, str):
                raise ValueError(
                    f"{place}: field 'prompt' is a list of messages and field 'completion' is text; use one form"
                )
            tools = {"tools": fields["tools"]} if "tools" in fields else {}
            return {"messages": [*prompt, *completion], **tools}
        if isinstance(completion, list) and completion:
            raise ValueError(
                f"{place}: field 'prompt' is text and field 'completion' is a list of messages; use one form"
            )
        return {"prompt": prompt, "completion": completion or ""}
    return fields


def _unpadded(fields: dict[str, Any], place: str) -> dict[str, Any]:
    ids, labels, mask = fields["input_ids"], fields.get("labels", []), fields.get("attention_mask")
    aligned = len(labels) == len(ids) and all(
        label in (IGNORED, token) for label, token in zip(labels, ids, strict=True)
    )
    if mask is not None:
        if len(mask) != len(ids):
            raise ValueError(f"{place}: field 'attention_mask' has {len(mask)} entries, field 'input_ids' {len(ids)}")
        ids = [token for token, real in zip(ids, mask, strict=True) if real]
    while labels and labels[-1] == IGNORED:
        labels = labels[:-1]
    made = {"input_ids": ids, "labels": labels}
    # Labels of a decoder-only model repeat its inputs, or hide some: they are no text of their own there.
    return made | {"repeated": True} if aligned else made
