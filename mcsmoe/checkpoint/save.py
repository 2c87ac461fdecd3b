"""Save checkpoints: stock ones of transformers, and compact ones that hold merged experts once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.counts import experts_said
from mcsmoe.adapters.dropping import settle
from mcsmoe.adapters.registry import known_adapter
from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.digests import write_sums
from mcsmoe.artefacts.tensors import SHARD_BYTES, TensorInfo, by_alignment, write_tensors
from mcsmoe.checkpoint import format as compact
from mcsmoe.modules import RedirectedExperts
from mcsmoe.types import LayerId, LayerSpec

PROVENANCE = "provenance.json"


def specs_of(model: nn.Module) -> dict[LayerId, LayerSpec]:
    """Structure of every layer of ``model`` that is merged, compressed, or has fewer experts than others.

    Where all layers have the same number of experts, the model's configuration says so from now on.

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
    adapter = known_adapter(model)
    if adapter is None:
        return specs
    counts = {layer: adapter.num_experts(model, layer) for layer in adapter.layers(model)}
    settle(model, list(counts.values()))
    said = experts_said(model.config)
    for layer, experts in counts.items():
        if len(said) == 1 and experts != said[0]:
            own = LayerSpec(experts, list(range(experts)), merged=False)
            specs[layer] = replace(specs.get(layer, own), num_experts=experts)
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


def save_model(
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
    fields |= {"architectures": [type(model).__name__], "dtype": str(dtype_of(model)).removeprefix("torch.")}
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


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
