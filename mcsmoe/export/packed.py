"""Experts of a stock checkpoint as integers of few bits, in the packed layout of compressed-tensors.

``X.weight`` becomes ``X.weight_packed`` (int32, 32 / bits integers a word), ``X.weight_scale`` (one a group) and
``X.weight_shape``; config.json names everything else as left alone. transformers with compressed-tensors, vLLM and what
else knows ``quant_method: compressed-tensors`` read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.digests import write_sums
from mcsmoe.artefacts.tensors import INDEX, SHARD_BYTES, TensorFolder, TensorInfo
from mcsmoe.artefacts.writing import by_alignment, write_tensors
from mcsmoe.checkpoint import fields
from mcsmoe.checkpoint.lineage import PROVENANCE, WEIGHTS
from mcsmoe.checkpoint.spool import Spool
from mcsmoe.compress.quantise import check_bits, group_size, pack, quantise

_EXPERT = re.compile(r"^(?P<layer>.*)\.experts\.\d+\.\w+\.weight$")


@dataclass(frozen=True)
class Packing:
    """How experts are stored: integers of ``bits``, one scale for ``group`` entries of a row; None: the largest usual."""

    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def check(self, place: Path, infos: Mapping[str, TensorInfo], layers: int) -> int:
        """Entries a group, for a checkpoint whose files hold ``infos``.

        Raises:
            ValueError: its experts are not stored one by one, or a group is no part of their rows; names what is wrong.
        """
        found = expert_names(infos)
        own = {_layer_of(name) for name in found}
        if len(own) < layers:
            raise ValueError(
                f"{place}: {layers} layers have experts, but only those of {len(own)} are stored matrix by matrix "
                "(experts.0.NAME.weight), which the packed layout needs; leave out --bits, and quantise with the tool of "
                "the engine that serves it"
            )
        return group_size([infos[name].shape[1] for name in found], self.group)


def expert_names(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the matrices of experts among what the files of a checkpoint hold."""
    return [
        name
        for name, info in infos.items()
        if _EXPERT.match(name) and len(info.shape) == 2 and info.dtype.is_floating_point
    ]


def _layer_of(name: str) -> str:
    found = _EXPERT.match(name)
    assert found is not None
    return found["layer"]


def pack_folder(folder: Path, packing: Packing, shard_bytes: int = SHARD_BYTES) -> None:
    """Pack the experts of the stock checkpoint ``folder``, which is still being made, in place.

    Raises:
        ValueError: as ``Packing.check``.
    """
    source = TensorFolder(folder)
    names = expert_names(source.infos)
    group = group_size([source.infos[name].shape[1] for name in names], packing.group)
    packed = set(names)
    with Spool.inside(folder, ".packed") as spool:
        for layer in dict.fromkeys(_layer_of(name) for name in names):
            made: dict[str, Tensor] = {}
            for name in (one for one in names if _layer_of(one) == layer):
                weight_oi = source.read(name)
                integer_oi, scale_og = quantise(weight_oi, packing.bits, group)
                made[f"{name}_packed"] = pack(integer_oi, packing.bits)
                made[f"{name}_scale"] = scale_og
                made[f"{name}_shape"] = torch.tensor(weight_oi.shape)
            spool.add(made)
        kept = {name: info for name, info in source.infos.items() if name not in packed}
        infos = by_alignment({**kept, **spool.infos})
        written = folder / ".written"
        written.mkdir()
        tensors = ((name, source.read(name) if name in kept else spool.read(name)) for name in infos)
        digests = write_tensors(written, infos, tensors, {"format": "pt"}, shard_bytes)
    for old in [*source.files, INDEX]:
        (folder / old).unlink(missing_ok=True)
    for file in written.iterdir():
        file.replace(folder / file.name)
    written.rmdir()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = description(packing.bits, group, kept)
    fields.write_json(folder / "config.json", config)
    _renew(folder, digests)


def _renew(folder: Path, digests: Mapping[str, str]) -> None:
    """Let the provenance beside the weights speak of those that are there now."""
    file = folder / PROVENANCE
    if file.exists():
        said = json.loads(file.read_text())
        if WEIGHTS in said:
            said[WEIGHTS] = TensorFolder(folder).fingerprint
            file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    write_sums(folder, digests)


def description(bits: int, group: int, kept: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json; ``kept`` names the tensors that are as they were."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": sorted({name.removesuffix(".weight") for name in kept if name.endswith(".weight")} | {"lm_head"}),
    }
