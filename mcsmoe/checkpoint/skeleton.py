"""Models without weights: the structure that a checkpoint describes, on the meta device, and what no file holds of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.checkpoint import fields as fields_of
from mcsmoe.checkpoint.format import CompactConfig


def model_class(folder: Path, config: dict[str, Any]) -> Any:
    import transformers

    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise ValueError(
        f"{folder / 'config.json'}: architectures {names} name no model class of transformers "
        f"{transformers.__version__}"
    )


def stock_skeleton(folder: Path, config: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    """The model of a stock checkpoint on the meta device: all structure, no weights, no adapter's opinion.

    Args:
        folder: the checkpoint.
        config: its config.json.
        dtype: it is built for; that of the configuration if None.

    Raises:
        ValueError: the configuration names no model of transformers, or one that it cannot build; names the file.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not isinstance(config.get("model_type", ""), str):
        raise ValueError(f"{file}: model_type is {config['model_type']!r}, which is not text; restore the file")
    cls = model_class(folder, config)
    try:
        # The class's own configuration, as its from_pretrained takes: the text model's where that is nested in another.
        filled = (cls.config_class or AutoConfig).from_pretrained(folder, trust_remote_code=False)
        stored = dtype or parse_dtype(filled.dtype)
        # The structure is that of plain weights, whatever the files hold.
        if getattr(filled, "quantization_config", None) is not None:
            del filled.quantization_config
    except Exception as error:  # a family's checks of its fields raise a dozen kinds
        raise ValueError(f"{file}: {_first_line(error)}") from error
    return empty_model(cls, filled, stored, file)


def empty_model(cls: Any, config: Any, dtype: torch.dtype | None, file: Path) -> Any:
    """``cls(config)`` on the meta device, in eval mode, its weights tied as the configuration says.

    Raises:
        ValueError: the library cannot build it; names ``file``.
    """
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights(), _built_for(dtype):
            model = cls(config)
        model.tie_weights()
    except Exception as error:  # whatever a family's own code meets in fields of the wrong kind
        raise ValueError(f"{file}: {cls.__name__} cannot be built from it: {_first_line(error)}") from error
    return model.eval()


def _first_line(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"{text[:400]} ({type(error).__name__})" if text else type(error).__name__


def skeleton(said: CompactConfig, dtype: torch.dtype | None = None, attention: str | None = None) -> nn.Module:
    """The model of a compact checkpoint on the meta device: all structure, no weights.

    Args:
        said: its config.json.
        dtype: it is built for; that of the checkpoint if None. Some families keep tables in it that no file holds.
        attention: how attention is computed, by transformers' names; its own choice if None.

    Raises:
        ValueError: its base model or its layers are not what config.json says; names the file.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from mcsmoe.adapters.dropping import settle
    from mcsmoe.adapters.registry import adapter_for

    file, folder = said.file, said.file.parent
    fields = fields_of.source_fields(said.fields)
    cls = model_class(folder, fields)
    try:
        config_class = CONFIG_MAPPING[said.base_model_type]
    except KeyError as error:
        raise ValueError(f"{file}: base model type {error} is not known to transformers") from error
    try:
        decoded = config_class._decode_special_floats(fields)
        config = config_class.from_dict({key: value for key, value in decoded.items() if key != "model_type"})
    except Exception as error:
        raise ValueError(f"{file}: {_first_line(error)}") from error
    config.name_or_path = str(folder)
    if attention is not None:
        config._attn_implementation = attention
    specs = said.layers
    model = empty_model(cls, config, dtype or parse_dtype(fields_of.said_dtype(fields)), file)
    try:
        adapter = adapter_for(model)
        for layer, spec in specs.items():
            adapter.install(model, layer, spec)
        settle(model, [adapter.num_experts(model, layer) for layer in adapter.layers(model)])
    except (ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: {error}") from error
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


def run_dtypes(model: Any, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """By name, the number format in which transformers would run each tensor of an empty ``model`` built for ``dtype``.

    That of the structure, apart from what a family keeps in float32; nothing for other kinds of numbers.
    """
    state = model.state_dict()
    plan = model._get_dtype_plan(dtype) if dtype is not None else {}
    made = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            kept = [one for pattern, one in plan.items() if re.search(rf"(?:^|\.){re.escape(pattern)}(?:\.|$)", name)]
            made[name] = kept[0] if kept else tensor.dtype
    return made


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
