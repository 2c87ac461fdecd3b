"""Experts that are stored apart, read straight into the places that they have in a stacked parameter.

The library reads all of them, stacks them, and joins the stacks: at its peak it holds a layer more than twice. Where its
own rules say no more than that (one tensor for each expert and pattern, joined along the second axis), the same is done here
with one copy of the layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorFolder

if TYPE_CHECKING:
    from mcsmoe.checkpoint.names import NameMap


@dataclass(frozen=True)
class Stack:
    """Where the stored tensors of a stacked parameter go.

    Attributes:
        shape: of the parameter, [E, N, D].
        places: by stored name its expert and its rows of N, from and to.
    """

    shape: tuple[int, ...]
    places: Mapping[str, tuple[int, int, int]]

    def read(self, tensors: TensorFolder, dtype: torch.dtype) -> Tensor:
        """The parameter in ``dtype``."""
        made = torch.empty(self.shape, dtype=dtype)
        for name, (expert, start, stop) in self.places.items():
            tensors.read_into(name, made[expert, start:stop])
        return made


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that takes numbers in a name as numbers."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name) if part
    ]


def stack_of(names: NameMap, target: str) -> Stack | None:
    """Where the stored tensors of ``target`` go; None where it is made in another way than by stacking and joining."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    unit = names.units[target]
    found = [names.patterns.get(one) for one in unit]
    if any(pattern is None for pattern in found) or sum(other is unit for other in names.units.values()) != 1:
        return None
    converter = names.converters[found[0]]
    kinds = [(type(one), getattr(one, "dim", None)) for one in converter.operations]
    sources = list(converter.source_patterns)
    if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return None
    if len(converter.target_patterns) != 1 or (len(sources) > 1) != (len(kinds) > 1):
        return None
    shape = tuple(names.state[target].shape)
    if len(shape) != 3 or not set(found) <= set(sources):
        return None
    places: dict[str, tuple[int, int, int]] = {}
    start = 0
    for pattern in sources:
        parts = sorted((one for one, given in zip(unit, found, strict=True) if given == pattern), key=natural)
        if not parts:
            continue
        shapes = {names.info(one).shape for one in parts}
        if len(parts) != shape[0] or len(shapes) != 1:
            return None
        rows = shapes.pop()
        if len(rows) != 2 or rows[1] != shape[2]:
            return None
        for expert, name in enumerate(parts):
            places[name] = (expert, start, start + rows[0])
        start += rows[0]
    return Stack(shape, places) if start == shape[1] else None
