"""What a checkpoint holds, from its headers alone: layers, experts, groups, ranks, numbers and bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcsmoe.adapters.counts import experts_said
from mcsmoe.artefacts.tensors import TensorFolder, TensorInfo
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.engines import notes
from mcsmoe.checkpoint.quantised.folder import Dequantised
from mcsmoe.checkpoint.vetting import dequantised

_EXPERTS = re.compile(r"^(.*)\.experts\.|^(.*\.block_sparse_moe)\.(?:input|output)_linear\.")
_NUMBER = re.compile(r"\.experts\.(?:expert_)?(\d+)\.")


def describe(folder: Path) -> dict[str, Any]:
    """Layers, groups, ranks and bytes of a checkpoint folder.

    Raises:
        ValueError: not a checkpoint folder, or a weight file that is truncated; names it.
    """
    config = compact.read_config(folder)
    found = compact.CompactConfig.of(folder, config) if compact.SECTION in config else None
    specs = {} if found is None else found.layers
    tensors = dequantised(folder, config if found is None else found.source_config)
    stored = tensors.stored.infos if isinstance(tensors, Dequantised) else tensors.infos
    infos = tensors.infos

    def size(names: Iterable[str]) -> dict[str, int]:
        """Numbers of the model, and the bytes that they take in the files."""
        given = {name: infos[name] for name in names}
        held = (stored[part].nbytes for name in given for part in tensors.parts(name))
        return {"parameters": _parameters(given), "bytes": sum(held)}

    # By the model's own structure where the library knows it: names of stored experts differ, and may hold two layers' at once.
    structure, untreated = _by_structure(folder, config, tensors) if found is None else ({}, None)
    inside: dict[str, dict[str, TensorInfo]] = {}
    for layer, (_, _, names) in structure.items():
        inside[layer] = {name: infos[name] for name in names if name in infos}
    for name, info in infos.items() if not structure else ():
        place = _EXPERTS.match(name)
        if place:
            inside.setdefault(place[1] or place[2], {})[name] = info
    said = experts_said(config)
    layers = []
    for layer, within in sorted(inside.items(), key=lambda item: _natural(item[0])):
        spec = specs.get(layer)
        row: dict[str, Any] = {"layer": layer, **size(within)}
        if layer in structure and structure[layer][1] != row["parameters"]:  # its experts are a part of these tensors
            share = structure[layer][1] / max(1, row["parameters"])
            row |= {"parameters": structure[layer][1], "bytes": round(row["bytes"] * share)}
        if spec is None:
            experts = structure[layer][0] if layer in structure else _stock_experts(within, said)
            row |= {"experts": experts, "groups": experts, "rank": None, "kept_rows": None}
        else:
            row |= {"experts": len(spec.expert_to_group), "groups": spec.num_groups, "rank": None, "kept_rows": None}
            if spec.compression is not None:
                row |= {"rank": spec.compression.rank, "kept_rows": spec.compression.kept_rows}
        layers.append(row)
    of_experts = {name for within in inside.values() for name in within}
    return {
        "folder": str(folder),
        "form": "stock" if found is None else "compact",
        "model_type": config.get("model_type") if found is None else found.base_model_type,
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "quantisation": tensors.settings.method if isinstance(tensors, Dequantised) else None,
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in stored.values()}),
        "layers": layers,
        "experts": size(of_experts),
        "rest": size(name for name in infos if name not in of_experts),
        "total": size(infos),
        "files": sorted(file.path.name for file in tensors.files.values()),
        "notes": notes(config, [row["experts"] for row in layers], [row["groups"] for row in layers]),
        "untreated": untreated,
        "provenance": {} if found is None else dict(found.provenance),
    }


_Structure = dict[str, tuple[int, int, list[str]]]


def _by_structure(folder: Path, config: dict[str, Any], tensors: TensorFolder) -> tuple[_Structure, str | None]:
    """By sparse layer: experts, their parameters, and the stored tensors that hold them; why not, where no adapter treats it."""
    from mcsmoe.adapters.registry import adapter_for, has_experts
    from mcsmoe.checkpoint.names import NameMap
    from mcsmoe.checkpoint.skeleton import stock_skeleton

    try:
        model = stock_skeleton(folder, config)
    except (ValueError, TypeError):
        return {}, None
    try:
        adapter = adapter_for(model)
    except ValueError as error:
        return {}, str(error) if has_experts(model) else None
    try:
        names = NameMap(model, tensors, stored_as_named=False)
    except (ValueError, TypeError):
        return {}, None
    found: _Structure = {}
    for layer in adapter.layers(model):
        path = adapter.experts_path(model, layer)
        own = {f"{path}.{name}": tensor for name, tensor in model.get_submodule(path).named_parameters()}
        stored = [one for name in own for one in names.units.get(name, [])]
        count = sum(tensor.numel() for tensor in own.values())
        found[layer] = (adapter.num_experts(model, layer), count, list(dict.fromkeys(stored)))
    return found, None


def _natural(text: str) -> list[Any]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text)]


def _parameters(tensors: Mapping[str, TensorInfo]) -> int:
    # Row numbers and redirect tables are bytes, not parameters.
    return sum(math.prod(info.shape) for info in tensors.values() if info.dtype.is_floating_point)


def _stock_experts(tensors: dict[str, TensorInfo], said: list[int]) -> int:
    numbers = {int(found[1]) for name in tensors if (found := _NUMBER.search(name))}
    if numbers:
        return len(numbers)
    stacked = next(iter(tensors.values())).shape[0]
    # Some families keep the rows of all experts one below the other; then only the configuration can say.
    return said[0] if len(said) == 1 and stacked % said[0] == 0 else stacked
