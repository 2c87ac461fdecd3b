"""What is refused of a checkpoint before anything is built: quantisation of an unknown kind, and sizes that no file bears out.

Weights of the known kinds are read as plain numbers; this is the one place where that is decided.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mcsmoe.artefacts.tensors import TensorFolder, TensorInfo
from mcsmoe.checkpoint.quantised.folder import Dequantised
from mcsmoe.checkpoint.quantised.settings import FORMATS, OWN_METHOD, entries, settings_of

__all__ = ["OWN_METHOD", "SCALE", "check_sizes", "open_weights", "refuse_scales"]

_REMEDY = (
    f"quantised weights are read of the kinds {', '.join(FORMATS)}; of others start from the model in bfloat16 or float32 "
    "(its original release, or what transformers loads with dequantize=True and saves)"
)
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
    """The weights of a checkpoint folder, by their headers; quantised ones of a known kind as plain numbers.

    Args:
        folder: the checkpoint.
        config: fields of the model's configuration.
        files: a list of the files, where a checkpoint has one; else the single file, or those of the index.

    Raises:
        ValueError: they are quantised in an unknown way, not safetensors, damaged, or smaller than config.json says; names
            the file, the method and the remedy.
    """
    said = settings_of(config)
    for one in said:
        if one.format is None:
            raise ValueError(f"{folder / 'config.json'}: the checkpoint is quantised ({one.method}); {_REMEDY}")
    if not said:
        for name in _BESIDE:
            if files is None and (folder / name).exists():
                raise ValueError(
                    f"{folder / name}: the checkpoint is quantised, and config.json has no "
                    f"quantization_config; {_REMEDY}"
                )
    tensors = dequantised(folder, config, files)
    known = tensors.quantised if isinstance(tensors, Dequantised) else {}
    for name, info in tensors.infos.items():
        if files is None and name not in known and (info.dtype in _SMALL or _QUANTISED.search(name)):
            dtype = str(info.dtype).removeprefix("torch.")
            what = f"is no part of a tensor of {said[0].method}" if said else "config.json has no quantization_config"
            raise ValueError(
                f"{tensors.where[name].path}: tensor {name!r} ({dtype}) is of a quantised checkpoint, though {what}; {_REMEDY}"
            )
    check_sizes(folder / "config.json", config, tensors.infos)
    return tensors


def base_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The number format that the configuration says of weights that are not quantised; bfloat16 if it says none."""
    for place in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in ("dtype", "torch_dtype"):
            found = getattr(torch, str(place.get(name)).removeprefix("torch."), None)
            if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1:
                return found
    return torch.bfloat16


def dequantised(folder: Path, config: Mapping[str, Any], files: Iterable[str] | None = None) -> TensorFolder:
    """The weights of a folder, quantised ones of a known kind as plain numbers; the others are looked at by nobody.

    Raises:
        ValueError: not safetensors, damaged, or parts that do not belong together; names the folder and the tensor.
    """
    tensors, said = TensorFolder(folder, files), settings_of(config)
    if not said or said[0].format is None:
        return tensors
    try:
        found = dict(said[0].format.find(tensors.infos, said[0].fields, tensors.read))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: quantised by {said[0].method}: {text}; restore the files, or start from the model in bfloat16 "
            "or float32"
        ) from error
    if not found:
        raise ValueError(
            f"{folder / 'config.json'}: says that the checkpoint is quantised ({said[0].method}), but no tensor in the "
            "files is; take the entry out of config.json"
        )
    return Dequantised(tensors, found, said[0], base_dtype(config))


def refuse_scales(tensors: TensorFolder, unplaced: Mapping[str, TensorInfo], kind: str) -> None:
    """Raise ValueError if a tensor without a place in the model is named like a quantiser's scale."""
    for name in unplaced:
        if SCALE.search(name):
            raise ValueError(
                f"{tensors.where[name].path}: tensor {name!r} has no place in a {kind} and is named like a quantiser's "
                f"scale; {_REMEDY}"
            )


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
    for path, value in entries(config):
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
