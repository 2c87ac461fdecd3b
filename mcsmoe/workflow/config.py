"""The configuration: defaults filled in from the schema, every value checked before any work starts.

One message for the first thing that is wrong: it names the field, the value and the remedy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mcsmoe import methods
from mcsmoe.workflow import consistency
from mcsmoe.workflow.compared_methods import resolve
from mcsmoe.workflow.given_model import num_experts, read_fields
from mcsmoe.workflow.plain import plain
from mcsmoe.workflow.schema import fill, schema, section

_ROWS = ("train_rows", "validation_rows", "selection_rows")
SOURCES = ("packages", "texts", "characters")
"""Settings of the data that say which sources are texts."""


# -- messages ----------------------------------------------------------------------------------------------------
def _field(error: Any) -> str:
    path = ""
    for step in error.absolute_path:
        path += f"[{step}]" if isinstance(step, int) else (f".{step}" if path else str(step))
    return path or "the configuration"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _message(error: Any) -> str:
    field, value, rule = _field(error), error.instance, error.validator_value
    about = error.schema.get("description", "")
    about = f" ({about})" if about else ""
    kind = error.validator
    if kind == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(value) - set(known))[0]
        close = get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        place = f"{field}.{unknown}" if error.absolute_path else unknown
        return f"{place} is not a known key; {hint}Known keys here: {', '.join(known)}"
    if kind == "required":
        missing = sorted(set(rule) - set(value))[0]
        return f"{missing} is missing; add it to the configuration"
    if kind == "type":
        wanted = " or ".join(rule) if isinstance(rule, list) else rule
        hint = ""
        if isinstance(value, str) and "number" in wanted:
            hint = "; YAML reads 1e-4 as text, write 1.0e-4" if "e" in value.lower() else "; write it without quotes"
        return f"{field} is {json.dumps(value)}, which is not of type {wanted}{about}{hint}"
    if kind == "enum":
        return f"{field} is {json.dumps(value)}; use one of {', '.join(map(str, rule))}{about}"
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    if kind in bounds:
        return f"{field} is {value}; it must be {bounds[kind]} {rule}{about}"
    if kind == "minItems":
        return f"{field} is empty; list at least {rule}{about}"
    if kind in ("minLength", "maxLength"):
        return f"{field} is {_shown(value)}, which is {'empty' if not value else 'too long'}{about}; correct it"
    if kind == "pattern":
        return f"{field} is {_shown(value)}; {error.schema.get('x-remedy', 'correct it')}{about}"
    if kind == "uniqueItems":
        return f"{field} is {json.dumps(value)}, which names one twice; leave the second out"
    return f"{field}: {error.message}{about}"


def _expand(text: str) -> str:
    """Environment variables and ``~``, with ``${NAME:-default}`` for where one is not set."""
    import re

    def found(match: re.Match[str]) -> str:
        return os.environ.get(match[1]) or match[2]

    return os.path.expanduser(os.path.expandvars(re.sub(r"\$\{(\w+):-([^}]*)\}", found, text)))


def _path(field: str, text: str) -> str:
    """A path as it is used: variables expanded, and nothing in it that a pattern of paths or an option is made of.

    Raises:
        ValueError: names the field, the value and the remedy.
    """
    found = _expand(text)
    if not found or found.startswith("-") or any(letter in found for letter in "{}"):
        told = f" (from {text!r})" if found != text else ""
        raise ValueError(
            f"{field} is {_shown(found)}{told}; a path here is not empty, begins with no hyphen and has no braces: rename or "
            "link it"
        )
    return found


# -- checks that no schema can say -------------------------------------------------------------------------------
def _results(folder: str) -> None:
    """Refuse a folder of results that is no folder, or lies below what is none."""
    for place in (Path(folder), *Path(folder).parents):
        try:
            is_other = place.exists() and not place.is_dir()
        except OSError as error:
            raise ValueError(f"results is {_shown(folder)}, which cannot be looked at ({error.strerror})") from error
        if is_other:
            raise ValueError(f"results is {_shown(folder)}, but {str(place)!r} is not a folder; choose another name")


def _sources(config: dict[str, Any]) -> None:
    from mcsmoe.data import sources, tasks

    data = config["data"]
    if data["folder"] is not None:
        data["folder"] = _path("data.folder", data["folder"])
    data["texts"] = {name: _path(f"data.texts.{name}", file) for name, file in data["texts"].items()}
    if data["source"] == "files" and not data["folder"]:
        raise ValueError("data.folder is not set, but data.source is 'files'; name the folder that holds the tasks")
    for name in config["tasks"]:
        task = tasks.load_task(name)
        sources.check(source(config), task)
        rows = stage_settings(config, "data", name)
        if rows["train_rows"] is not None and rows["train_rows"] <= rows["selection_rows"]:
            raise ValueError(
                f"data.selection_rows is {rows['selection_rows']}, but data.train_rows only {rows['train_rows']}; "
                "set fewer rows aside"
            )
    pretrain = config["pretrain"]
    pretrain["files"] = [_path(f"pretrain.files[{i}]", file) for i, file in enumerate(pretrain["files"])]
    if config["model"]["checkpoint"] is None:
        if pretrain["corpus"] == "files" and not pretrain["files"]:
            raise ValueError("pretrain.files is empty, but pretrain.corpus is 'files'; list the files to read")
        if pretrain["corpus"] != "tasks":
            sources.check_corpus(corpus(config))


def source(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the tasks' rows come from, as ``mcsmoe.data.sources`` takes it."""
    data = config["data"]
    keys = {"train_rows": data["train_rows"], "validation_rows": data["validation_rows"]}
    made = {"kind": data["source"], **{key: value for key, value in keys.items() if value is not None}}
    if data["source"] == "sources":
        made |= {key: data[key] for key in SOURCES}
    return made | ({"folder": data["folder"]} if data["source"] == "files" else {})


