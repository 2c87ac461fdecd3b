"""Command-line options of the stages, made from the configuration's schema, so that each setting is described once."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mcsmoe.workflow.schema import section

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
_PYTHON: dict[str, Any] = {"integer": int, "number": float, "string": str}


def _reader(part: Mapping[str, Any]) -> Callable[[str], Any]:
    """A function from a word of the command line to a value that schema ``part`` allows."""
    kind = _kind(part)

    def read(text: str) -> Any:
        value = _PYTHON[kind](text)
        if kind == "string":
            return value
        low, above = part.get("minimum"), part.get("exclusiveMinimum")
        high, below = part.get("maximum"), part.get("exclusiveMaximum")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"is {text}; it must be a finite number")
        if (low is not None and value < low) or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(
                f"is {text}; it must be {f'at least {low}' if above is None else f'above {above}'}"
            )
        if (high is not None and value > high) or (below is not None and value >= below):
            raise argparse.ArgumentTypeError(
                f"is {text}; it must be {f'at most {high}' if below is None else f'below {below}'}"
            )
        return value

    read.__name__ = {"integer": "whole number", "number": "number", "string": "text"}[kind]
    return read


def _kind(part: Mapping[str, Any]) -> str:
    kind = part.get("type", "string")
    kinds = [kind] if isinstance(kind, str) else kind
    return next(name for name in kinds if name != "null")


def flag(key: str) -> str:
    """The option that is called as a key of the configuration."""
    return "--" + key.replace("_", "-")


def add_section(parser: argparse.ArgumentParser, name: str, only: Iterable[str] | None = None) -> None:
    """One option per key of section ``name`` of the configuration (or per key in ``only``)."""
    wanted = None if only is None else set(only)
    group = parser.add_argument_group(f"settings of {name!r} in the configuration")
    taken = {flag for action in parser._actions for flag in action.option_strings}
    for key, part in section(name).items():
        if flag(key) not in taken and (wanted is None or key in wanted):
            add_option(group, flag(key), key, part, part.get("default"))


def add_option(group: argparse._ActionsContainer, name: str, key: str, part: Mapping[str, Any], default: Any) -> None:
    """Option ``name`` for what schema ``part`` describes; its value is kept under ``key``."""
    options: dict[str, Any] = {
        "dest": key,
        "default": default,
        "help": part.get("description", "").replace("%", "%%"),
    }
    if "enum" in part:
        group.add_argument(name, choices=part["enum"], **options)
    elif _kind(part) == "boolean":
        group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
    elif _kind(part) == "array":
        group.add_argument(name, nargs="*", type=_reader(part["items"]), **options)
    elif _kind(part) != "object":
        group.add_argument(name, type=_reader(part), **options)


def settings(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """What was given for section ``name``, by key of the configuration."""
    return {key: getattr(arguments, key) for key in section(name) if hasattr(arguments, key)}


def record(kind: type[Record], arguments: argparse.Namespace, **others: Any) -> Record:
    """The settings record ``kind`` from the options that are called as its fields, and ``others``."""
    names = [field.name for field in fields(kind)]
    return kind(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)} | others)


def as_flags(values: Mapping[str, Any]) -> str:
    """``values`` as they are typed on a command line, quoted for a shell; a null leaves its option out.

    Raises:
        ValueError: a list with a value that would be read as an option; names the key and the value.
    """
    words: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag(key) if value else "--no-" + key.replace("_", "-"))
        elif isinstance(value, (list, tuple)):
            options = [text for text in map(str, value) if text.startswith("-")]
            if options:
                raise ValueError(f"{key} holds {options[0]!r}, which reads as an option; a path may begin with './'")
            if value:
                words += [flag(key), *map(str, value)]
        elif not isinstance(value, Mapping):
            # One word where the value begins as an option does.
            text = str(value)
            words += [f"{flag(key)}={text}"] if text.startswith("-") else [flag(key), text]
    return shlex.join(words)


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Where the tokens of a split are kept, for every stage that reads it."""
    parser.add_argument("--tokens", type=Path, help="folder that keeps tokens for other stages; none tokenises anew")


def add_training(parser: argparse.ArgumentParser, name: str) -> None:
    """What every stage that trains on a task reads and writes, and the settings of its section."""
    parser.add_argument("--model", type=Path, required=True, help="checkpoint to start from")
    parser.add_argument("--task", required=True, help="task name, or path of a task file")
    parser.add_argument("--train", type=Path, required=True, help="training examples")
    parser.add_argument("--selection", type=Path, required=True, help="examples to select the checkpoint on")
    parser.add_argument("--seed", type=int, default=0, help="of batches and dropout")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="written: checkpoint folder")
    parser.add_argument("--training", type=Path, required=True, help="written: training curve")
    parser.add_argument("--selected", type=Path, required=True, help="written: selection history")
    parser.add_argument("--state", type=Path, required=True, help="folder of the state to resume from")
    add_tokens(parser)
    add_section(parser, "data", only=("max_input", "max_label"))
    add_section(parser, "evaluate", only=("protocol",))
    add_section(parser, name)


def add_labels(parser: argparse.ArgumentParser) -> None:
    """What names a checkpoint in the tables of results."""
    parser.add_argument("--variant", required=True, help="method, for the table")
    parser.add_argument("--experts", type=int, default=0, help="experts kept per layer on average, for the table")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run, for the table")
    parser.add_argument("--stage", required=True, help="which checkpoint of the method, for the table")


def labels(arguments: argparse.Namespace, task: str) -> dict[str, Any]:
    """The columns that ``add_labels`` asked for."""
    return {"task": task, **{key: getattr(arguments, key) for key in ("variant", "experts", "seed", "stage")}}
