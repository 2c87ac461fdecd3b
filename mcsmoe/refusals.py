"""Which errors are about what a user gave: they are told in one line. All others are defects and show where they arose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Libraries that read files and say in errors of their own what is wrong with them.
_READERS = (
    "safetensors",
    "safetensors_rust",
    "_safetensors_rust",
    "jinja2",
    "pyarrow",
    "huggingface_hub",
    "tokenizers",
    "yaml",
)
_LONGEST = 2000  # characters
_POSITIVE = {"samples", "batch_size", "max_tokens", "reservoir", "rank", "capacity", "keep", "learning_rate", "threads"}
_POSITIVE |= {"cache_memory", "port"}
_LARGEST = {
    "seed": 2**31 - 1,
    "corpus_seed": 2**31 - 1,
    "threads": 4096,
    "keep": 1,
    "port": 65535,
    "cache_memory": 2**60,
}


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse numbers that no option can be, whatever the command.

    Raises:
        ValueError: not finite, negative, zero where something must be there, or beyond any use; names the option.
    """
    for key, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        name = f"--{key.replace('_', '-')}"
        least = "above 0" if key in _POSITIVE else "0 or more"
        most = _LARGEST.get(key, 10**9)
        if not math.isfinite(value) or value < 0 or (value == 0 and key in _POSITIVE):
            raise ValueError(f"{name} is {value}; it must be a number {least}")
        if value > most:
            raise ValueError(f"{name} is {value:.3g}; it must be at most {most}")


def one_line(text: str) -> str:
    """``text`` without line breaks, cut where it is very long."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _LONGEST else f"{joined[:_LONGEST]} ..."


def users_error(error: BaseException) -> str | None:
    """What to tell a user about ``error`` in one line; None where it is a defect of the program."""
    if isinstance(error, ValueError):
        return one_line(str(error)) or type(error).__name__
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None and error.strerror else ""
        return where + one_line(error.strerror or str(error) or type(error).__name__)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory ({one_line(str(error)) or 'no more is known'}); use a smaller batch or model"
    if isinstance(error, RecursionError):
        return "a file that was read is nested too deeply; correct it"
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if kinds & set(_READERS):
        return (
            f"a file that was read is not as it should be ({type(error).__name__}: {one_line(str(error))}); correct it"
        )
    return None
