"""The tokens of one sparse layer, as a method that fits something to them sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mcsmoe.calibration.states import States
from mcsmoe.statistics.outputs import ChosenOutputs
from mcsmoe.types import RoutedBatch

_HELD_OUT = 10  # every tenth row is for judging, not for fitting


def is_held_out(row: int) -> bool:
    """Whether calibration row number ``row`` is for judging alone."""
    return row % _HELD_OUT == _HELD_OUT - 1


@dataclass(frozen=True)
class LayerBatch:
    """Valid tokens of some calibration rows in one layer, and what its original experts made of them."""

    inputs_TD: Tensor  # what router and experts see
    index_TK: Tensor  # int64, the experts that computed the token; -1 for none
    weights_TK: Tensor  # what their outputs were multiplied with
    target_TD: Tensor  # sum of the weighted outputs; shared experts apart
    held_out: bool  # for judging alone


class LayerTokens(Protocol):
    """All tokens of a layer, as often as they are asked for."""

    def batches(self) -> Iterator[LayerBatch]:
        """The tokens, in the same order each time."""
        ...


class StoredTokens:
    """Tokens kept in ``states``: in memory up to its limit, in a mapped file beyond."""

    def __init__(self, states: States, device: torch.device, name: str) -> None:
        self.states, self.device, self.name = states, device, name
        self.count = 0

    def add(self, batch: RoutedBatch, outputs: ChosenOutputs, row_T: Tensor) -> None:
        """Take in a batch; ``row_T`` is the number of each token's calibration row."""
        computed_TK = batch.chosen_TK >= 0
        gated_TKD = outputs.outputs_TKD.float() * outputs.weights_TK[:, :, None].float()
        target_TD = torch.where(computed_TK[:, :, None], gated_TKD, 0.0).sum(dim=1)
        held_T = row_T % _HELD_OUT == _HELD_OUT - 1
        for held_out in (False, True):
            keep = batch.valid_T & (held_T == held_out)
            if not keep.any():
                continue
            parts = (batch.inputs_TD, batch.chosen_TK, outputs.weights_TK, target_TD)
            self.states.put((self.name, self.count), (*(part[keep] for part in parts), held_out))
            self.count += 1

    def batches(self) -> Iterator[LayerBatch]:
        """As ``LayerTokens``."""
        for number in range(self.count):
            yield LayerBatch(*self.states.get((self.name, number), self.device))
