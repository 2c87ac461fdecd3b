"""What fuzz tests share: seeded odd values and damage, and how an input has to end: read, or refused in one line."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LONG = bool(os.environ.get("MCSMOE_FUZZ"))
"""Whether the long part was asked for."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 10**30, 2**31, 1.5, -0.0, math.nan, math.inf, 1e308),
    *("", " ", "a", "\x00", "\u2028", "\ufeff", "\ud83d", "-1", "None", "nan", "{{ x }}", "{% for %}", "%s", "../x"),
    *([], [[]], [None], ["a", 1], [1.5], [True], [[1]], [-1], [10**30], list(range(50))),
    *({}, {"a": 1}, {"role": "user"}, [{"role": "user", "content": None}], {"": {}}),
)
"""Values that are no good in most places."""


def rounds(fast: int, long: int) -> range:
    """Seeds: ``fast`` of them in the normal tests, ``long`` where the long part was asked for."""
    return range(long if LONG else fast)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one thing wrong: cut, changed, put in, left out, doubled, or another encoding."""
    if not data:
        return bytes([rng.randrange(256)])
    place, other = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    noise = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[:place],
        lambda: data[:place] + noise + data[place:],
        lambda: data[:place] + noise + data[place + len(noise) :],
        lambda: data[:place] + data[other:],
        lambda: data + data,
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.replace(b"\n", rng.choice((b"\r\n", b"\n\n", b"\r", b"\xe2\x80\xa8", b"\x0c"))),
        lambda: data.decode("latin-1").encode("utf-16"),
        lambda: data[place:other] * 3 + data,
        lambda: b"\x00" * len(data),
        lambda: b"",
    )
    return rng.choice(ways)()


def outcome(read: Callable[[], T], named: str) -> T | None:
    """What ``read`` gives, or None where it refuses as a command does with exit status 1: in one line that names ``named``.

    Any other exception passes: a command would end with a traceback.
    """
    try:
        return read()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        message = str(error)
        assert message, "refused without a message"
        assert "\n" not in message, message
        assert len(message) < 3000, f"{len(message)} characters: {message[:300]}"
        assert named in message, f"{named} is not named: {message}"
        return None
