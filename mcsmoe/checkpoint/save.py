"""Save checkpoints: stock ones of transformers, and compact ones that hold merged experts once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from mcsmoe.adapters.counts import experts_said
from mcsmoe.adapters.dropping import settle
from mcsmoe.adapters.registry import known_adapter
from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.digests import write_sums
from mcsmoe.artefacts.tensors import INDEX, SHARD_BYTES, TensorFolder, TensorInfo
from mcsmoe.artefacts.writing import by_alignment, write_tensors
from mcsmoe.checkpoint import fields
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.card import write_card
from mcsmoe.checkpoint.lineage import ANCESTORS, PROVENANCE, WEIGHTS
from mcsmoe.modules import RedirectedExperts
from mcsmoe.types import LayerId, LayerSpec


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


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` where ``model`` has the parameter or buffer of that name; it takes no gradient."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)


def save_model(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    state: Mapping[str, Tensor] | None = None,
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
        tensors = own_tensors(model)
        tensors |= {name: one for name, one in (state or {}).items() if name in tensors}
        if not specs:
            # The library's own writer gives the names and shapes that every reader of the family knows.
            type(model).save_pretrained(model, folder, max_shard_size=shard_bytes)  # type: ignore[attr-defined]
            fields.write_json(folder / "config.json", true_ties(model, fields.config_of(model)))
            write_provenance(folder, provenance)
        else:
            infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
            config = true_ties(model, fields.config_of(model))
            write_folder(folder, model, infos, tensors.__getitem__, provenance, shard_bytes, config)
        fields.write_generation(model, folder)
        if provenance is not None:
            write_card(folder, provenance)


def save_pretrained(
    model: Any, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, **options: Any
) -> None:
    """``model.save_pretrained`` of a model that ``mcsmoe.load`` read: with merged or compressed layers it stays compact.

    Other files in the folder stay as they are.

    Raises:
        ValueError: an upload is asked for, or a residual is still dense.
    """
    if not specs_of(model):
        type(model).save_pretrained(model, save_directory, state_dict=state_dict, **options)
        return
    if options.get("push_to_hub"):
        raise ValueError("a compact checkpoint is not uploaded by save_pretrained; save it and upload the folder")
    if not options.get("is_main_process", True):
        return
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    shard = options.get("max_shard_size")
    with TemporaryDirectory(prefix=".saving-", dir=target) as place_:
        fresh = Path(place_) / "model"
        save_model(model, fresh, shard_bytes=shard if isinstance(shard, int) else SHARD_BYTES, state=state_dict)
        for old in [*target.glob("model*.safetensors"), target / INDEX]:
            if not (fresh / old.name).exists():
                old.unlink(missing_ok=True)
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(target / file.name)


def true_ties(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` that does not call embeddings tied of which no two are one tensor.

    Where some of a model's ties hold and others do not, what the files hold decides on loading.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    holding = [
        one for one, two in tied.items() if one in state and two in state and same_tensor(state[one], state[two])
    ]
    declared = getattr(model.config.get_text_config(), "tie_word_embeddings", False) or getattr(
        model.config, "tie_word_embeddings", False
    )
    classes = getattr(type(model), "_tied_weights_keys", None)
    # An encoder-decoder may scale its outputs by this field, whatever is tied.
    if holding or not declared or not classes or getattr(model.config, "is_encoder_decoder", False):
        return config
    made = {
        name: {**value, "tie_word_embeddings": False}
        if isinstance(value, dict) and value.get("tie_word_embeddings")
        else value
        for name, value in config.items()
    }
    return {**made, "tie_word_embeddings": False}


def same_tensor(one: Tensor, two: Tensor) -> bool:
    """Whether two names stand for one tensor; without contents, whether they are one object's."""
    if one.is_meta or two.is_meta:
        return one.is_meta and two.is_meta
    return one.data_ptr() == two.data_ptr() and one.shape == two.shape


def write_provenance(folder: Path, provenance: Mapping[str, Any] | None) -> None:
    if provenance is not None:
        # What it says of ancestors holds for these weights alone, and others may come to lie beside it.
        own = {WEIGHTS: TensorFolder(folder).fingerprint} if ANCESTORS in provenance else {}
        text = json.dumps({**provenance, **own}, indent=2, sort_keys=True)
        (folder / PROVENANCE).write_text(text + "\n")


def write_folder(
    folder: Path,
    model: nn.Module,
    infos: Mapping[str, TensorInfo],
    tensor: Callable[[str], Tensor],
    provenance: dict[str, Any] | None,
    shard_bytes: int = SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
    unplaced: Iterable[str] = (),
    quantisation: Mapping[str, Any] | None = None,
) -> None:
    """Weights and configuration of a checkpoint of ``model``, whose tensors ``tensor(name)`` gives one by one.

    A model with merged or compressed layers becomes a compact checkpoint, any other a stock one.

    Args:
        infos: every tensor to write, by the name it gets.
        config: fields of config.json as the base model's would be; those of ``model`` if None.
        unplaced: names among ``infos`` for which the model has no place.
        quantisation: of a compact checkpoint, the settings by which some of its tensors are quantised.
    """
    infos, specs = by_alignment(infos), specs_of(model)
    written = dict(fields.config_of(model) if config is None else config)
    section = compact.make_section(model.config.model_type, specs, provenance, unplaced, quantisation)  # type: ignore[union-attr, arg-type]
    note = compact.metadata(section) if specs else {}
    digests = write_tensors(folder, infos, ((name, tensor(name)) for name in infos), note, shard_bytes)
    if specs:
        compact.write_config(folder, written, section, digests)
        write_sums(folder, digests)
        return
    fields.write_json(folder / "config.json", written)
    write_provenance(folder, provenance)
