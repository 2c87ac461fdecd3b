"""Lets the Auto classes of transformers load compact checkpoints, without importing transformers for it.

Transformers takes seconds to import and most users of ``import mcsmoe`` never touch its Auto classes: what is
registered waits for the modules that define them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPE = "mcsmoe"
"""``model_type`` of compact checkpoints: a loader that does not know it refuses, where it would else re-initialise."""

# Arguments of from_pretrained that say where files come from, or that have no meaning for a checkpoint of ours.
_HARMLESS = {
    *("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder", "commit_hash"),
    *("adapter_kwargs", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "code_revision", "_commit_hash"),
}


@cache
def config_class() -> Any:
    """The configuration class of compact checkpoints: all fields of the base model's, and the section ``mcsmoe``."""
    from transformers.configuration_utils import PreTrainedConfig

    return type("McsmoeConfig", (PreTrainedConfig,), {"model_type": MODEL_TYPE, "__module__": __name__})


def _one_device(path: object, device_map: Any) -> Any:
    """The device of a ``device_map`` that names one: a device, or ``{"": device}``."""
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(
                f"{path}: a compact checkpoint goes to one device, but device_map names {sorted(map(str, device_map))}; "
                'give {"": device}'
            )
        device_map = device_map[""]
    if device_map is None or device_map in ("auto", "balanced", "sequential"):
        return "cpu"
    return f"cuda:{device_map}" if isinstance(device_map, int) else device_map


def load_compact(path: Any, options: dict[str, Any]) -> Any:
    """The model of a compact checkpoint, by the options of ``from_pretrained``.

    Raises:
        ValueError: an option that has no meaning here; names it.
    """
    from mcsmoe.checkpoint.load import load_model as load

    given = dict(options)
    dtype = given.pop("dtype", None) or given.pop("torch_dtype", None)
    given.pop("torch_dtype", None)
    device = _one_device(path, given.pop("device_map", None))
    config = given.pop("config", None)
    attention = given.pop("attn_implementation", None) or getattr(config, "_attn_implementation_internal", None)
    informed = given.pop("output_loading_info", False)
    unknown = sorted(name for name, value in given.items() if name not in _HARMLESS and value is not None)
    if unknown:
        raise ValueError(f"{path}: a compact checkpoint takes no {', '.join(unknown)}; leave it out")
    model = load(path, dtype=None if dtype == "auto" else dtype, device=device, attention=attention)
    nothing: dict[str, Any] = {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    return (model, nothing) if informed else model


_AUTO = (
    *("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    *("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"),
)


def _serves(auto: Any, model: Any) -> bool:
    """Whether an Auto class would give the class of ``model`` for its configuration."""
    try:
        found = auto._model_mapping[type(model.config)]
    except (KeyError, AttributeError):
        return False
    return type(model) in (found if isinstance(found, (tuple, list)) else (found,))


class _Loader:
    """Stands in the registry of an Auto class; what it returns is the base model's own class, ready to run."""

    auto: Any  # the Auto class that this one serves
    config_class: Any

    @classmethod
    def from_pretrained(cls, path: str, *_args: Any, **options: Any) -> Any:
        made = load_compact(path, options)
        model: Any = made[0] if isinstance(made, tuple) else made
        if not _serves(cls.auto, model):
            import transformers

            fitting = [name for name in _AUTO if _serves(getattr(transformers, name, None), model)]
            doors = " or ".join([*fitting, type(model).__name__])
            raise ValueError(f"{path}: holds a {type(model).__name__}; load it with {doors}")
        return made

    @classmethod
    def _from_config(cls, config: Any, **_options: Any) -> Any:
        raise ValueError(
            "the configuration of a compact checkpoint does not give a model without its weights; use from_pretrained "
            f"on its folder ({getattr(config, 'name_or_path', '') or 'unknown'})"
        )


def _is_compact_folder(path: object) -> bool:
    import os
    from pathlib import Path

    if not isinstance(path, (str, os.PathLike)) or not (Path(path) / "config.json").is_file():
        return False
    from mcsmoe.checkpoint.format import is_compact

    try:
        return is_compact(Path(path))
    except ValueError:
        return False  # transformers says what is wrong with it


def _register_classes(module: ModuleType) -> None:
    """Let ``from_pretrained`` of every model class read compact folders, where it would initialise experts at random."""
    original = module.PreTrainedModel.from_pretrained.__func__

    @wraps(original)
    def from_pretrained(cls: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if not _is_compact_folder(path):
            return original(cls, path, *arguments, **options)
        made = load_compact(path, options)
        model = made[0] if isinstance(made, tuple) else made
        if not isinstance(model, cls):
            raise ValueError(f"{path}: holds a {type(model).__name__}, not a {cls.__name__}; load it with that class")
        return made

    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _register_config(module: ModuleType) -> None:
    module.AutoConfig.register(MODEL_TYPE, config_class(), exist_ok=True)


def _register_models(module: ModuleType) -> None:
    for name in _AUTO:
        auto = getattr(module, name, None)
        if auto is not None:
            loader = type("CompactLoader", (_Loader,), {"auto": auto, "config_class": config_class()})
            auto.register(config_class(), loader, exist_ok=True)


_WAITING: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.modeling_utils": _register_classes,
}


class _Finder:
    """Runs what waits for a module right after that module's own code."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, _target: Any = None) -> ModuleSpec | None:
        register = _WAITING.get(name)
        spec = PathFinder.find_spec(name, path) if register else None
        if register is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register with the Auto classes now where they are imported, else as soon as they are."""
    for name, waiting in _WAITING.items():
        if name in sys.modules:
            waiting(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
