"""Tensors that a checkpoint holds and its model class has no place for: what becomes of them, and who is told.

Layers for multi-token prediction, a vision tower beside a text model, left-overs of training. They are kept as they
are where the result stays true, otherwise left out by a line that names them, with a configuration that does not
promise them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.console import log

_FURTHER = re.compile(r"^(.*\blayers\.(\d+))\.")
_MTP = re.compile(r"(?:^|\.)\w*(?:mtp|nextn)\w*(?:\.|$)")
_COUNTER = re.compile(r"^(?:num_)?(?:mtp|nextn)_(?:num_)?(?:\w+_)?layers$|^num_(?:mtp|nextn)_\w+$")
_EXPERT = re.compile(r"(?:^|[._])experts?(?:[._]|$)|\.gate\.(?:weight|bias|e_score_correction_bias)$")


def prefixes(names: Iterable[str]) -> dict[str, int]:
    """How many tensors stand below each prefix that says what they are: a layer, or the first part that is not ``model``."""
    counts: dict[str, int] = {}
    for name in names:
        further = _FURTHER.match(name)
        if further:
            prefix = further[1]
        else:
            parts = name.split(".")
            start = 1 if parts[0] in ("model", "transformer", "base_model", "module") and len(parts) > 2 else 0
            prefix = ".".join(parts[: start + 1])
        counts[prefix] = counts.get(prefix, 0) + 1
    return counts


def listed(names: Iterable[str]) -> str:
    """The prefixes in words, with how many tensors each has."""
    return ", ".join(
        f"{prefix}.* ({count})" if count > 1 else f"{prefix}*" for prefix, count in prefixes(names).items()
    )


def is_prediction(name: str, config: Any) -> bool:
    """Whether a tensor without a place belongs to multi-token prediction: named so, or of a layer beyond the last."""
    if _MTP.search(name):
        return True
    further = _FURTHER.match(name)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    last = getattr(text, "num_hidden_layers", None)
    return further is not None and isinstance(last, int) and int(further[2]) >= last


def kept(unplaced: Mapping[str, TensorInfo], experts_changed: bool, config: Any) -> dict[str, TensorInfo]:
    """What a result keeps. With another number of experts, layers with experts of their own no longer fit.

    All layers for multi-token prediction stay or go together, since one number counts them.
    """
    if not experts_changed:
        return dict(unplaced)
    going = {prefix for name in unplaced if _EXPERT.search(name) for prefix in prefixes([name])}
    if any(is_prediction(name, config) for name in unplaced if next(iter(prefixes([name]))) in going):
        going |= {prefix for name in unplaced if is_prediction(name, config) for prefix in prefixes([name])}
    return {name: info for name, info in unplaced.items() if next(iter(prefixes([name]))) not in going}


def without_prediction(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` of a configuration, at any depth, with every number of layers for multi-token prediction at 0."""
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            made[name] = without_prediction(value)
        else:
            counts = isinstance(value, int) and not isinstance(value, bool) and _COUNTER.search(name)
            made[name] = 0 if counts else value
    return made


def say_kept(folder: Path, names: Iterable[str], kind: str) -> None:
    if named := listed(names):
        log.info("%s: %s has no place for %s; kept as they are", folder, kind, named)


def say_left_out(folder: Path, names: Iterable[str], why: str) -> None:
    if named := listed(names):
        log.warning("%s: left out %s: %s", folder, named, why)
