"""Where a configuration says how many experts a layer has, and how many of them a token chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOICE_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "top_k",
)
_OTHER_TOWERS = ("vision", "audio", "talker", "speech")

Path = tuple[str, ...]


def expert_paths(fields: Mapping[str, Any], experts: int) -> list[Path]:
    """Keys, from the outermost inwards, of every entry of a configuration that says that a layer has ``experts`` experts.

    Parts of a configuration that are models of their own, such as a text model's, are looked through; towers for images
    and sound are not.
    """
    return [path for path, value in _entries(fields, EXPERT_FIELDS) if _says(value, experts)]


def set_experts(fields: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """A copy of a configuration's ``fields`` with ``after`` for ``before`` experts; unchanged if it does not say so."""
    made = copy.deepcopy(dict(fields))
    for path in expert_paths(fields, before):
        inside = made
        for key in path[:-1]:
            inside = inside[key]
        old = inside[path[-1]]
        inside[path[-1]] = [after] * len(old) if isinstance(old, list) else after
    return made


def set_experts_of(config: Any, before: int, after: int) -> None:
    """The same for a configuration object, in place."""
    for path in expert_paths(config.to_dict(), before):
        old = _read(config, path)
        _write(config, path, [after] * len(old) if isinstance(old, list) else after)


def stop_balance_loss_of(config: Any) -> list[str]:
    """Let a configuration object no longer ask for router logits, in place; the entries that did, as dotted names.

    A family that is asked for them computes a load-balancing loss, which puts the logits of all layers together and so
    needs as many experts in each.
    """
    paths = [path for path, value in _entries(config.to_dict(), ("output_router_logits",), lambda one: one is True)]
    for path in paths:
        _write(config, path, False)
    return [".".join(path) for path in paths]


def experts_said(config: Any) -> list[int]:
    """Every number of experts that a configuration, or its fields, names, in ascending order."""
    found: set[int] = set()
    for _, value in _entries(config if isinstance(config, Mapping) else config.to_dict(), EXPERT_FIELDS):
        found |= set(value) if isinstance(value, list) else {value}
    return sorted(found)


def choices_said(config: Any) -> int:
    """How many experts a token chooses, where the configuration says; else 1."""
    found = [value for _, value in _entries(config.to_dict(), CHOICE_FIELDS) if isinstance(value, int)]
    return max(found, default=1)


def _is_count(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(one, int) and not isinstance(one, bool) for one in listed)


def _entries(
    fields: Mapping[str, Any], names: tuple[str, ...], wanted: Callable[[Any], bool] = _is_count
) -> Iterator[tuple[Path, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            if not any(part in key for part in _OTHER_TOWERS):
                yield from (((key, *path), inner) for path, inner in _entries(value, names, wanted))
        elif key in names and wanted(value):
            yield (key,), value


def _read(config: Any, path: Path) -> Any:
    for key in path:
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    return config


def _write(config: Any, path: Path, value: Any) -> None:
    inside = _read(config, path[:-1])
    if isinstance(inside, dict):
        inside[path[-1]] = value
    else:
        setattr(inside, path[-1], value)


def _says(value: Any, experts: int) -> bool:
    return all(one == experts for one in value) if isinstance(value, list) else value == experts
