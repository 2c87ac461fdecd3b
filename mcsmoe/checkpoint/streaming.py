"""A checkpoint opened without its weights: layers are read when asked for, changed, and written one at a time.

Peak memory of changing a checkpoint is that of one sparse layer and its copies, whatever the size of the model. A
forward pass keeps what is not an expert in memory and reads experts from the files as they are called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.digests import check_sums
from mcsmoe.artefacts.tensors import SHARD_BYTES, TensorFolder
from mcsmoe.checkpoint import fields, leftovers
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.absent import forget, nothing_empty
from mcsmoe.checkpoint.companions import copy_companions
from mcsmoe.checkpoint.lineage import ANCESTORS, lineage
from mcsmoe.checkpoint.load import compact_weights, resolve
from mcsmoe.checkpoint.names import NameMap
from mcsmoe.checkpoint.prediction import Kept, keep
from mcsmoe.checkpoint.quantised.folder import Dequantised
from mcsmoe.checkpoint.quantised.settings import without_quantisation
from mcsmoe.checkpoint.rewriting import rewrite
from mcsmoe.checkpoint.save import own_tensors, place, tensor_of, true_ties
from mcsmoe.checkpoint.skeleton import fill_buffers, parse_dtype, run_dtypes, skeleton, stock_skeleton
from mcsmoe.checkpoint.stacking import Stack, stack_of
from mcsmoe.checkpoint.vetting import open_weights, refuse_scales
from mcsmoe.types import ExpertWeights, LayerId, LayerSpec


class Streamed:
    """A stock or compact checkpoint folder: its model on the meta device, and its weights on disk.

    Attributes:
        model: structure; weights are there only where ``load`` brought them in.
        adapter: of the model's family.
        specs: structure of every merged or compressed layer; empty for a stock checkpoint.
        keeps_prediction: whether results keep layers for multi-token prediction.

    Raises:
        ValueError: not a checkpoint, or one with a file that is truncated, altered or foreign; names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = resolve(path)
        self.keeps_prediction = True
        check_sums(self.folder, lambda name: not name.endswith(".safetensors"))
        self.config = compact.read_config(self.folder)
        self.compact = compact.SECTION in self.config
        unplaced: frozenset[str] = frozenset()
        self.specs: Mapping[LayerId, LayerSpec] = {}
        if self.compact:
            found = compact.CompactConfig.of(self.folder, self.config)
            self.tensors: TensorFolder = compact_weights(self.folder, found)
            self.model: Any = skeleton(found)
            for name, sha256 in found.files.items():
                self.tensors.files[name].verify(sha256)
            unplaced, self.specs = found.unplaced, found.layers
        else:
            self.tensors = open_weights(self.folder, self.config)
            self.model = stock_skeleton(self.folder, self.config)
        try:
            self.adapter = adapter_for(self.model)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error
        try:
            self.names = NameMap(self.model, self.tensors, stored_as_named=self.compact)
        except TypeError as error:  # a field of config.json by which the library looks a name up
            raise ValueError(f"{self.folder}/config.json: {error}; correct it, or restore the file") from error
        self.unplaced = self.names.unplaced
        self._check_unplaced(unplaced)
        with self.naming_the_quantiser():
            self._settle_formats()
        if not self.compact:
            check_sums(self.folder, lambda name: name in self.tensors.files)
        self._before = fields.written(self.model.config)
        self._stack: dict[str, Stack | None] = {}
        self.model.eval()

    def _check_unplaced(self, known: frozenset[str]) -> None:
        kind = type(self.model).__name__
        if not self.compact:
            refuse_scales(self.tensors, self.unplaced, kind)
        elif strange := sorted(set(self.unplaced) - known):
            raise ValueError(
                f"{self.tensors.where[strange[0]].path}: tensor {strange[0]!r} has no place in the model; it is altered or "
                "of another model; restore or rebuild it"
            )
        leftovers.say_kept(self.folder, self.unplaced, kind)

    def _settle_formats(self) -> None:
        """Compare with the headers; the structure then says the number formats in which the files hold its tensors."""
        own = self.own_names()
        self.names.check(own)
        said = parse_dtype(fields.said_dtype(self.config))
        self._run_formats = run_dtypes(self.model, said) if said else {}
        for name in own:
            stored = self.names.stored_dtype(name)
            if stored != tensor_of(self.model, name).dtype:
                place(self.model, name, torch.empty_like(tensor_of(self.model, name), dtype=stored))
        self._stored = {name: tensor_of(self.model, name).dtype for name in own}
        self.model.tie_weights(recompute_mapping=False)

    @property
    def layers(self) -> list[LayerId]:
        """Sparse layers in forward order."""
        return self.adapter.layers(self.model)

    @property
    def quantised(self) -> Dequantised | None:
        """The weights, where some of them are quantised in the files."""
        return self.tensors if isinstance(self.tensors, Dequantised) else None

    @contextmanager
    def naming_the_quantiser(self) -> Iterator[None]:
        """What is refused inside says that the weights are quantised, and how, where they are."""
        try:
            yield
        except ValueError as error:
            if self.quantised is None:
                raise
            raise ValueError(f"{error} (the checkpoint is quantised: {self.quantised.settings.method})") from error

    @property
    def files(self) -> TensorFolder:
        """The weights as they are in the files."""
        return self.tensors if self.quantised is None else self.quantised.stored

    @property
    def digest(self) -> str:
        """SHA-256 over config.json and the fingerprint of the weights, for provenance: no weight file is read whole for it."""
        written = (self.folder / "config.json").read_bytes()
        return hashlib.sha256(written + self.tensors.fingerprint.encode()).hexdigest()

    @cached_property
    def lineage(self) -> list[str]:
        """Fingerprints of the weights, and of those that they were made from with the experts kept."""
        return lineage(self.folder, self.tensors.fingerprint)

    @property
    def origin(self) -> dict[str, Any]:
        """What the provenance of a checkpoint says that is made from this one."""
        return {"parent": self.digest, ANCESTORS: self.lineage}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files that are read."""
        return self.tensors.nbytes

    def own_names(self) -> list[str]:
        """Names of the model's stored tensors, tied ones once."""
        return list(own_tensors(self.model))

    def config_fields(self, config: Any = None) -> dict[str, Any]:
        """The fields of the file that was read, with what changed since in the model's configuration, or in ``config``.

        They are those of plain weights, whatever the files hold.
        """
        now = self.model.config if config is None else config
        source = without_quantisation(fields.source_fields(self.config))
        made = fields.updated(source, self._before, fields.written(now), now)
        return true_ties(self.model, made)

    # -- reading -------------------------------------------------------------------------------------------------
    def load(self, names: Iterable[str]) -> None:
        """Bring the given tensors of the model into memory; one that a change has added and no file holds is zero."""
        sources: dict[str, Tensor] = {}
        units = self.names.units
        for name in names:
            if name not in units:
                place(self.model, name, torch.zeros_like(tensor_of(self.model, name), device="cpu"))
            elif (stack := self._stacks(name)) is not None:
                place(
                    self.model,
                    name,
                    stack.read(self.tensors, self._stored.get(name, tensor_of(self.model, name).dtype)),
                )
            elif name in self.names.converted:
                dtype = self._stored.get(name, tensor_of(self.model, name).dtype)
                sources |= {one: self.tensors.read(one).to(dtype) for one in units[name] if one not in sources}
            else:
                place(self.model, name, self.tensors.read(units[name][0]))
        if sources:
            self._convert(sources)

    def _stacks(self, name: str) -> Stack | None:
        """Where the stored experts of a tensor go, if they are only stacked in it."""
        if name not in self.names.converted:
            return None
        if name not in self._stack:
            self._stack[name] = stack_of(self.names, name)
        return self._stack[name]

    def load_to_run(self, names: Iterable[str]) -> None:
        """The same, in the number formats in which transformers would run the model."""
        wanted = list(names)
        self.load(wanted)
        for name in wanted:
            tensor = tensor_of(self.model, name)
            run = self._run_formats.get(name, tensor.dtype)
            if tensor.dtype != run and tensor.is_floating_point():
                place(self.model, name, tensor.to(run))

    def forget_below(self, path: str) -> None:
        """Take every tensor of the module ``path`` out of memory; of the whole model for an empty path."""
        forget(self.model.get_submodule(path), self._stored, path)
        if not path:
            self.model.tie_weights(recompute_mapping=False)

    def forget(self, names: Iterable[str]) -> None:
        """Take the given tensors of the model out of memory."""
        for name in names:
            old = tensor_of(self.model, name)
            place(self.model, name, torch.empty_like(old, dtype=self._stored.get(name, old.dtype), device="meta"))

    def _convert(self, sources: dict[str, Tensor]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            settings = LoadStateDictConfig(
                dtype=next(iter(sources.values())).dtype, weight_mapping=self.names.transforms
            )
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
        return list(dict.fromkeys(stored for name in names for stored in self.names.units.get(name, ())))

    @contextmanager
    def layer(self, layer: LayerId) -> Iterator[None]:
        """The weights of ``layer`` are in memory inside the context, and gone after it."""
        self.load(self.names_below(layer))
        try:
            yield
        finally:
            self.forget_below(layer)

    def experts(self, layer: LayerId) -> ExpertWeights:
        """The experts of ``layer``, read for the caller alone: what is in memory of the model stays as it is."""
        routers = set(self.adapter.router_parameters(self.model))
        names = [name for name in self.names_below(layer) if name not in routers]
        self.load(names)
        try:
            return self.adapter.read_experts(self.model, layer)
        finally:
            self.forget(names)

    def read(self, name: str) -> Tensor:
        """One tensor of the model, as it is stored."""
        units = self.names.units
        if name not in units:
            return torch.zeros_like(tensor_of(self.model, name), device="cpu")
        if name not in self.names.converted:
            return self.tensors.read(units[name][0])
        self.load([name])
        # One conversion may have brought in others beside it: all go back.
        tensor = tensor_of(self.model, name)
        source, state = units[name], set(self.model.state_dict())
        self.forget(other for other, unit in units.items() if unit is source and other in state)
        return tensor

    # -- running -------------------------------------------------------------------------------------------------
    @contextmanager
    def runnable(self) -> Iterator[nn.Module]:
        """The model, able to run: a layer's experts are read from the files when it is called, and forgotten after.

        What is not an expert stays in memory, and so does all of a module that holds a router: a bias or a table beside
        the router's weight is as much a part of the choice.

        Raises:
            RuntimeError: inside, when a tensor without contents enters a computation.
        """
        model = self.model
        demanded = self._demanded()
        waiting = {name for names in demanded.values() for name in names}
        self.load_to_run(name for name in self.own_names() if name not in waiting)
        model.tie_weights(recompute_mapping=False)
        hooks: list[Any] = []
        for layer, names in demanded.items():
            module = model.get_submodule(layer)
            hooks.append(module.register_forward_pre_hook(lambda *_, names=names: self.load_to_run(names)))
            hooks.append(module.register_forward_hook(lambda *_, names=names: self.forget(names), always_call=True))
        fill_buffers(model, torch.device("cpu"))
        try:
            with torch.no_grad(), nothing_empty():
                yield model
        finally:
            for hook in hooks:
                hook.remove()
            self.forget_below("")

    def _demanded(self) -> dict[LayerId, list[str]]:
        """By sparse layer, its tensors that a run reads when the layer is called: all that share no module with a router."""
        beside = {name.rpartition(".")[0] for name in self.adapter.router_parameters(self.model)}
        return {
            layer: [name for name in self.names_below(layer) if name.rpartition(".")[0] not in beside]
            for layer in self.layers
        }

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
        rewrite(self, out, change, provenance, self.layers if layers is None else layers, extra, shard_bytes)

    def keep_unplaced(self, config: dict[str, Any]) -> tuple[Kept, dict[str, Any]]:
        """What has no place in the model and goes into a result all the same, and the result's ``config`` made true of it.

        Layers for multi-token prediction get as many experts as the others have, unless ``keeps_prediction`` is off.
        """
        return keep(
            self.folder,
            self.unplaced,
            (fields.source_fields(self.config), config),
            self.model.config,
            sets=self.adapter.expert_sets(self.model, self.layers[0]),
            read=self.tensors.read,
            drop=not self.keeps_prediction,
        )

    def overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Change tensors in the files of a stock checkpoint that is still being made.

        Raises:
            ValueError: a tensor that is not stored as it is; names it.
        """
        for name, tensor in tensors.items():
            if self.compact or name in self.names.converted:
                raise ValueError(
                    f"{self.folder}: tensor {name!r} is not stored by itself, so it cannot be changed alone"
                )
            stored = self.names.units[name][0]
            self.tensors.where[stored].overwrite(stored, tensor)

    def copy_companions(self, folder: Path) -> None:
        """Copy what belongs to the model beside its weights: tokenizer, templates, licence, code."""
        copy_companions(self.folder, folder)
