"""Lets the Auto classes of transformers load compact checkpoints, without importing transformers for it.

Transformers takes seconds to import and most users of ``import mcsmoe`` never touch its Auto classes: what is
registered waits for the modules that define them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
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


class _Loader:
    """Stands in the registry of an Auto class; what it returns is the base model's own class, ready to run."""

    encoder_decoder: bool
    config_class: Any

    @classmethod
    def from_pretrained(cls, path: str, *_args: Any, config: Any = None, **options: Any) -> Any:
        from mcsmoe.checkpoint.load import load_model as load

        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        device = options.pop("device_map", None) or "cpu"
        unknown = {name for name, value in options.items() if name not in _HARMLESS and value is not None}
        if unknown or isinstance(device, dict):
            raise ValueError(f"{path}: compact checkpoints take dtype and one device, not {sorted(unknown) or device}")
        model: Any = load(path, dtype=None if dtype == "auto" else dtype, device="cpu" if device == "auto" else device)
        if bool(model.config.is_encoder_decoder) is not cls.encoder_decoder:
            kind = "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"
            raise ValueError(f"{path}: holds a {type(model).__name__}; load it with {kind}")
        return model


def _register_config(module: ModuleType) -> None:
    module.AutoConfig.register(MODEL_TYPE, config_class(), exist_ok=True)


def _register_models(module: ModuleType) -> None:
    for auto, encoder_decoder in ((module.AutoModelForSeq2SeqLM, True), (module.AutoModelForCausalLM, False)):
        loader = type("CompactLoader", (_Loader,), {"encoder_decoder": encoder_decoder, "config_class": config_class()})
        auto.register(config_class(), loader, exist_ok=True)


_WAITING: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
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
