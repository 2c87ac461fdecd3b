"""A checkpoint opened without its weights: layers are read when asked for, changed, and written one at a time.

Peak memory of changing a checkpoint is that of one sparse layer and its copies, whatever the size of the model. A
forward pass keeps what is not an expert in memory and reads experts from the files as they are called.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.digests import check_sums, digest_files
from mcsmoe.artefacts.tensors import (
    INDEX,
    SHARD_BYTES,
    TensorFile,
    TensorFolder,
    TensorInfo,
    by_alignment,
    write_tensors,
)
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.load import resolve
from mcsmoe.checkpoint.save import PROVENANCE, own_tensors, tensor_of, write_folder
from mcsmoe.checkpoint.skeleton import fill_buffers, model_class, skeleton
from mcsmoe.types import ExpertWeights, LayerId

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
_OURS = ("config.json", INDEX, PROVENANCE)


class Streamed:
    """A stock or compact checkpoint folder: its model on the meta device, and its weights on disk.

    Attributes:
        model: structure; weights are there only where ``load`` brought them in.
        adapter: of the model's family.

    Raises:
        ValueError: not a checkpoint, or one with a file that is truncated, altered or foreign; names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = resolve(path)
        check_sums(self.folder, lambda name: not name.endswith(".safetensors"))
        config = compact.read_config(self.folder)
        self.compact = compact.SECTION in config
        if self.compact:
            section = compact.read_section(self.folder)
            for name, sha256 in section["files"].items():
                file = TensorFile(self.folder / name)
                compact.check_structure(file.path, file.metadata, section)
                file.verify(sha256)
            self.model: Any = skeleton(self.folder)
        else:
            self.model = _stock_skeleton(self.folder, config)
        self.tensors = TensorFolder(self.folder)
        if not self.compact:
            check_sums(self.folder, lambda name: name.endswith(".safetensors"))
        self.adapter = adapter_for(self.model)
        self._transforms: list[Any] = []
        self._units: dict[str, list[str]] = {}
        self._converted: set[str] = set()
        self._map_names()
        self.model.eval()

    @property
    def layers(self) -> list[LayerId]:
        """Sparse layers in forward order."""
        return self.adapter.layers(self.model)

    @property
    def digest(self) -> str:
        """SHA-256 over configuration and weight files, for provenance."""
        return digest_files([self.folder / "config.json", *sorted(file.path for file in self.tensors.files.values())])

    # -- names ---------------------------------------------------------------------------------------------------
    def _map_names(self) -> None:
        """Which tensors on disk each tensor of the model is made of."""
        state, model = self.model.state_dict(), self.model
        if self.compact:
            self._units = {name: [name] for name in self.tensors.where}
        else:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            self._transforms = get_model_conversion_mapping(model)
            renamings = [one for one in self._transforms if isinstance(one, WeightRenaming)]
            converters = [one for one in self._transforms if isinstance(one, WeightConverter)]
            by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
            for name in self.tensors.where:
                key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
                if key not in state and name in state:
                    key, pattern = name, None
                unit = self._units.setdefault(key, [])
                unit.append(name)
                if pattern is not None:
                    targets = by_pattern[pattern].target_patterns
                    for target in targets:
                        self._units.setdefault(key.replace(targets[0], target), unit)
                        self._converted.add(key.replace(targets[0], target))
        missing = [name for name in self.own_names() if name not in self._units]
        if missing:
            raise ValueError(f"{self.folder}: {len(missing)} weights are missing, among them {missing[0]!r}")
        for name in self.own_names():
            stored = self.tensors.infos[self._units[name][0]]
            if name not in self._converted and stored.shape != tuple(state[name].shape):
                raise ValueError(
                    f"{self.tensors.where[self._units[name][0]].path}: tensor {name!r} has shape {stored.shape}, the "
                    f"model needs {tuple(state[name].shape)}"
                )
            if stored.dtype != state[name].dtype:
                place(model, name, torch.empty(state[name].shape, dtype=stored.dtype, device="meta"))
        model.tie_weights()

    def own_names(self) -> list[str]:
        """Names of the model's stored tensors, tied ones once."""
        return list(own_tensors(self.model))

    # -- reading -------------------------------------------------------------------------------------------------
    def load(self, names: Iterable[str]) -> None:
        """Bring the given tensors of the model into memory; one that a change has added and no file holds is zero."""
        sources: dict[str, Tensor] = {}
        for name in names:
            if name not in self._units:
                place(self.model, name, torch.zeros_like(tensor_of(self.model, name), device="cpu"))
            elif name in self._converted:
                sources |= {source: self.tensors.read(source) for source in self._units[name] if source not in sources}
            else:
                dtype = tensor_of(self.model, name).dtype
                place(self.model, name, self.tensors.read(self._units[name][0]).to(dtype))
        if sources:
            self._convert(sources)

    def _convert(self, sources: dict[str, Tensor]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            settings = LoadStateDictConfig(dtype=next(iter(sources.values())).dtype, weight_mapping=self._transforms)
            found, _ = convert_and_load_state_dict_in_model(self.model, sources, settings)
        finally:
            if bars:
                logging.enable_progress_bar()
        if found.conversion_errors or found.error_msgs:
            problem = next(iter(found.conversion_errors.values()), None) or found.error_msgs[0]
            raise ValueError(f"{self.folder}: tensor {next(iter(sources))!r} and those beside it do not fit: {problem}")

    def names_below(self, module: str) -> list[str]:
        """Own tensors of the model below the module path ``module``."""
        return [name for name in self.own_names() if name.startswith(f"{module}.")]

    def stored_names(self, names: Iterable[str]) -> list[str]:
        """Names in the files of all that the given tensors of the model are made of."""
        return list(dict.fromkeys(stored for name in names for stored in self._units.get(name, ())))

    @contextmanager
    def layer(self, layer: LayerId) -> Iterator[None]:
        """The weights of ``layer`` are in memory inside the context, and gone after it."""
        self.load(self.names_below(layer))
        try:
            yield
        finally:
            forget(self.model.get_submodule(layer))

    def experts(self, layer: LayerId) -> ExpertWeights:
        """The experts of ``layer``, read for the caller alone: what is in memory of the model stays as it is."""
        routers = set(self.adapter.router_parameters(self.model))
        names = [name for name in self.names_below(layer) if name not in routers]
        self.load(names)
        try:
            return self.adapter.read_experts(self.model, layer)
        finally:
            for name in names:
                place(self.model, name, torch.empty_like(tensor_of(self.model, name), device="meta"))

    def read(self, name: str) -> Tensor:
        """One tensor of the model, as it is stored."""
        if name not in self._units:
            return torch.zeros_like(tensor_of(self.model, name), device="cpu")
        if name not in self._converted:
            return self.tensors.read(self._units[name][0])
        self.load([name])
        # One conversion may have brought in others beside it: all go back.
        tensor = tensor_of(self.model, name)
        source = self._units[name]
        for other, unit in self._units.items():
            if unit is source and other in self.model.state_dict():
                place(self.model, other, torch.empty_like(tensor_of(self.model, other), device="meta"))
        return tensor

    # -- running -------------------------------------------------------------------------------------------------
    @contextmanager
    def runnable(self) -> Iterator[nn.Module]:
        """The model, able to run: experts are read from the files each time they are called, and forgotten after."""
        model, routers = self.model, set(self.adapter.router_parameters(self.model))
        layers = tuple(f"{layer}." for layer in self.layers)
        experts = [name for name in self.own_names() if name.startswith(layers) and name not in routers]
        demanded: dict[str, list[str]] = {}
        for name in experts:
            demanded.setdefault(name.rpartition(".")[0], []).append(name)
        self.load(name for name in self.own_names() if name not in set(experts))
        model.tie_weights()
        hooks: list[Any] = []
        for path, names in demanded.items():
            module = model.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(lambda *_, names=names: self.load(names)))
            hooks.append(module.register_forward_hook(lambda module, *_: forget(module, deep=False)))
        fill_buffers(model, torch.device("cpu"))
        try:
            with torch.no_grad():
                yield model
        finally:
            for hook in hooks:
                hook.remove()
            forget(model)
            model.tie_weights()

    # -- writing -------------------------------------------------------------------------------------------------
    def rewrite(
        self,
        out: str | Path,
        change: Callable[[LayerId], object],
        provenance: Mapping[str, Any],
        layers: Iterable[LayerId] | None = None,
        extra: Callable[[Path], object] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write the checkpoint to ``out`` with ``change(layer)`` applied to each layer in turn, each alone in memory.

        Args:
            layers: which layers are changed; all of them if None.
            extra: writes further files into the folder before it appears.
        """
        with atomic_directory(out) as folder, Spool.inside(folder) as spool:
            for layer in self.layers if layers is None else layers:
                with self.layer(layer):
                    change(layer)
                    state = self.model.get_submodule(layer).state_dict()
                    spool.add({f"{layer}.{name}": tensor for name, tensor in state.items()})
            whole = own_tensors(self.model)
            infos = {name: spool.infos.get(name, TensorInfo.of(whole[name])) for name in whole}

            def tensor(name: str) -> Tensor:
                if name in spool.infos:
                    return spool.read(name)
                return self.read(name) if whole[name].is_meta else whole[name]

            self.copy_companions(folder)
            write_folder(folder, self.model, infos, tensor, dict(provenance), shard_bytes)
            if extra is not None:
                extra(folder)

    def overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Change tensors in the files of a stock checkpoint that is still being made.

        Raises:
            ValueError: a tensor that is not stored as it is; names it.
        """
        for name, tensor in tensors.items():
            if self.compact or name in self._converted:
                raise ValueError(
                    f"{self.folder}: tensor {name!r} is not stored by itself, so it cannot be changed alone"
                )
            stored = self._units[name][0]
            self.tensors.where[stored].overwrite(stored, tensor)

    def copy_companions(self, folder: Path) -> None:
        """Copy the tokenizer and the other small files that belong to the model."""
        for pattern in _COMPANIONS:
            for file in sorted(self.folder.glob(pattern)):
                if file.name not in _OURS and file.is_file():
                    shutil.copyfile(file, folder / file.name)


def _stock_skeleton(folder: Path, config: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    cls = model_class(folder, config)
    try:
        filled = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    with torch.device("meta"), no_init_weights():
        model = cls(filled)
    model.tie_weights()
    try:
        adapter_for(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return model


class Spool:
    """Finished tensors, kept on disk until all that a checkpoint's header must say is known."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, TensorFile] = {}
        self._parts = 0

    @classmethod
    @contextmanager
    def inside(cls, folder: Path) -> Iterator[Spool]:
        """One inside an unfinished output, so that it is on the disk with the room for it."""
        place = folder / ".layers"
        place.mkdir()
        try:
            yield cls(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write ``tensors``; their memory may be reused after it."""
        part = self.place / str(self._parts)
        part.mkdir()
        self._parts += 1
        infos = by_alignment({name: TensorInfo.of(tensor) for name, tensor in tensors.items()})
        write_tensors(part, infos, ((name, tensors[name]) for name in infos), shard_bytes=2**62)
        file = TensorFile(part / "model.safetensors")
        self.infos |= infos
        self._files |= dict.fromkeys(infos, file)

    def read(self, name: str) -> Tensor:
        return self._files[name].read(name)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)


def forget(module: nn.Module, deep: bool = True) -> None:
    """Replace the stored tensors of ``module`` (and below) by empty ones; structure such as redirect tables stays."""
    for part in module.modules() if deep else [module]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            if name not in part._non_persistent_buffers_set:
                setattr(part, name, torch.empty_like(buffer, device="meta"))
