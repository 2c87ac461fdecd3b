"""Which tensors on disk each tensor of a model is made of, by the rules that transformers itself loads with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mcsmoe.artefacts.tensors import TensorFolder, TensorInfo


class NameMap:
    """The tensors of ``model`` (a structure without weights) and those of ``tensors``, matched.

    Attributes:
        units: names on disk by the model's name; several where a conversion makes one of them, and tied names alike.
        converted: names of the model that a conversion makes; all others are stored as they are.
        unplaced: what the files hold and the model has no place for.
        transforms: the library's own renamings and conversions.

    Ties are decided as transformers decides them on loading: names that the configuration ties stay tied unless the
    files hold both with different contents; ``model.all_tied_weights_keys`` says afterwards what is tied.
    """

    def __init__(self, model: Any, tensors: TensorFolder, stored_as_named: bool) -> None:
        self.model, self.tensors = model, tensors
        self.units: dict[str, list[str]] = {}
        self.converted: set[str] = set()
        self.unplaced: dict[str, TensorInfo] = {}
        self.transforms: list[Any] = []
        self.patterns: dict[str, str] = {}  # by stored name, the pattern of the conversion that takes it
        self.converters: dict[Any, Any] = {}  # by pattern
        self._partly: set[int] = set()  # units of which the model takes a part only
        self.state: Mapping[str, Any] = model.state_dict()
        state = self.state
        if stored_as_named:
            self.units = {name: [name] for name in tensors.where if name in state}
        else:
            self._match(state)
        placed = {name for unit in self.units.values() for name in unit}
        infos = tensors.infos
        self.unplaced = {name: infos[name] for name in tensors.where if name not in placed}
        self._settle_ties(state)

    def _match(self, state: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.transforms = get_model_conversion_mapping(self.model)
        renamings = [one for one in self.transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in self.transforms if isinstance(one, WeightConverter)]
        self.converters = by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        for name in self.tensors.where:
            key, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if key not in state and name in state:
                key, pattern = name, None
            targets = [key]
            if pattern is not None:
                patterns = by_pattern[pattern].target_patterns
                targets = [key.replace(patterns[0], target) for target in patterns]
            if not any(target in state for target in targets):
                continue
            unit = self.units.setdefault(targets[0], [])
            unit.append(name)
            for target in targets[1:]:
                self.units.setdefault(target, unit)
            if pattern is not None:
                self.patterns[name] = pattern
                self.converted |= set(targets)
                if not all(target in state for target in targets):
                    self._partly.add(id(unit))

    # -- ties ----------------------------------------------------------------------------------------------------
    def _settle_ties(self, state: Mapping[str, Any]) -> None:
        model = self.model
        tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        present = set(self.units)
        for target, source in tied.items():
            if target in present and source in present:
                if self._differ(target, source):
                    model.all_tied_weights_keys.pop(target)
                    untie(model, target)
            elif target in present:
                self.units[source] = self.units[target]
            elif source not in present:
                others = [other for other, same in tied.items() if same == source and other in present]
                if others:
                    self.units[source] = self.units[others[0]]
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            if target in state and source in self.units:
                self.units.setdefault(target, self.units[source])

    def _differ(self, one: str, two: str) -> bool:
        if self.units[one] == self.units[two]:
            return False
        if one in self.converted or two in self.converted:
            return True
        names = self.units[one][0], self.units[two][0]
        first, second = (self.tensors.where[name] for name in names)
        if self.info(names[0]) != self.info(names[1]):
            left, right = first.read(names[0]), second.read(names[1])
            return left.shape != right.shape or not torch.equal(left.float(), right.float())
        return any(a != b for a, b in zip(first.chunks(names[0]), second.chunks(names[1]), strict=True))

    # -- what a loader asks --------------------------------------------------------------------------------------
    def stored_dtype(self, name: str) -> torch.dtype:
        """Number format of the tensors that ``name`` is made of; that of the model where they are several."""
        found = {self.info(one).dtype for one in self.units[name]}
        return found.pop() if len(found) == 1 else tensor_dtype(self.model, name)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a stored tensor, as the model takes it."""
        return self.tensors.where[name].tensors[name]

    def check(self, own: list[str]) -> None:
        """Raise ValueError naming the first of the model's ``own`` tensors that the files lack or hold in another shape."""
        missing = [name for name in own if name not in self.units]
        if missing:
            raise ValueError(f"{self.tensors.folder}: {len(missing)} weights are missing, among them {missing[0]!r}")
        state = self.model.state_dict()
        needs: dict[int, int] = {}
        for name in own:
            key = id(self.units[name])
            needs[key] = needs.get(key, 0) + state[name].numel()
        for name in own:
            unit = self.units[name]
            stored, needed = self.info(unit[0]), state[name]
            if name not in self.converted:
                if stored.shape != tuple(needed.shape):
                    raise ValueError(
                        f"{self.tensors.where[unit[0]].path}: tensor {unit[0]!r} has shape {stored.shape}, the model needs "
                        f"{tuple(needed.shape)}"
                    )
                if needed.is_floating_point() and not stored.dtype.is_floating_point:
                    dtype = str(stored.dtype).removeprefix("torch.")
                    raise ValueError(
                        f"{self.tensors.where[unit[0]].path}: tensor {unit[0]!r} holds {dtype} where the model needs real "
                        "numbers; quantised weights are not read, start from the model in bfloat16 or float32"
                    )
                continue
            held = sum(math.prod(self.info(one).shape) for one in unit)
            if id(unit) not in self._partly and held != needs[id(unit)]:
                raise ValueError(
                    f"{self.tensors.folder}: tensor {name!r} and those beside it need {needs[id(unit)]:,} numbers, but "
                    f"{len(unit)} tensors such as {unit[0]!r} hold {held:,}; config.json and the files are not of one model"
                )


def tensor_dtype(model: nn.Module, name: str) -> torch.dtype:
    path, _, attribute = name.rpartition(".")
    found: torch.dtype = getattr(model.get_submodule(path), attribute).dtype
    return found


def untie(model: nn.Module, name: str) -> None:
    """Give ``name`` a tensor of its own, without contents if it had none."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    fresh = torch.empty_like(old) if old.is_meta else old.detach().clone()
    setattr(module, attribute, nn.Parameter(fresh, requires_grad=False) if isinstance(old, nn.Parameter) else fresh)
