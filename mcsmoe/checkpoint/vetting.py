"""What is refused of a checkpoint before anything is built: quantised weights, and sizes that no file bears out.

A reader that dequantises is put in at one place: ``open_weights``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mcsmoe.artefacts.tensors import TensorFolder, TensorInfo

OWN_METHOD = "mcsmoe"
"""``quant_method`` of our own compact checkpoints."""
_REMEDY = (
    "quantised weights are not read; start from the model in bfloat16 or float32 (its original release, or what "
    "transformers loads with dequantize=True and saves)"
)
_METHODS = (
    "quantization_config",
    "quantization",
    "compression_config",
)  # of transformers, mlx, older compressed-tensors
_BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
_FLOATS = [getattr(torch, name) for name in dir(torch) if name.startswith(("float8", "float4"))]
_SMALL = {
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    *(one for one in _FLOATS if isinstance(one, torch.dtype)),
}
# Names that only quantisers give. What else has no place in the model is told apart by ``SCALE`` once that is known.
_QUANTISED = re.compile(
    r"(?:^|[._])(?:qweight|qzeros|g_idx|scales|weight_packed|weight_scale(?:_inv|_2)?|weight_zero_point|weight_global_scale"
    r"|weight_shape|absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format|\w+_blocks|input_scale|output_scale)$"
    r"|\.quant_state\."
)
SCALE = re.compile(r"(?:^|[._])(?:\w*scales?(?:_inv)?|\w*zeros?(?:_points?)?|\w*absmax|\w*quant\w*)$")


def open_weights(folder: Path, config: Mapping[str, Any], files: Iterable[str] | None = None) -> TensorFolder:
    """The weights of a checkpoint folder, by their headers.

    Args:
        folder: the checkpoint.
        config: fields of the model's configuration.
        files: a list of the files, where a checkpoint has one; else the single file, or those of the index.

    Raises:
        ValueError: they are quantised, not safetensors, damaged, or smaller than config.json says; names the file, the
            method and the remedy.
    """
    for method in _quantisations(config):
        raise ValueError(f"{folder / 'config.json'}: the checkpoint is quantised ({method}); {_REMEDY}")
    for name in _BESIDE:
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: the checkpoint is quantised; {_REMEDY}")
    tensors = TensorFolder(folder, files)
    for name, info in tensors.infos.items():
        if files is None and (info.dtype in _SMALL or _QUANTISED.search(name)):
            dtype = str(info.dtype).removeprefix("torch.")
            raise ValueError(
                f"{tensors.where[name].path}: tensor {name!r} ({dtype}) is of a quantised checkpoint, though config.json "
                f"has no quantization_config; {_REMEDY}"
            )
    check_sizes(folder / "config.json", config, tensors.infos)
    return tensors


def refuse_scales(tensors: TensorFolder, unplaced: Mapping[str, TensorInfo], kind: str) -> None:
    """Raise ValueError if a tensor without a place in the model is named like a quantiser's scale."""
    for name in unplaced:
        if SCALE.search(name):
            raise ValueError(
                f"{tensors.where[name].path}: tensor {name!r} has no place in a {kind} and is named like a quantiser's "
                f"scale; {_REMEDY}"
            )


def _quantisations(config: Any) -> Iterator[str]:
    """What config.json says of quantisation, at any depth."""
    for path, value in _fields(config):
        if path[-1] in _METHODS and isinstance(value, Mapping) and value.get("quant_method") != OWN_METHOD:
            yield str(value.get("quant_method") or value.get("quant_algo") or value.get("mode") or path[-1])


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every entry of a nested configuration, the own section of compact checkpoints left out."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == OWN_METHOD and not path:
                continue
            yield (*path, str(name)), inner
            yield from _fields(inner, (*path, str(name)))


_LAYERS = re.compile(r"^(?:num|n)_(?!.*(?:nextn|mtp)).*layers?$|^(?:encoder|decoder)_layers$|^depth$")
_EXPERTS = re.compile(r"^(?:num|n|moe_num)_(?:\w+_)?experts$|^num_experts$")
_SIZES = re.compile(r"size|dim|expert|layer|head|width|rank|length|positions|embeddings|groups?$|^n_|^num_|^d_")
_LARGEST = 1 << 31
_FEW = 512  # layers that are built in no time


def check_sizes(file: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """Compare the numbers that a structure is built from with the headers of the files.

    A necessary condition only, so that building the structure takes no longer than reading the headers did: there are
    no more layers than the highest number in a tensor's name allows, and no more experts than that or than a tensor has
    rows. Shapes are compared exactly with the structure once it is built (``names.NameMap``).

    Raises:
        ValueError: a number that the files cannot bear out; names the field and the number.
    """
    numbers = [int(part) for name in infos for part in re.split(r"[._]", name) if part.isdecimal() and len(part) < 7]
    # A part that the class does not take (the tower beside a text model) may be in the configuration and not in the files.
    most_layers = max([_FEW, *(number + 1 for number in numbers)])
    inner = [max(info.shape) for name, info in infos.items() if info.shape and not _is_vocabulary(name)]
    most_experts = max([1, *(number + 1 for number in numbers), *inner])
    for path, value in _fields(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        name = path[-1]
        limit = most_layers if _LAYERS.search(name) else most_experts if _EXPERTS.search(name) else None
        if limit is not None and value > limit:
            raise ValueError(
                f"{file}: {'.'.join(path)} is {value}, but the tensors in the files allow at most {limit}; one of the "
                "two is altered or of another model"
            )
        if abs(value) >= _LARGEST and _SIZES.search(name):
            raise ValueError(f"{file}: {'.'.join(path)} is {value}, which no tensor in the files has")


def _is_vocabulary(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "shared.weight", "wte", "output_layer", "word"))