def corpus(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the pre-training text comes from, as ``mcsmoe.data.sources`` takes it."""
    pretrain = config["pretrain"]
    if pretrain["corpus"] == "synthetic":
        return {"kind": "synthetic"}
    return {"kind": "files", "files": list(pretrain["files"]), "column": pretrain["column"]}


def _methods(config: Mapping[str, Any]) -> None:
    known = resolve(config)
    for name in config["variants"]:
        methods.require_known("variants", name, known)
    total = num_experts(config)
    consistency.check_groups(config, known, total)
    if any(known[name].fewer for name in config["variants"]) and not config["experts"]:
        raise ValueError("experts is empty, but variants that merge are configured; say how many experts to keep")
    given = config["model"]
    if any(known[name].dense for name in config["variants"]) and given["checkpoint"] and not given["dense_checkpoint"]:
        raise ValueError(
            f"variants names a dense model, and model.checkpoint is {given['checkpoint']!r}, from which none can be made; "
            "name the model to compare with in model.dense_checkpoint, or leave the variant out"
        )
    if given["checkpoint"] is None and given["architecture"]["family"] != consistency.SWITCH:
        _decoder_only(config, known)
    consistency.check(config, known)


def _decoder_only(config: Mapping[str, Any], known: Mapping[str, methods.Method]) -> None:
    family, taken = config["model"]["architecture"]["family"], config["model"]["architecture"]["experts_per_token"]
    for name in config["variants"]:
        if known[name].dense and not config["model"]["dense_checkpoint"]:
            raise ValueError(
                f"variants names {name!r}, and no dense model is built like one of family {family!r}; name one in "
                "model.dense_checkpoint, or leave the variant out"
            )
        method = known[name]
        drops = method.merge in methods.MERGES and methods.MERGES[str(method.merge)].drops
        drops = drops or method.merge == "ream" or (method.criterion is not None and method.dropped == "delete")
        fewest = min(config["experts"], default=taken)
        if drops and fewest < taken:
            raise ValueError(
                f"experts is {config['experts']}, but a token takes {taken} experts and {name} leaves no more than "
                f"{fewest} to choose from; keep at least {taken}"
            )


def _whole_per_task(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by task, with the types their sections have."""
    return {
        task: {
            stage: fill(settings, {"properties": {key: {"type": section(stage)[key].get("type")} for key in settings}})
            for stage, settings in changes.items()
        }
        for task, changes in given.items()
    }


def _per_task(config: Mapping[str, Any]) -> Iterator[str]:
    from jsonschema import Draft202012Validator

    for task, changes in config["per_task"].items():
        if task not in config["tasks"]:
            raise ValueError(f"per_task.{task} is not among tasks ({', '.join(config['tasks'])}); add or remove it")
        for stage, settings in changes.items():
            known = {key: rule for key, rule in section(stage).items() if stage != "data" or key in _ROWS}
            part = {"type": "object", "additionalProperties": False, "properties": known}
            for error in Draft202012Validator(part).iter_errors(settings):
                yield f"per_task.{task}.{stage}: {_message(error)}"


def complete(given: Mapping[str, Any], check_data: bool = True) -> dict[str, Any]:
    """``given`` with every default filled in.

    Args:
        check_data: also look at the data files and the checkpoint folder (headers only).

    Raises:
        ValueError: the first thing that is wrong; names the field, the value and the remedy.
    """
    from jsonschema import Draft202012Validator

    if not isinstance(given, Mapping):
        raise ValueError(f"the configuration is {given!r}, not a mapping of keys to values")
    values = plain(given)
    errors = sorted(Draft202012Validator(schema()).iter_errors(values), key=lambda error: list(map(str, error.path)))
    if errors:
        raise ValueError(_message(errors[0]))
    config: dict[str, Any] = fill(values, schema())
    for message in _per_task(config):
        raise ValueError(message)
    config["per_task"] = _whole_per_task(config["per_task"])
    config["results"] = os.path.normpath(config["results"])
    for key in ("checkpoint", "dense_checkpoint"):
        if config["model"][key] is not None:
            config["model"][key] = _path(f"model.{key}", config["model"][key])
            read_fields(f"model.{key}", config["model"][key])
    _methods(config)
    if check_data:
        _results(config["results"])
        _sources(config)
    return config


def stage_settings(config: Mapping[str, Any], stage: str, task: str | None = None) -> dict[str, Any]:
    """Settings of a stage, with the task's own in the place of the common ones."""
    settings = dict(config[stage])
    if task is not None:
        settings |= config["per_task"].get(task, {}).get(stage, {})
    return settings
