"""Experts of layers for multi-token prediction, which the model class has no place for, made as many as the others are.

Nothing runs these layers here, so their experts are chosen by the norms of their weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe.adapters.counts import experts_said
from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint import fields, leftovers
from mcsmoe.console import log

# A matrix of one expert, or a stack of all of them; then what else of the block has an entry for each expert.
_ONE = re.compile(r"^(?P<block>.+?)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)$")
_STACK = re.compile(r"^(?P<block>.+?)\.experts\.(?P<rest>[^.]+(?:\.(?:weight|bias))?)$")
_ROUTER = re.compile(r"\.(?:gate|router)\.[^.]+$|\.expert_bias$")

_OTHER_NUMBER = "it has experts of its own, which do not have the new number"

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Kept:
    """Tensors of a result that stand for others of the source.

    Attributes:
        infos: what they need on disk, by their new names.
        sources: by new name the old one, and the experts that are kept of a stack or a router, or None for a whole tensor.
    """

    infos: dict[str, TensorInfo]
    sources: dict[str, tuple[str, Tensor | None]]

    def read(self, name: str, read: Read) -> Tensor:
        """The tensor of that new name."""
        source, kept = self.sources[name]
        return read(source) if kept is None else read(source)[kept]

    def renamed(self, name: str, part: str) -> str:
        """What ``part`` of the source's tensor is called in the result, where the tensor is ``name``."""
        here, there = name.rpartition(".")[0], self.sources[name][0].rpartition(".")[0]
        return here + part.removeprefix(there)

    @classmethod
    def whole(cls, infos: Mapping[str, TensorInfo]) -> Kept:
        """Tensors as they are, under their own names."""
        return cls(dict(infos), {name: (name, None) for name in infos})

    def __or__(self, other: Kept) -> Kept:
        return Kept({**self.infos, **other.infos}, {**self.sources, **other.sources})


def keep(
    folder: Path,
    unplaced: Mapping[str, TensorInfo],
    configs: tuple[Mapping[str, Any], dict[str, Any]],
    model_config: Any,
    sets: int,
    read: Read,
    drop: bool = False,
) -> tuple[Kept, dict[str, Any]]:
    """What a result holds of the ``unplaced`` tensors of its source, and its configuration, made true of that.

    Args:
        folder: of the source, for messages.
        configs: fields of config.json of the source, and of the result.
        model_config: the configuration object of the source.
        sets: of consecutive experts that a router chooses among first.
        read: gives a tensor of the source by its name.
        drop: leave layers for multi-token prediction out.
    """
    before, after = (fields.experts_by_path(config) for config in configs)
    changed, said = before != after, [experts_said(config) for config in configs]
    ahead = {name: info for name, info in unplaced.items() if leftovers.is_prediction(name, model_config)}
    others = {name: info for name, info in unplaced.items() if name not in ahead}
    kept = Kept.whole(leftovers.kept(others, changed, model_config))
    leftovers.say_left_out(folder, [name for name in others if name not in kept.infos], _OTHER_NUMBER)
    found: Kept | None = None
    if not drop and len(leftovers.kept(ahead, changed, model_config)) == len(ahead):
        found = Kept.whole(ahead)
    elif not drop and all(len(numbers) == 1 for numbers in said):
        found = fewer_experts(ahead, said[0][0], said[1][0], sets, read)
        if found is not None:
            told = folder, leftovers.listed(ahead), said[1][0], said[0][0]
            log.info("%s: %s get %d of %d experts, those whose weights have the largest norms", *told)
    if found is not None:
        return kept | found, configs[1]
    leftovers.say_left_out(folder, ahead, "--mtp drop" if drop else _OTHER_NUMBER)
    return kept, leftovers.without_prediction(configs[1]) if ahead else configs[1]


def fewer_experts(unplaced: Mapping[str, TensorInfo], before: int, after: int, sets: int, read: Read) -> Kept | None:
    """The layers of ``unplaced`` with ``after`` of their ``before`` experts; None if it is not clear which those are.

    Args:
        unplaced: tensors of whole layers for multi-token prediction, by name.
        sets: of consecutive experts that a router chooses among first; each keeps as many.
        read: gives a tensor by its name.
    """
    blocks = {found["block"] for name in unplaced if (found := _ONE.match(name) or _STACK.match(name))}
    made = Kept({}, {})
    kept_of = {block: _kept(block, unplaced, before, after, sets, read) for block in blocks}
    if any(kept is None for kept in kept_of.values()):
        return None
    for name, info in unplaced.items():
        block = max((one for one in blocks if name.startswith(f"{one}.")), key=len, default="")
        kept = kept_of.get(block)
        if kept is None:
            made.infos[name], made.sources[name] = info, (name, None)
            continue
        if one := _ONE.match(name):
            place = (kept == int(one["expert"])).nonzero()
            if len(place):
                renamed = f"{block}.experts.{int(place)}.{one['rest']}"
                made.infos[renamed], made.sources[renamed] = info, (name, None)
            continue
        inside = name.removeprefix(block)
        if _STACK.match(name) or _ROUTER.search(inside):
            if not info.shape or info.shape[0] != before:
                return None
            made.infos[name] = TensorInfo(info.dtype, (after, *info.shape[1:]))
            made.sources[name] = name, kept
        else:
            made.infos[name], made.sources[name] = info, (name, None)
    return made


def _kept(
    block: str, unplaced: Mapping[str, TensorInfo], before: int, after: int, sets: int, read: Read
) -> Tensor | None:
    """[after]: experts of ``block`` whose matrices have the largest norms, multiplied, in ascending order."""
    own = [name for name in unplaced if name.startswith(f"{block}.experts.")]
    score_E = torch.zeros(before, dtype=torch.float64)
    seen: set[int] = set()
    for name in own:
        one = _ONE.match(name)
        if one is not None:
            expert = int(one["expert"])
            if expert >= before:
                return None
            seen.add(expert)
            score_E[expert] += _norms(read(name)[None])[0]
        elif unplaced[name].shape[:1] == (before,):
            score_E += _norms(read(name))
    if seen and seen != set(range(before)):
        return None
    width = before // sets
    # Rounded, so that the last bits of another machine choose no other experts.
    ranked = score_E.reshape(sets, width).mul(1e9).round().sort(dim=1, descending=True, stable=True).indices
    starts = torch.arange(sets)[:, None] * width
    return (ranked[:, : after // sets] + starts).flatten().sort().values


def _norms(stack: Tensor) -> Tensor:
    """[E]: logarithms of the norms of the matrices in a stack; nothing for vectors, which have no part in the choice."""
    if stack.ndim < 3:
        return torch.zeros(len(stack), dtype=torch.float64)
    return stack.double().flatten(1).norm(dim=1).clamp(min=1e-300).log()
