"""Models without weights: the structure that a checkpoint describes, on the meta device, and what no file holds of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.format import layer_specs


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
    with torch.device("meta"), no_init_weights(), _built_for(dtype or parse_dtype(fields.get("dtype"))):
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


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not a torch dtype, such as float32 or bfloat16")
    return found


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
