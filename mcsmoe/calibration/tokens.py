"""The tokens of one sparse layer, as a method that fits something to them sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mcsmoe.calibration.states import States
from mcsmoe.statistics.outputs import ChosenOutputs
from mcsmoe.types import LayerId, RoutedBatch

_HELD_OUT = 10  # every tenth row is for judging, not for fitting


def is_held_out(row: int) -> bool:
    """Whether calibration row number ``row`` is for judging alone."""
    return row % _HELD_OUT == _HELD_OUT - 1


@dataclass(frozen=True)
class LayerBatch:
    """Valid tokens of some calibration rows in one layer, and what its original experts made of them."""

    inputs_TD: Tensor  # what the router sees, and the experts, where nothing scales it for them
    index_TK: Tensor  # int64, the experts that computed the token; -1 for none
    weights_TK: Tensor  # what their outputs were multiplied with
    target_TD: (
        Tensor  # sum of the weighted outputs, shared experts apart; towards the stream, what is to be there for it
    )
    held_out: bool  # for judging alone
    scale_TK: Tensor | None = None  # what a chosen expert's input is multiplied by before it reads it; None: 1

    def read_by(self, expert: int) -> Tensor:
        """[N, D]: what one expert reads, of the tokens that chose it."""
        here_TK = self.index_TK == expert
        inputs_ND = self.inputs_TD[here_TK.any(dim=1)]
        return inputs_ND if self.scale_TK is None else inputs_ND * self.scale_TK[here_TK][:, None]

    def read(self, layer: LayerId) -> Tensor:
        """[T, D]: what every expert reads of a token.

        Raises:
            ValueError: the experts of a token read it differently scaled; names the layer.
        """
        if self.scale_TK is None:
            return self.inputs_TD
        if self.scale_TK.shape[1] > 1:
            raise ValueError(
                f"layer {layer!r}: the {self.scale_TK.shape[1]} experts of a token read it scaled by their scores, so that "
                "there is no one input to solve on; leave out --refit, and take a method that compares no tokens"
            )
        return self.inputs_TD * self.scale_TK


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

    def add(self, batch: RoutedBatch, outputs: ChosenOutputs, row_T: Tensor, missing_TD: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            row_T: number of each token's calibration row.
            missing_TD: what the layer has to give more than it did.
        """
        computed_TK = batch.chosen_TK >= 0
        gated_TKD = outputs.outputs_TKD.float() * outputs.weights_TK[:, :, None].float()
        target_TD = torch.where(computed_TK[:, :, None], gated_TKD, 0.0).sum(dim=1)
        if missing_TD is not None:
            target_TD = target_TD + missing_TD.to(target_TD)
        held_T = row_T % _HELD_OUT == _HELD_OUT - 1
        for held_out in (False, True):
            keep = batch.valid_T & (held_T == held_out)
            if not keep.any():
                continue
            parts = (batch.inputs_TD, batch.chosen_TK, outputs.weights_TK, target_TD)
            scale_TK = None if batch.scale_TK is None else batch.scale_TK[keep]
            self.states.put((self.name, self.count), (*(part[keep] for part in parts), held_out, scale_TK))
            self.count += 1

    def batches(self) -> Iterator[LayerBatch]:
        """As ``LayerTokens``."""
        for number in range(self.count):
            yield LayerBatch(*self.states.get((self.name, number), self.device))
