"""Load checkpoints, stock and compact.

A compact checkpoint is built empty and filled tensor by tensor, each file checked against its digest on the way, so
that loading never holds the model twice and never believes a damaged file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mcsmoe.artefacts.digests import check_sums
from mcsmoe.artefacts.tensors import INDEX, TensorFolder, TensorInfo
from mcsmoe.checkpoint import fields, leftovers
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.lineage import PROVENANCE
from mcsmoe.checkpoint.names import NameMap
from mcsmoe.checkpoint.quantised.folder import Dequantised
from mcsmoe.checkpoint.quantised.settings import without_quantisation
from mcsmoe.checkpoint.save import own_tensors, place, save_pretrained
from mcsmoe.checkpoint.skeleton import fill_buffers, parse_dtype, run_dtypes, skeleton, stock_skeleton
from mcsmoe.checkpoint.vetting import open_weights, refuse_scales

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_LEFT_OUT = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.ckpt",
    "original/*",
    "consolidated*",
]
_ALTERED = "it is altered or of another model; restore or rebuild it"
_OF_MODEL = ("config.json", "generation_config.json", INDEX)


def resolve(path: str | Path) -> Path:
    """A local folder for ``path``: itself, or the files of a model on the hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_NAME.fullmatch(str(path)):
        raise ValueError(f"{path}: no such checkpoint folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), ignore_patterns=_HUB_LEFT_OUT))
    except Exception as error:  # the hub client raises a dozen kinds, from OSError to its own
        raise ValueError(f"{path}: neither a folder nor a model that can be fetched from the hub ({error})") from error


def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    dense: bool = False,
    attention: str | None = None,
) -> nn.Module:
    """The model of a stock folder, a hub name or a compact folder, in eval mode.

    Args:
        path: checkpoint folder, or name on the hub.
        dtype: of floating-point weights; as stored if None.
        device: where the weights go, one tensor at a time.
        dense: a model without experts is wanted, to compare with, and no adapter treats it.
        attention: how attention is computed, by transformers' names (``attn_implementation``); its own choice if None.

    Raises:
        ValueError: not a checkpoint, not a Mixture-of-Experts model (or one, where ``dense``), or a file that is truncated,
            altered or foreign; names it.
    """
    folder = resolve(path)
    check_sums(folder, lambda name: name in _OF_MODEL)
    config = compact.read_config(folder)
    if compact.SECTION in config:
        found = compact.CompactConfig.of(folder, config)
        return _load_compact(folder, found, parse_dtype(dtype), torch.device(device), attention)
    return _load_stock(folder, config, parse_dtype(dtype), torch.device(device), dense, attention)


