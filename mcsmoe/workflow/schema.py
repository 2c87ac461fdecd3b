"""The schema of the configuration, read once: types, ranges, defaults and descriptions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA_FILE = Path(__file__).resolve().parent / "config.schema.yaml"


@cache
def schema() -> dict[str, Any]:
    """The schema with shared definitions written out in every section that uses them."""
    import yaml

    # Every job reads it: the loader in C, where there is one, takes a tenth of the time.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    raw = yaml.load(SCHEMA_FILE.read_text(), loader)
    return _flat(raw, raw["$defs"])


def _flat(node: dict[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(node)
    parts = [made.pop("$ref")] if "$ref" in made else []
    parts += [part["$ref"] for part in made.pop("allOf", [])]
    for reference in parts:
        shared = _flat(definitions[reference.rpartition("/")[2]], definitions)
        own = made.get("properties", {})
        made = {**shared, **made, "properties": {**shared["properties"], **own}}
    if isinstance(made.get("properties"), dict):
        made["properties"] = {name: _flat(part, definitions) for name, part in made["properties"].items()}
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = _flat(made["additionalProperties"], definitions)
    return made


def section(name: str) -> dict[str, dict[str, Any]]:
    """Properties of one section of the configuration, by key: type, default, description."""
    found: dict[str, dict[str, Any]] = schema()["properties"][name]["properties"]
    return found


def method() -> dict[str, dict[str, Any]]:
    """Settings of a method, by key: type, description."""
    found: dict[str, dict[str, Any]] = schema()["properties"]["methods"]["additionalProperties"]["properties"]
    return found


def fill(value: Any, part: Mapping[str, Any]) -> Any:
    """``value`` with the defaults of schema ``part`` for the keys it lacks, and 2.0 as 2 where a whole number is meant."""
    kinds = part.get("type", ())
    if isinstance(value, float) and "integer" in ([kinds] if isinstance(kinds, str) else kinds):
        return int(value)
    if isinstance(value, list) and "items" in part:
        return [fill(inner, part["items"]) for inner in value]
    if not isinstance(value, dict) or "properties" not in part:
        return value
    filled = dict(value)
    for key, inner in part["properties"].items():
        if key in filled:
            filled[key] = fill(filled[key], inner)
        elif "default" in inner:
            filled[key] = fill(copy.deepcopy(inner["default"]), inner)
    return filled
