"""Save and load checkpoints: stock ones of transformers, and compact ones that hold merged experts once.

A compact checkpoint is built empty and filled tensor by tensor, each file checked against its digest on the way, so
that loading never holds the model twice and never believes a damaged file.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe import compact
from mcsmoe.artefacts import atomic_directory
from mcsmoe.compact import is_compact, layer_specs
from mcsmoe.digests import check_sums, write_sums
from mcsmoe.modules import RedirectedExperts
from mcsmoe.tensorfile import INDEX, SHARD_BYTES, TensorFile, TensorInfo, by_alignment, write_tensors
from mcsmoe.types import LayerId, LayerSpec

__all__ = ["is_compact", "layer_specs", "load", "load_tokenizer", "save", "skeleton"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
PROVENANCE = "provenance.json"
_ALTERED = "it is altered or of another model; restore or rebuild it"
_OF_MODEL = ("config.json", "generation_config.json", INDEX)


# -- saving ------------------------------------------------------------------------------------------------------
def specs_of(model: nn.Module) -> dict[LayerId, LayerSpec]:
    """Structure of every merged or compressed layer of ``model``.

    Raises:
        ValueError: a residual is still dense; names the layer and says to pack the model.
    """
    specs: dict[LayerId, LayerSpec] = {}
    for path, module in model.named_modules():
        if isinstance(module, RedirectedExperts):
            layer = path.rpartition(".")[0]
            try:
                specs[layer] = module.spec()
            except ValueError as error:
                raise ValueError(f"layer {layer!r}: {error}") from error
    return specs


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """State of the model with tied tensors once, under the name the others are tied to."""
    state = model.state_dict()
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {
        name: tensor
        for name, tensor in state.items()
        if not (name in tied and tied[name] in state and state[tied[name]].data_ptr() == tensor.data_ptr())
    }


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name, without its graph."""
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), attribute)
    return found.detach()


def save(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` to the folder ``path``, which appears only once complete.

    A model whose experts are all its own becomes a stock checkpoint (with ``provenance.json`` beside it if given);
    one with merged or compressed layers becomes a compact one, with ``provenance`` in its configuration.

    Raises:
        ValueError: a residual is still dense; call ``mcsmoe.modules.pack`` first.
    """
    specs = specs_of(model)
    with atomic_directory(path) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not specs:
            model.save_pretrained(folder, max_shard_size=shard_bytes)  # type: ignore[operator]
            if provenance is not None:
                (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n")
            return
        tensors = own_tensors(model)
        infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
        write_folder(folder, model, infos, tensors.__getitem__, provenance, shard_bytes)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)


def write_folder(
    folder: Path,
    model: nn.Module,
    infos: Mapping[str, TensorInfo],
    tensor: Callable[[str], Tensor],
    provenance: dict[str, Any] | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Weights and configuration of a compact checkpoint of ``model``, whose tensors ``tensor(name)`` gives one by one.

    A model without merged or compressed layers becomes a stock checkpoint in the names of its modules.
    """
    config: Any = model.config
    infos, specs = by_alignment(infos), specs_of(model)
    fields = json.loads(config.to_json_string())
    fields |= {"architectures": [type(model).__name__], "dtype": str(_dtype_of(model)).removeprefix("torch.")}
    section = compact.make_section(config.model_type, specs, provenance)
    note = compact.metadata(section) if specs else {}
    digests = write_tensors(folder, infos, ((name, tensor(name)) for name in infos), note, shard_bytes)
    if specs:
        compact.write_config(folder, fields, section, digests)
        write_sums(folder, digests)
        return
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if provenance is not None:
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n")


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


# -- loading -----------------------------------------------------------------------------------------------------
def _resolve(path: str | Path) -> Path:
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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not a torch dtype, such as float32 or bfloat16")
    return found


def load(
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
    folder = _resolve(path)
    check_sums(folder, lambda name: name in _OF_MODEL)
    config = compact.read_config(folder)
    if compact.SECTION in config:
        return _load_compact(folder, _dtype(dtype), torch.device(device))
    return _load_stock(folder, config, _dtype(dtype), torch.device(device), dense)


def model_class(folder: Path, config: dict[str, Any]) -> Any:
    import transformers

    for name in config.get("architectures") or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"{folder / 'config.json'}: architectures {config.get('architectures')} name no model class of transformers "
        f"{transformers.__version__}"
    )


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


def skeleton(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a compact checkpoint on the meta device: all structure, no weights.

    Args:
        folder: the checkpoint.
        dtype: it is built for; that of the checkpoint if None. Some families keep tables in it that no file holds.

    Raises:
        ValueError: its base model or its layers are not what config.json says; names the file.
    """
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from mcsmoe.adapters.registry import adapter_for

    place = Path(folder)
    section = compact.read_section(place)
    fields = compact.read_config(place)
    cls = model_class(place, fields)
    fields = {key: value for key, value in fields.items() if key not in (compact.SECTION, "model_type")}
    try:
        config = CONFIG_MAPPING[section["base_model_type"]].from_dict(fields)
    except KeyError as error:
        raise ValueError(f"{place / 'config.json'}: base model type {error} is not known to transformers") from error
    config.name_or_path = str(place)
    with torch.device("meta"), no_init_weights(), _built_for(dtype or _dtype(fields.get("dtype"))):
        model = cls(config)
    model.tie_weights()
    try:
        adapter = adapter_for(model)
        for layer, spec in layer_specs(place).items():
            adapter.install(model, layer, spec)
    except ValueError as error:
        raise ValueError(f"{place / 'config.json'}: {error}") from error
    return model


@contextlib.contextmanager
def _built_for(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    model.config.dtype = _dtype_of(model)
    with contextlib.suppress(OSError):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                yield module, name, buffer


def fill_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds, such as rotary frequencies, are computed by the model's own initialisation."""
    empty: set[nn.Module] = set()
    for module, name, buffer in list(_unsaved_buffers(model)):
        if buffer.is_meta:
            setattr(module, name, torch.empty_like(buffer, device=device))
            empty.add(module)
        else:
            setattr(module, name, buffer.to(device))
    if not empty:
        return
    # The initialisation leaves alone what carries this mark.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = module not in empty
    model.initialize_weights()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a checkpoint folder or of a hub model.

    Raises:
        ValueError: there is none, or one of its files is altered; names the folder or the file.
    """
    from transformers import AutoTokenizer

    folder = _resolve(path)
    other = (*_OF_MODEL, PROVENANCE)
    check_sums(folder, lambda name: name not in other and not name.endswith(".safetensors"))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model")):
        raise ValueError(f"{folder}: no tokenizer (tokenizer.json) beside the model")
    return AutoTokenizer.from_pretrained(folder)
