"""The section ``mcsmoe`` of a compact checkpoint's config.json: what it says, how it is made and checked.

Needs neither model classes nor weights, so a tool can inspect a checkpoint at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcsmoe.checkpoint.auto import MODEL_TYPE
from mcsmoe.types import CompressionSpec, LayerId, LayerSpec

SECTION, FORMAT_VERSION = "mcsmoe", 1
STRUCTURE_KEY = "mcsmoe_structure"
"""Metadata entry of every weight file: the digest of the structure it was written for."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        ValueError: there is none, or it is not JSON; names it.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no config.json, so this is not a checkpoint folder") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a model configuration")
    return config


def is_compact(path: str | Path) -> bool:
    """Whether ``path`` is a folder with a compact checkpoint."""
    return (Path(path) / "config.json").is_file() and SECTION in read_config(path)


def _layer_json(spec: LayerSpec) -> dict[str, Any]:
    compression = spec.compression
    fewer = {} if spec.num_experts is None else {"num_experts": spec.num_experts, "merged": spec.merged}
    return fewer | {
        "num_groups": spec.num_groups,
        "expert_to_group": list(spec.expert_to_group),
        "compression": None
        if compression is None
        else {
            "rank": compression.rank,
            "kept_rows": {name: list(rows) for name, rows in compression.kept_rows.items()},
        },
    }


def _structure_digest(section: Mapping[str, Any]) -> str:
    parts = {key: section[key] for key in ("format_version", "base_model_type", "layers")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_section(
    base_model_type: str, specs: Mapping[LayerId, LayerSpec], provenance: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The section without the digests of the weight files, which are added once written."""
    return {
        "format_version": FORMAT_VERSION,
        "base_model_type": base_model_type,
        "layers": {layer: _layer_json(spec) for layer, spec in specs.items()},
        "provenance": dict(provenance or {}),
    }


def metadata(section: Mapping[str, Any]) -> dict[str, str]:
    """What every weight file says about the structure it belongs to, so that config and weights cannot be mixed."""
    return {STRUCTURE_KEY: _structure_digest(section)}


def write_config(
    folder: Path, config: Mapping[str, Any], section: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """config.json of a compact checkpoint: the base model's own, our model type, and the finished section."""
    whole = {**config, "model_type": MODEL_TYPE, SECTION: {**section, "files": dict(digests)}}
    (folder / "config.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def read_section(folder: str | Path) -> dict[str, Any]:
    """The section of a compact checkpoint.

    Raises:
        ValueError: not a compact checkpoint, written by a newer version, or incomplete; names the file.
    """
    file = Path(folder) / "config.json"
    section = read_config(folder).get(SECTION)
    if not isinstance(section, dict):
        raise ValueError(f"{file}: has no section {SECTION!r}, so this is not a compact checkpoint")
    if section.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format version {section.get('format_version')} is not {FORMAT_VERSION}; upgrade mcsmoe"
        )
    missing = {"base_model_type", "layers", "files"} - set(section)
    if missing:
        raise ValueError(f"{file}: section {SECTION!r} lacks {sorted(missing)}")
    return section


def check_structure(file: Path, found: Mapping[str, str], section: Mapping[str, Any]) -> None:
    """Raise ValueError naming ``file`` unless it was written for this section's structure."""
    if found.get(STRUCTURE_KEY) != _structure_digest(section):
        raise ValueError(
            f"{file}: was not written for the layers that config.json beside it describes; one of the two files is "
            "altered or comes from another checkpoint: restore or rebuild it"
        )


def layer_specs(path: str | Path) -> dict[LayerId, LayerSpec]:
    """Structure of every merged or compressed layer of a compact checkpoint; empty for a stock one.

    Raises:
        ValueError: the folder has no readable configuration; names it.
    """
    if SECTION not in read_config(path):
        return {}
    specs: dict[LayerId, LayerSpec] = {}
    for layer, entry in read_section(path)["layers"].items():
        try:
            kept = entry["compression"]
            compression = None if kept is None else CompressionSpec(int(kept["rank"]), dict(kept["kept_rows"]))
            fewer = {"num_experts": int(entry["num_experts"])} if "num_experts" in entry else {}
            specs[layer] = LayerSpec(
                int(entry["num_groups"]),
                list(entry["expert_to_group"]),
                compression,
                merged=bool(entry.get("merged", True)),
                **fewer,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(path) / 'config.json'}: layer {layer!r} is not described completely") from error
    return specs
