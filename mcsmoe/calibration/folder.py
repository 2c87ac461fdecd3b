"""A folder of statistics: one file a sparse layer, every domain apart, and a page that says what they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorFile, read_sealed, write_sealed
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.halves import Halves
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import LayerId

DESCRIPTION = "statistics.json"
VERSION = 1
_HALVES, _LAYER = "@halves", "@layer"
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["layers", "domains", "settings"],
    "properties": {
        "model": {"type": "string"},
        "layers": {
            "type": "object",
            "minProperties": 1,
            # A name of a file, so that no path leads out of the folder.
            "additionalProperties": {"type": "string", "pattern": r"^layer-[0-9]+\.safetensors$"},
        },
        "domains": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                "type": "object",
                "required": ["weight"],
                "properties": {
                    "weight": {"type": ["number", "null"], "minimum": 0, "maximum": 1e12},
                    "rows": _COUNT,
                    "tokens": _COUNT,
                },
            },
        },
        "settings": {
            "type": "object",
            "required": ["reservoir", "seed"],
            "properties": {"reservoir": _COUNT, "seed": _COUNT},
        },
    },
}
"""What ``statistics.json`` must hold; whatever else it says is for people."""


def layer_file(number: int) -> str:
    """Name of the file of sparse layer ``number``."""
    return f"layer-{number:05d}.safetensors"


def write_layer(
    path: Path, layer: LayerId, domains: Mapping[str, LayerStatistics], halves: Halves | None = None
) -> None:
    """Write the statistics of one layer atomically, with their digest."""
    tensors: dict[str, Tensor] = {}
    for domain, statistics in domains.items():
        tensors |= {f"{domain}/{name}": tensor for name, tensor in statistics.tensors().items()}
    if halves is not None:
        tensors |= {f"{_HALVES}/{name}": tensor for name, tensor in vars(halves).items()}
    # Not among the metadata, which the library writes in no certain order: the same statistics are the same bytes.
    tensors[_LAYER] = torch.tensor(list(layer.encode()), dtype=torch.uint8)
    write_sealed(path, tensors)


def read_layer(path: Path, layer: LayerId) -> dict[str, LayerStatistics]:
    """Statistics of one layer, by domain.

    Raises:
        ValueError: missing, altered since it was written, or of another layer; names file, layer and field.
    """
    tensors, _ = read_sealed(path)
    found = bytes(tensors.pop(_LAYER, torch.empty(0, dtype=torch.uint8)).tolist()).decode(errors="replace")
    if found != layer:
        raise ValueError(f"{path}: holds layer {found!r}, not {layer!r}; collect the statistics again")
    by_domain: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        domain, _, field = name.partition("/")
        if domain != _HALVES:
            by_domain.setdefault(domain, {})[field] = tensor
    try:
        return {domain: LayerStatistics.from_tensors(layer, fields) for domain, fields in by_domain.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class FolderLayers(Mapping[LayerId, LayerStatistics]):
    """The layers of a folder, each read when it is asked for; the one asked for last stays."""

    def __init__(self, folder: Path, files: Mapping[LayerId, str], weights: Mapping[str, float] | None) -> None:
        self.folder, self.files, self.weights = folder, dict(files), weights
        self._last: tuple[LayerId, LayerStatistics] | None = None

    def __getitem__(self, layer: LayerId) -> LayerStatistics:
        if self._last is None or self._last[0] != layer:
            self._last = (layer, blend(self.by_domain(layer), self.weights))
        return self._last[1]

    def by_domain(self, layer: LayerId) -> dict[str, LayerStatistics]:
        """Statistics of one layer, by domain."""
        return read_layer(self.folder / self.files[layer], layer)

    def num_experts(self, layer: LayerId) -> int | None:
        """How many experts the statistics of one layer are of, by the head of its file; None where it does not say."""
        tensors = TensorFile(self.folder / self.files[layer]).tensors
        return next(
            (info.shape[0] for name, info in tensors.items() if name.endswith("/wanted_E") and info.shape), None
        )

    def __iter__(self) -> Iterator[LayerId]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def is_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder of statistics."""
    return (Path(path) / DESCRIPTION).is_file()


def read_description(folder: str | Path) -> dict[str, Any]:
    """What a folder of statistics holds.

    Raises:
        ValueError: it is none, or of another version; names it.
    """
    path = Path(folder) / DESCRIPTION
    try:
        found: dict[str, Any] = json.loads(path.read_text(), parse_constant=_no_number)
        version = found["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no folder of statistics ({error}); collect them with mcsmoe collect") from error
    if version != VERSION:
        raise ValueError(f"{path}: version {version!r} of statistics; this program reads {VERSION}, collect them again")
    _check(path, found)
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _check(path: Path, found: Mapping[str, Any]) -> None:
    # Not at the top: a merge on statistics that it takes itself has no use for it.
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(_SCHEMA).iter_errors(found))
    if error is not None:
        place = ".".join(map(str, error.absolute_path)) or "the file"
        raise ValueError(
            f"{path}: {place}: {' '.join(error.message.split())}; restore the file, or collect the statistics again"
        )


def open_statistics(folder: str | Path, weights: Mapping[str, float] | None = None) -> RoutingStatistics:
    """The statistics of a folder as those of one mixture, layers read as they are asked for.

    Args:
        weights: share of the tokens by domain; those it was collected with if None.

    Raises:
        ValueError: no such folder, or weights that do not fit its domains.
    """
    described = read_description(folder)
    if weights is None:
        named = {name: domain["weight"] for name, domain in described["domains"].items()}
        weights = None if None in named.values() else named
    elif set(weights) != set(described["domains"]):
        raise ValueError(f"{folder}: weights for {sorted(weights)}; its domains are {sorted(described['domains'])}")
    if weights is not None and not any(weights.values()):
        raise ValueError(f"{folder}: all of its domains have weight 0; give one of them more")
    made = RoutingStatistics(described["settings"]["reservoir"], seed=described["settings"]["seed"])
    layers: Any = FolderLayers(Path(folder), described["layers"], weights)
    made.layers = layers
    return made


def tokens_of(inputs: Mapping[str, Tensor], encoder_decoder: bool) -> int:
    """Valid tokens of a batch, of encoder and decoder together."""
    mask = inputs.get("attention_mask")
    count = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
    if encoder_decoder and "labels" in inputs:
        count += int((inputs["labels"] != -100).sum())
    return count


def digest_of(batches: list[dict[str, Tensor]]) -> str:
    """SHA-256 over all tensors of all batches."""
    digest = hashlib.sha256()
    for inputs in batches:
        for name, tensor in sorted(inputs.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
