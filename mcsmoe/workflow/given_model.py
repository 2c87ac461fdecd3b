"""What the configuration of a given checkpoint says about its experts, read without any library of models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcsmoe.adapters.counts import EXPERT_FIELDS

_WIDTHS = ("hidden_size", "d_model", "n_embd")
_HIDDEN_WIDTHS = (
    "moe_intermediate_size",
    "intermediate_size",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "expert_ffn_hidden_size",
)
_LARGEST_FILE = 16_000_000  # bytes of a config.json
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def read_fields(field: str, checkpoint: str) -> dict[str, Any] | None:
    """Fields of ``config.json`` in a checkpoint folder; None for a name on the hub.

    Args:
        field: of our configuration, for messages.

    Raises:
        ValueError: no such folder, or one without a readable config.json; names it.
    """
    folder = Path(checkpoint)
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise ValueError(f"{field} is {checkpoint!r}, which cannot be looked at ({error.strerror})") from error
    if not is_folder:
        if not _HUB_NAME.fullmatch(checkpoint) or folder.exists():
            raise ValueError(f"{field} is {checkpoint!r}, and there is no such folder; correct the path")
        return None
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{field} is {checkpoint!r}, a folder without config.json; name a model's folder")
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{file.stat().st_size} bytes")
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{field}: {file} is not JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{field}: {file} holds no fields but {type(fields).__name__}; fetch the checkpoint again")
    # A vision-language model describes its language model apart.
    inner = fields.get("text_config")
    return {**fields, **inner} if isinstance(inner, dict) else fields


def num_experts(config: Mapping[str, Any]) -> int | None:
    """E of the configured model; None where only the hub knows.

    Raises:
        ValueError: the checkpoint folder is not one, or its model has no experts; names it.
    """
    checkpoint = config["model"]["checkpoint"]
    if checkpoint is None:
        return int(config["model"]["architecture"]["num_experts"])
    fields = read_fields("model.checkpoint", checkpoint)
    if fields is None:
        return None
    for name in EXPERT_FIELDS:
        if _whole(fields.get(name)) > 1:
            return int(fields[name])
    raise ValueError(
        f"model.checkpoint is {checkpoint!r}, a {fields.get('model_type', 'model')!r} without experts; "
        "name a Mixture-of-Experts checkpoint"
    )


def largest_rank(config: Mapping[str, Any]) -> int | None:
    """The shorter side of the experts' matrices, or more than that; None where the configuration does not tell."""
    if config["model"]["checkpoint"] is None:
        architecture = config["model"]["architecture"]
        return int(min(architecture["d_model"], architecture["d_ff"]))
    fields = read_fields("model.checkpoint", config["model"]["checkpoint"]) or {}
    widths = [max((_whole(fields.get(name)) for name in names), default=0) for names in (_WIDTHS, _HIDDEN_WIDTHS)]
    return min(widths) or None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
