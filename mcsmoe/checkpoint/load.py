"""Load checkpoints, stock and compact.

A compact checkpoint is built empty and filled tensor by tensor, each file checked against its digest on the way, so
that loading never holds the model twice and never believes a damaged file.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.artefacts.digests import check_sums
from mcsmoe.artefacts.tensors import INDEX, TensorFile
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.save import PROVENANCE, dtype_of
from mcsmoe.checkpoint.skeleton import fill_buffers, model_class, parse_dtype, skeleton

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
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
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen kinds, from OSError to its own
        raise ValueError(f"{path}: neither a folder nor a model that can be fetched from the hub ({error})") from error


def load_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    dense: bool = False,
) -> nn.Module:
    """The model of a stock folder, a hub name or a compact folder, in eval mode.

    Args:
        path: checkpoint folder, or name on the hub.
        dtype: of floating-point weights; as stored if None.
        device: where the weights go, one tensor at a time.
        dense: a model without experts is wanted, to compare with, and no adapter treats it.

    Raises:
        ValueError: not a checkpoint, not a Mixture-of-Experts model (or one, where ``dense``), or a file that is truncated,
            altered or foreign; names it.
    """
    folder = resolve(path)
    check_sums(folder, lambda name: name in _OF_MODEL)
    config = compact.read_config(folder)
    if compact.SECTION in config:
        return _load_compact(folder, parse_dtype(dtype), torch.device(device))
    return _load_stock(folder, config, parse_dtype(dtype), torch.device(device), dense)


def _load_stock(
    folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device, dense: bool
) -> nn.Module:
    from mcsmoe.adapters.registry import adapter_for, has_experts

    for file in sorted(folder.glob("*.safetensors")):
        TensorFile(file)
    check_sums(folder, lambda name: name.endswith(".safetensors"))
    try:
        model, report = model_class(folder, config).from_pretrained(
            folder, dtype="auto" if dtype is None else dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: {error}") from error
    try:
        if not dense:
            adapter_for(model)
        elif has_experts(model):
            raise ValueError(f"{type(model).__name__} has experts, and a dense model is asked for; name one without")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{folder}: {len(missing)} weights are missing, among them {missing[0]!r}")
    _align(model)
    return model.to(device).eval()


@torch.no_grad()
def _align(model: nn.Module, boundary: int = 64) -> None:
    """Copy weights that a file put at an odd address: the matrix product's last bits depend on the address."""
    for parameter in model.parameters():
        if parameter.data_ptr() % boundary:
            parameter.data = parameter.data.clone()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    if old.shape != tensor.shape:
        raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model needs {tuple(old.shape)}")
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, attribute, tensor)


def _load_compact(folder: Path, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    section = compact.read_section(folder)
    model: Any = skeleton(folder, dtype)
    expected = set(model.state_dict())
    for name, sha256 in section["files"].items():
        file = TensorFile(folder / name)
        compact.check_structure(file.path, file.metadata, section)
        for key, tensor in file.stream(sha256):
            if key not in expected:
                raise ValueError(f"{file.path}: tensor {key!r} has no place in the model; {_ALTERED}")
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            try:
                _assign(model, key, tensor.to(device=device, dtype=wanted))
            except ValueError as error:
                raise ValueError(f"{file.path}: {error}; {_ALTERED}") from error
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights are missing, among them {missing[0]!r}")
    fill_buffers(model, device)
    model.config.dtype = dtype_of(model)
    with contextlib.suppress(OSError):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


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
    return AutoTokenizer.from_pretrained(folder)
