"""``mcsmoe inspect``: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcsmoe.artefacts.tensors import TensorInfo

NAME = "inspect"
HELP = "Show the layers, groups, ranks and bytes of a checkpoint, from its headers alone."
EXAMPLE = "mcsmoe inspect compressed"
_EXPERTS = re.compile(r"^(.*)\.experts\.|^(.*\.block_sparse_moe)\.(?:input|output)_linear\.")
_NUMBER = re.compile(r"\.experts\.(?:expert_)?(\d+)\.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def describe(folder: Path) -> dict[str, Any]:
    """Layers, groups, ranks and bytes of a checkpoint folder.

    Raises:
        ValueError: not a checkpoint folder, or a weight file that is truncated; names it.
    """
    from mcsmoe.adapters.counts import experts_said
    from mcsmoe.checkpoint import format as compact
    from mcsmoe.checkpoint.quantised.folder import Dequantised
    from mcsmoe.checkpoint.vetting import dequantised

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

    inside: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        place = _EXPERTS.match(name)
        if place:
            inside.setdefault(place[1] or place[2], {})[name] = info
    said = experts_said(config)
    layers = []
    for layer, within in sorted(inside.items(), key=lambda item: _natural(item[0])):
        spec = specs.get(layer)
        row: dict[str, Any] = {"layer": layer, **size(within)}
        if spec is None:
            experts = _stock_experts(within, said)
            row |= {"experts": experts, "groups": experts, "rank": None, "kept_rows": None}
        else:
            row |= {"experts": len(spec.expert_to_group), "groups": spec.num_groups, "rank": None, "kept_rows": None}
            if spec.compression is not None:
                row |= {"rank": spec.compression.rank, "kept_rows": spec.compression.kept_rows}
        layers.append(row)
    return {
        "folder": str(folder),
        "form": "stock" if found is None else "compact",
        "model_type": config.get("model_type") if found is None else found.base_model_type,
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "quantisation": tensors.settings.method if isinstance(tensors, Dequantised) else None,
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in stored.values()}),
        "layers": layers,
        "experts": size(name for name in infos if _EXPERTS.match(name)),
        "rest": size(name for name in infos if not _EXPERTS.match(name)),
        "total": size(infos),
        "files": sorted(file.path.name for file in tensors.files.values()),
        "provenance": {} if found is None else dict(found.provenance),
    }


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


def run(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint holds."""
    found = describe(arguments.model)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{found['folder']}: {found['form']} checkpoint of a {found['architecture']}, {', '.join(found['dtypes'])}"
        + (f", quantised by {found['quantisation']}" if found["quantisation"] else "")
    )
    wide = max([len(row["layer"]) for row in found["layers"]] + [5])
    print(f"\n{'layer':<{wide}}  experts  groups  rank  rows kept  parameters       bytes")
    for row in found["layers"]:
        rank = "-" if row["rank"] is None else row["rank"]
        kept = "-"
        if row["kept_rows"] is not None:
            counts = [count for counts in row["kept_rows"].values() for count in counts]
            kept = f"{min(counts)}-{max(counts)}"
        print(
            f"{row['layer']:<{wide}}  {row['experts']:>7}  {row['groups']:>6}  {rank:>4}  {kept:>9}  "
            f"{row['parameters']:>10,}  {row['bytes']:>10,}"
        )
    for name in ("experts", "rest", "total"):
        print(f"{name:<{wide}}  {'':>37}{found[name]['parameters']:>10,}  {found[name]['bytes']:>10,}")
    for name, value in found["provenance"].items():
        print(f"{name}: {json.dumps(value)}")
