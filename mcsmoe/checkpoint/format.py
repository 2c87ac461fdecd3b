"""The section ``mcsmoe`` of a compact checkpoint's config.json: what it says, how it is made and checked.

Needs neither model classes nor weights, so a tool can inspect a checkpoint at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mcsmoe.artefacts.digests import regular_file
from mcsmoe.checkpoint.auto import MODEL_TYPE
from mcsmoe.types import CompressionSpec, LayerId, LayerSpec, NoviceSpec

SECTION, FORMAT_VERSION = "mcsmoe", 1
UNPLACED = "unplaced"
"""Entry of the section: names of tensors in the files that no module of the model has a place for."""
_LONGEST_CONFIG = 1 << 26
_FILE = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")
QUANTISATION = "quantization"
"""Entry of the section: the base model's ``quantization_config``, where some of the tensors are still quantised by it."""
_KINDS = {
    "base_model_type": str,
    "layers": dict,
    "files": dict,
    UNPLACED: list,
    "provenance": dict,
    QUANTISATION: dict,
}
STRUCTURE_KEY = "mcsmoe_structure"
"""Metadata entry of every weight file: the digest of the structure it was written for."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        ValueError: there is none, or it is not JSON; names it.
    """
    file = Path(folder) / "config.json"
    try:
        if regular_file(file).stat().st_size > _LONGEST_CONFIG:
            raise ValueError(f"longer than {_LONGEST_CONFIG} bytes")
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no config.json, so this is not a checkpoint folder") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a model configuration")
    return config


def is_compact(path: str | Path) -> bool:
    """Whether ``path`` is a folder with a compact checkpoint."""
    return (Path(path) / "config.json").is_file() and SECTION in read_config(path)


