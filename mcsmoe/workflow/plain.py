"""A configuration as plain values, before any schema looks at it: what no file of settings can rightly hold is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_DEEPEST = 12  # levels; the schema has five
_LARGEST = 2**63


def plain(value: Any, place: str = "") -> Any:
    """A copy of ``value`` that consists of mappings with text keys, lists, text, numbers, true, false and null.

    Raises:
        ValueError: a number that is not finite or larger than any setting, text with control characters, a date or
            whatever else YAML can make; names the field, the value and the remedy.
    """
    return _plain(value, place, 0)


def _plain(value: Any, place: str, depth: int) -> Any:
    where = place or "the configuration"
    if depth > _DEEPEST:
        raise ValueError(f"{where} is nested deeper than any setting; correct it")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= _LARGEST:
            raise ValueError(
                f"{where} is a number of {value.bit_length()} bits, larger than any setting; give a smaller one"
            )
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; it must be a finite number")
        return float(value)
    if isinstance(value, str):
        _check_text(value, where)
        return str(value)
    if isinstance(value, Mapping):
        made = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}, which is not text; write it in quotes")
            _check_text(key, f"a key of {where}")
            made[str(key)] = _plain(inner, f"{place}.{key}" if place else key, depth + 1)
        return made
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{number}]", depth + 1) for number, inner in enumerate(value)]
    kind = type(value).__name__
    raise ValueError(f"{where} is {str(value)[:60]!r}, a {kind}, which no setting is; write text in quotes")


def _check_text(text: str, where: str) -> None:
    # Not is_printable: that refuses spaces other than the common one.
    bad = next(
        (letter for letter in text if ord(letter) < 32 or 127 <= ord(letter) < 160 or 0xD800 <= ord(letter) < 0xE000),
        None,
    )
    if bad is not None:
        raise ValueError(
            f"{where} is {text[:60]!r}, which holds the character {bad!r}; leave control characters and line breaks out"
        )
