"""The configuration of a result: the source's own file, and in it only what truly changed.

A library that rewrites a configuration renames fields and drops what it does not know; other readers (serving engines,
converters, older versions) need the fields as they were.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mcsmoe.adapters.counts import EXPERT_FIELDS
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.auto import MODEL_TYPE
from mcsmoe.checkpoint.vetting import OWN_METHOD

_DTYPES = ("dtype", "torch_dtype")
# What the library notes about itself, and what is no property of the model.
_NOTES = ("transformers_version", "architectures", "_name_or_path", "model_type", *_DTYPES)
GENERATION = "generation_config.json"


def source_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json as the base model's own would be, whether the file is stock or compact."""
    fields = {name: value for name, value in config.items() if name != compact.SECTION}
    section = config.get(compact.SECTION)
    if isinstance(section, Mapping) and fields.get("model_type") == MODEL_TYPE:
        fields["model_type"] = section.get("base_model_type")
    quantised = fields.get("quantization_config")
    if isinstance(quantised, Mapping) and quantised.get("quant_method") == OWN_METHOD:
        del fields["quantization_config"]
    return fields


def written(config: Any) -> dict[str, Any]:
    """What the library would write of its ``config``, for comparison before and after a change."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def updated(
    source: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """``source`` with the fields in which ``after`` differs from ``before``, under the names that ``source`` has for them.

    Args:
        source: fields of the file that was read.
        before: ``written(config)`` as it was read.
        after: the same now.
        config: the configuration, which knows other names of its fields.
    """
    made = dict(source)
    other_names: dict[str, str] = dict(getattr(config, "attribute_map", {}) or {})
    for name in before.keys() | after.keys():
        if name in _NOTES or before.get(name) == after.get(name):
            continue
        value = after.get(name)
        aliases = [one for one, two in other_names.items() if two == name]
        aliases += [other_names[name]] if name in other_names else []
        named = [one for one in (name, *aliases) if one in source] or [name]
        for one in named:
            inside = source.get(one)
            if isinstance(inside, Mapping) and isinstance(value, Mapping) and isinstance(before.get(name), Mapping):
                made[one] = updated(inside, before[name], value, getattr(config, name, None))
            elif name not in after:
                made.pop(one, None)
            else:
                made[one] = value
    return made


def nested(fields: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every entry of the given names, at any depth, with the path to it."""
    wanted = set(names)
    for name, value in fields.items():
        if name in wanted and value is not None:
            yield (name,), value
        elif isinstance(value, Mapping):
            yield from (((name, *path), inner) for path, inner in nested(value, wanted))


def experts_by_path(fields: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """What a configuration says about the number of experts, by path."""
    return dict(nested(fields, EXPERT_FIELDS))


# -- models in memory --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Origin:
    """What a model in memory was read from, and what the library made of it then."""

    source: dict[str, Any]
    before: dict[str, Any]
    generation: tuple[dict[str, Any], dict[str, Any]] | None  # the file's fields, and the library's reading of them


def remember(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Note the ``config`` that ``model`` was read with from ``folder``."""
    generation = None
    found = getattr(model, "generation_config", None)
    file = folder / GENERATION
    if found is not None and file.is_file():
        with contextlib.suppress(ValueError):
            generation = (json.loads(file.read_bytes()), found.to_dict())
    model.mcsmoe_origin = Origin(source_fields(config), written(model.config), generation)


def config_of(model: Any) -> dict[str, Any]:
    """The configuration to write for a model in memory: that of the file it was read from, if it was, with what changed."""
    origin: Origin | None = getattr(model, "mcsmoe_origin", None)
    dtype = main_dtype(model)
    if origin is None:
        fields: dict[str, Any] = json.loads(model.config.to_json_string())
        fields |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
        return with_dtype(fields, dtype)
    fields = updated(origin.source, origin.before, written(model.config), model.config)
    return with_dtype(fields, dtype)


def write_generation(model: Any, folder: Path) -> None:
    """Generation settings of a model in memory: the file's own where nothing changed since."""
    found, origin = getattr(model, "generation_config", None), getattr(model, "mcsmoe_origin", None)
    if found is None:
        return
    if origin is not None and origin.generation is not None:
        source, before = origin.generation
        write_json(folder / GENERATION, updated(source, before, found.to_dict(), None))
    else:
        found.save_pretrained(folder)


def main_dtype(model: nn.Module) -> torch.dtype:
    """The number format of most of the model's real numbers."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def with_dtype(fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``fields`` that say ``dtype`` wherever they say one."""
    word = str(dtype).removeprefix("torch.")
    return {
        name: word
        if name in _DTYPES and isinstance(value, str)
        else with_dtype(value, dtype)
        if isinstance(value, Mapping)
        else value
        for name, value in fields.items()
    }


def said_dtype(fields: Mapping[str, Any]) -> str | None:
    """``dtype`` or, by its older name, ``torch_dtype`` of a configuration, or of the text model in it."""
    for place in (fields, *(value for name, value in fields.items() if name in ("text_config", "thinker_config"))):
        if isinstance(place, Mapping):
            for name in _DTYPES:
                if isinstance(place.get(name), str):
                    return str(place[name]).removeprefix("torch.")
    return None


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """Fields in the order they have; infinities as they were read."""
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