def _layer_json(spec: LayerSpec) -> dict[str, Any]:
    compression, novices = spec.compression, spec.novices
    # Left out where there are none: a layer without them is described as it always was.
    more: dict[str, Any] = {} if spec.num_experts is None else {"num_experts": spec.num_experts, "merged": spec.merged}
    if novices is not None:
        more["novices"] = {"count": novices.count, "rank": novices.rank}
    return more | {
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
    base_model_type: str,
    specs: Mapping[LayerId, LayerSpec],
    provenance: Mapping[str, Any] | None,
    unplaced: Iterable[str] = (),
    quantisation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The section without the digests of the weight files, which are added once written."""
    section = {
        "format_version": FORMAT_VERSION,
        "base_model_type": base_model_type,
        "layers": {layer: _layer_json(spec) for layer, spec in specs.items()},
        "provenance": dict(provenance or {}),
    }
    if quantisation is not None:
        section[QUANTISATION] = dict(quantisation)
    names = sorted(unplaced)
    return {**section, UNPLACED: names} if names else section


def metadata(section: Mapping[str, Any]) -> dict[str, str]:
    """What every weight file says about the structure it belongs to, so that config and weights cannot be mixed."""
    return {STRUCTURE_KEY: _structure_digest(section)}


def write_config(
    folder: Path, config: Mapping[str, Any], section: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """config.json of a compact checkpoint: the base model's own, our model type, and the finished section."""
    ours = json.loads(json.dumps({**section, "files": dict(digests)}, sort_keys=True))
    whole = {**config, "model_type": MODEL_TYPE, SECTION: ours}
    (folder / "config.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class CompactConfig:
    """config.json of a compact checkpoint, read and checked once; all who load, stream or show the checkpoint take this.

    Attributes:
        file: config.json, for messages.
        fields: all of it, the base model's fields and the section.
        base_model_type: what the base model's own config.json has as ``model_type``.
        files: SHA-256 of every weight file, by name.
        unplaced: names of tensors in the files that no module of the model has a place for.
        provenance: how it was made.
        structure: digest of what the section says of the layers; every weight file names it.
    """

    file: Path
    fields: Mapping[str, Any]
    base_model_type: str
    files: Mapping[str, str]
    unplaced: frozenset[str]
    provenance: Mapping[str, Any]
    structure: str

    @property
    def source_config(self) -> dict[str, Any]:
        """All fields, with what the section says of quantisation where the base model's configuration has it."""
        said = self.quantisation
        return dict(self.fields) if said is None else {**self.fields, "quantization_config": said}

    @property
    def quantisation(self) -> Mapping[str, Any] | None:
        """The base model's ``quantization_config``, where some of the tensors are still quantised by it."""
        found: Mapping[str, Any] | None = self.fields[SECTION].get(QUANTISATION)
        return found

    @classmethod
    def read(cls, folder: str | Path) -> CompactConfig:
        """Read the one in ``folder``; raises ValueError like ``read_config`` and ``of``."""
        return cls.of(folder, read_config(folder))

    @classmethod
    def of(cls, folder: str | Path, fields: Mapping[str, Any]) -> CompactConfig:
        """The same of a config.json that ``read_config`` read in ``folder``.

        Raises:
            ValueError: not a compact checkpoint, written by a newer version, or incomplete; names the file.
        """
        file, section = Path(folder) / "config.json", fields.get(SECTION)
        if not isinstance(section, dict):
            raise ValueError(f"{file}: has no section {SECTION!r}, so this is not a compact checkpoint")
        if section.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file}: format version {section.get('format_version')} is not {FORMAT_VERSION}; upgrade mcsmoe"
            )
        missing = {"base_model_type", "layers", "files"} - set(section)
        if missing:
            raise ValueError(f"{file}: section {SECTION!r} lacks {sorted(missing)}")
        for name, kind in _KINDS.items():
            if not isinstance(section.get(name, kind()), kind):
                raise ValueError(f"{file}: {name!r} in section {SECTION!r} is not a {kind.__name__}")
        for name in section["files"]:
            if not _FILE.fullmatch(name):
                raise ValueError(
                    f"{file}: section {SECTION!r} names the file {name!r}; only *.safetensors beside it are read"
                )
        return cls(
            file=file,
            fields=fields,
            base_model_type=section["base_model_type"],
            files=section["files"],
            unplaced=frozenset(map(str, section.get(UNPLACED, []))),
            provenance=section.get("provenance", {}),
            structure=_structure_digest(section),
        )

    @cached_property
    def layers(self) -> Mapping[LayerId, LayerSpec]:
        """Structure of every merged or compressed layer.

        Raises:
            ValueError: a layer is not described completely, or by numbers that contradict each other; names file and layer.
        """
        return {layer: self._layer(layer, entry) for layer, entry in self.fields[SECTION]["layers"].items()}

    def _layer(self, layer: LayerId, entry: Any) -> LayerSpec:
        try:
            kept = entry["compression"]
            compression = None if kept is None else CompressionSpec(int(kept["rank"]), dict(kept["kept_rows"]))
            found = entry.get("novices")
            fewer = {"num_experts": int(entry["num_experts"])} if "num_experts" in entry else {}
            spec = LayerSpec(
                int(entry["num_groups"]),
                list(entry["expert_to_group"]),
                compression,
                merged=bool(entry.get("merged", True)),
                novices=None if found is None else NoviceSpec(int(found["count"]), int(found["rank"])),
                **fewer,
            )
            _check_spec(spec)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.file}: layer {layer!r} is not described completely ({error})") from error
        return spec

    def check_structure(self, file: Path, found: Mapping[str, str]) -> None:
        """Raise ValueError naming ``file``, with metadata ``found``, unless it was written for this structure."""
        if found.get(STRUCTURE_KEY) != self.structure:
            raise ValueError(
                f"{file}: was not written for the layers that config.json beside it describes; one of the two files is "
                "altered or comes from another checkpoint: restore or rebuild it"
            )


def layer_specs(path: str | Path) -> Mapping[LayerId, LayerSpec]:
    """Structure of every merged or compressed layer of a checkpoint; empty for a stock one.

    Raises:
        ValueError: the folder has no readable configuration; names it.
    """
    fields = read_config(path)
    return CompactConfig.of(path, fields).layers if SECTION in fields else {}


def _check_spec(spec: LayerSpec) -> None:
    """Compare the numbers of a layer with each other, before anything of their size is made."""
    experts = len(spec.expert_to_group)
    if not 1 <= spec.num_groups <= experts:
        raise ValueError(f"{spec.num_groups} groups for {experts} experts")
    slots = spec.num_groups
    if spec.novices is not None:
        if not 1 <= spec.novices.count <= experts or spec.novices.rank < 0:
            raise ValueError(f"{spec.novices.count} novices of rank {spec.novices.rank} for {experts} experts")
        slots += spec.novices.count
    if any(type(group) is not int or not 0 <= group < slots for group in spec.expert_to_group):
        raise ValueError(f"expert_to_group names other groups than 0 to {slots - 1}")
    if spec.compression is None:
        return
    for name, rows in spec.compression.kept_rows.items():
        if len(rows) != spec.num_groups or any(type(count) is not int or count < 0 for count in rows):
            raise ValueError(f"kept_rows of {name!r} are not {spec.num_groups} numbers of rows")
    if spec.compression.rank < 0:
        raise ValueError(f"rank {spec.compression.rank}")
