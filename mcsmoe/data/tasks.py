"""Tasks as data: a YAML file says which columns a data set has and how a row becomes a prompt, an answer and choices.

Adding a task is adding a file, to the folder ``tasks`` beside this module or anywhere else and given by its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mcsmoe.artefacts.names import TAKEN_BY_RESULTS, check_folder_name
from mcsmoe.data.columns import as_columns
from mcsmoe.data.lines import shown
from mcsmoe.data.task import LANGUAGE, Hub, Published, Task

__all__ = ["FOLDER", "METRICS", "PROTOCOLS", "Hub", "Published", "Task", "known_tasks", "load_task"]

FOLDER = Path(__file__).with_name("tasks")
PROTOCOLS = ("rank", "generate", LANGUAGE)
LANGUAGE_METRICS = ("nats", "nats_lost", "perplexity", "divergence", "agreement", "looping", "distinct_4grams")
METRICS = ("accuracy", "f1", "macro_f1", "f1a", "f1m", "exact_match", "token_f1", "hotpot_f1", *LANGUAGE_METRICS)
"""Names a task file may list; ``mcsmoe.evaluate.metrics`` computes them. The first one listed is the main metric."""

_REQUIRED = ("name", "description", "columns", "protocol", "metrics")
_OPTIONAL = (
    *("prompt", "text", "hub", "idx", "group", "choices", "label", "label_values", "references", "compat_prompt"),
    "published",
)
_TEXTS = ("name", "description", "prompt", "text", "protocol", "idx", "group", "label", "references", "compat_prompt")
_LONGEST = 1_000_000  # bytes of a task file
_HALF = re.compile(r"\\(?:u|U0000)[dD][89a-fA-F][0-9a-fA-F]{2}")


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def known_tasks() -> list[str]:
    """Names of the tasks that come with the library."""
    return sorted((file.stem for file in FOLDER.glob("*.yaml")), key=str.lower)


def load_task(name_or_path: str | Path) -> Task:
    """A task that comes with the library, by name (case and hyphens do not matter), or one from a file of your own.

    Raises:
        ValueError: no such task or file, or a file that does not describe a task; names the field and the remedy.
    """
    text = str(name_or_path)
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ValueError(
                f"task file {text} does not exist; correct the path, or use one of {', '.join(known_tasks())}"
            )
        return _read(path)
    for file in FOLDER.glob("*.yaml"):
        if _key(file.stem) == _key(text):
            return _read(file)
    known = known_tasks()
    close = get_close_matches(_key(text), [_key(name) for name in known], n=1)
    hint = f"did you mean {next(name for name in known if _key(name) == close[0])!r}? " if close else ""
    raise ValueError(
        f"{text!r} is not a known task; {hint}Known tasks: {', '.join(known)}; or give the path of a task file"
    )


def _read(path: Path) -> Task:
    raw = _yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"task file {path} is {shown(raw)}, not a mapping of fields; see {FOLDER} for examples")
    where = f"task file {path}"
    unknown = sorted(set(map(str, raw)) - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise ValueError(
            f"{where}: {unknown[0]!r} is not a known field; known are {', '.join((*_REQUIRED, *_OPTIONAL))}"
        )
    missing = [field for field in _REQUIRED if raw.get(field) in (None, "", [], {})]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing; add it")
    for field in _TEXTS:
        if raw.get(field) is not None and not isinstance(raw[field], str):
            raise ValueError(f"{where}: {field} is {shown(raw[field])}, which is not text; write it in quotes")
    check_folder_name(f"{where}: name", raw["name"], TAKEN_BY_RESULTS)
    _one_of(raw["protocol"], PROTOCOLS, f"{where}: protocol")
    if not isinstance(raw["metrics"], list):
        raise ValueError(f"{where}: metrics is {shown(raw['metrics'])}, not a list; write the main metric first")
    for metric in raw["metrics"]:
        _one_of(metric, METRICS, f"{where}: metrics")
    as_columns(raw["columns"], where)
    texts: dict[str, Any] = {
        field: raw.get(field) for field in ("label", "references", "idx", "group", "compat_prompt", "text")
    }
    task = Task(
        name=raw["name"],
        description=raw["description"],
        columns=raw["columns"],
        prompt=raw.get("prompt") or "",
        protocol=raw["protocol"],
        metrics=tuple(raw["metrics"]),
        file=path,
        hub=_record(Hub, raw.get("hub"), f"{where}: hub", (str,)) if raw.get("hub") is not None else None,
        choices=_answers(raw.get("choices"), f"{where}: choices") or (),
        label_values=_answers(raw.get("label_values"), f"{where}: label_values", _is_bool(raw)),
        published=_record(Published, raw.get("published") or {}, f"{where}: published", (int, float)),
        **texts,
    )
    _check_answers(task, where)
    return task


def _is_bool(raw: Mapping[str, Any]) -> bool:
    return raw["columns"].get(raw.get("label")) == "bool"


def _check_answers(task: Task, where: str) -> None:
    """What the protocol needs is there, and templates use columns that are there."""
    if task.is_language != (task.text is not None):
        raise ValueError(
            f"{where}: protocol is {task.protocol!r} and text is {task.text!r}; a task of language, and no other, names the "
            "column of its text"
        )
    if task.is_language:
        _check_language(task, where)
        return
    if not task.prompt:
        raise ValueError(f"{where}: field 'prompt' is missing; add it")
    if set(task.metrics) & set(LANGUAGE_METRICS):
        raise ValueError(
            f"{where}: metrics names {sorted(set(task.metrics) & set(LANGUAGE_METRICS))[0]!r}, which is of tasks of "
            "language; set protocol: language, or use another"
        )
    if task.protocol == "rank":
        if not task.choices or task.label is None:
            raise ValueError(f"{where}: protocol is 'rank', which needs choices and label; add them")
        if task.label not in task.columns:
            raise ValueError(
                f"{where}: label is {task.label!r}, which is not among columns ({', '.join(task.columns)}); correct it"
            )
        if isinstance(task.choices, tuple) and len(set(task.choices)) < len(task.choices):
            raise ValueError(f"{where}: choices is {list(task.choices)}, which names one twice; make them differ")
        if isinstance(task.label_values, tuple):
            if len(set(task.label_values)) < len(task.label_values):
                raise ValueError(
                    f"{where}: label_values is {list(task.label_values)}, which names one twice; correct it"
                )
            if isinstance(task.choices, tuple) and len(task.choices) != len(task.label_values):
                raise ValueError(
                    f"{where}: choices has {len(task.choices)} entries and label_values {len(task.label_values)}; "
                    "give one value for each choice"
                )
    elif task.references is None:
        raise ValueError(f"{where}: protocol is 'generate', which needs references; add the expression")
    _ = task._templates


def _check_language(task: Task, where: str) -> None:
    if task.columns.get(str(task.text)) != "string":
        raise ValueError(f"{where}: text is {task.text!r}, which is not among columns as a string; correct it")
    for field in ("prompt", "choices", "label", "references", "compat_prompt"):
        if getattr(task, field):
            raise ValueError(f"{where}: {field} is given, and a task of language asks nothing; leave it out")
    other = [metric for metric in task.metrics if metric not in LANGUAGE_METRICS]
    if other:
        raise ValueError(
            f"{where}: metrics names {other[0]!r}, which scores answers; use those of {', '.join(LANGUAGE_METRICS)}"
        )
    _ = task._templates


def _answers(value: Any, where: str, booleans: bool = False) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and any(isinstance(item, bool) for item in value) and not booleans:
        raise ValueError(
            f"{where} is {shown(value)}: YAML reads yes, no, on and off as true and false; write it in quotes"
        )
    if isinstance(value, list) and all(isinstance(item, (str, int)) for item in value):
        return tuple(str(item) for item in value)
    raise ValueError(f"{where} is {shown(value)}, neither a list of texts nor an expression over columns; correct it")


def _one_of(value: Any, known: Iterable[str], where: str) -> None:
    if value not in known:
        raise ValueError(f"{where} is {shown(value)}; use one of {', '.join(known)}")


def _record(kind: Callable[..., Any], raw: Any, where: str, holds: tuple[type, ...]) -> Any:
    """A record of optional fields, each of one of the types ``holds``."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is {shown(raw)}, not a mapping of fields; correct it")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name, value in raw.items():
        if name not in known:
            raise ValueError(f"{where}.{shown(name)} is not a known field; known are {', '.join(known)}")
        if value is not None and (type(value) not in holds or (not isinstance(value, str) and not value > 0)):
            wanted = "a text" if str in holds else "a number above 0"
            raise ValueError(f"{where}.{name} is {shown(value)}, not {wanted}; correct it")
    try:
        return kind(**raw)
    except TypeError as error:
        raise ValueError(f"{where} is {shown(raw)}, with a field missing ({error}); add it") from error


# -- YAML --------------------------------------------------------------------------------------------------------
def _yaml(path: Path) -> Any:
    """What a YAML file holds; UTF-8, with or without a byte order mark.

    Raises:
        ValueError: unreadable, too large for a task, or a field that stands there twice; names the file.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a field that is given twice, of which the last would win without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in getattr(node, "value", [])]
            twice = next((name for name in names if names.count(name) > 1 and name != "<<"), None)
            if twice is not None:
                raise ValueError(f"field {shown(twice)} stands there twice")
            return super().construct_mapping(node, deep)

    try:
        if path.stat().st_size > _LONGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than {_LONGEST}")
        text = path.read_text(encoding="utf-8-sig")
        if half := _HALF.search(text):
            raise ValueError(f"{half[0]} stands for half a character, which is no text")
        return yaml.load(text, Loader)  # a SafeLoader
    except (OSError, ValueError, RecursionError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"task file {path} is not readable YAML ({' '.join(str(error).split())[:400]}); correct it"
        ) from error