def _load_stock(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
    dense: bool,
    attention: str | None,
) -> nn.Module:
    tensors = open_weights(folder, config)
    check_sums(folder, lambda name: name in tensors.files)
    empty = stock_skeleton(folder, config)
    _check_kind(folder, empty, dense)
    names = NameMap(empty, tensors, stored_as_named=False)
    refuse_scales(tensors, names.unplaced, type(empty).__name__)
    names.check(list(own_tensors(empty)))
    if isinstance(tensors, Dequantised):
        return _load_dequantised(folder, config, dtype, device, attention)
    try:
        model, report = type(empty).from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **({"attn_implementation": attention} if attention else {}),
        )
    except (OSError, RuntimeError, ImportError) as error:
        raise ValueError(f"{folder}: {error}") from error
    _check_kind(folder, model, dense)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{folder}: {len(missing)} weights are missing, among them {missing[0]!r}")
    _align(model)
    _remember(model, folder, config, names.unplaced)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _load_dequantised(
    folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device, attention: str | None
) -> nn.Module:
    """The model of a quantised checkpoint in plain numbers: the library would not take it without the quantiser's kernels."""
    from mcsmoe.checkpoint.streaming import Streamed

    source = Streamed(folder)
    model = source.model
    source.load_to_run(source.own_names())
    model.tie_weights(recompute_mapping=False)
    fill_buffers(model, torch.device("cpu"))
    if attention is not None:
        model.set_attn_implementation(attention)
    if dtype is not None:
        model.to(dtype)
    _remember(model, folder, without_quantisation(config), source.unplaced)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _check_kind(folder: Path, model: nn.Module, dense: bool) -> None:
    from mcsmoe.adapters.registry import adapter_for, has_experts

    try:
        if not dense:
            adapter_for(model)
        elif has_experts(model):
            raise ValueError(f"{type(model).__name__} has experts, and a dense model is asked for; name one without")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _remember(model: Any, folder: Path, config: dict[str, Any], unplaced: Mapping[str, TensorInfo]) -> None:
    """Note on ``model`` what it was read from, for ``save_model``; say what of the files is not in it."""
    if unplaced:
        going = [name for name in unplaced if leftovers.is_prediction(name, model.config)]
        why = f"{type(model).__name__} has no place for it"
        leftovers.say_left_out(folder, unplaced, f"{why}; what mcsmoe.save writes of this model is without it")
        source = fields.source_fields(config)
        config = {**config, **(leftovers.without_prediction(source) if going else source)}
    fields.remember(model, folder, config)
    # Called by trainers and users alike; the library's own would leave merged experts out.
    model.save_pretrained = partial(save_pretrained, model)


@torch.no_grad()
def _align(model: nn.Module, boundary: int = 64) -> None:
    """Copy weights that a file put at an odd address: the matrix product's last bits depend on the address."""
    for parameter in model.parameters():
        if parameter.data_ptr() % boundary:
            parameter.data = parameter.data.clone()


def _load_compact(
    folder: Path,
    config: compact.CompactConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    attention: str | None,
) -> nn.Module:
    tensors = compact_weights(folder, config)
    model: Any = skeleton(config, dtype, attention)
    names = NameMap(model, tensors, stored_as_named=True)
    strange = sorted(set(names.unplaced) - config.unplaced)
    if strange:
        raise ValueError(
            f"{tensors.where[strange[0]].path}: tensor {strange[0]!r} has no place in the model; {_ALTERED}"
        )
    names.check(list(own_tensors(model)))
    said = parse_dtype(fields.said_dtype(config.fields))
    formats = run_dtypes(model, dtype or said) if dtype or said else {}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, sha256 in config.files.items():
        file = tensors.files[name]
        for key, tensor in file.stream(sha256):
            if key in names.units:
                place(model, key, tensor.to(device=device, dtype=formats.get(key, tensor.dtype)))
    model.tie_weights(recompute_mapping=False)
    fill_buffers(model, device)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights are missing, among them {missing[0]!r}")
    model.config.dtype = fields.main_dtype(model)
    with contextlib.suppress(OSError):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    _remember(model, folder, dict(config.fields), names.unplaced)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model.eval()  # type: ignore[no-any-return]


def compact_weights(folder: Path, config: compact.CompactConfig) -> TensorFolder:
    """The weight files of a compact checkpoint, by their headers.

    Raises:
        ValueError: they are not those that the section lists, or not of its structure; names the file.
    """
    tensors = open_weights(folder, fields.source_fields(config.source_config), config.files)
    for file in tensors.files.values():
        config.check_structure(file.path, file.metadata)
    return tensors


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a checkpoint folder or of a hub model.

    Raises:
        ValueError: there is none, or one of its files is altered; names the folder or the file.
    """
    from transformers import AutoTokenizer

    folder = resolve(path)
    other = (*_OF_MODEL, PROVENANCE)
    check_sums(folder, lambda name: name not in other and not name.endswith(".safetensors"))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model")):
        raise ValueError(f"{folder}: no tokenizer (tokenizer.json) beside the model")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer file raises whatever its reader meets
        text = " ".join(str(error).split())[:400]
        raise ValueError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {text})") from error
