"""Which layers lose: what each sparse layer gives otherwise than the full model's, on the inputs that it has there.

    error_l = sum_t | f'_l(x_t) - f_l(x_t) |^2 / sum_t | s_t |^2

with x_t what layer l of the full model reads at token t, f_l what it makes of it, f'_l what the reduced layer does, and s_t
the residual stream behind the full model's block. It is what criteria predict from calibration (``criteria.quadratic``,
``transform.budget.energy``), measured on other texts. Layers are compared one by one: no error reaches a later layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.names import LAYER_ERROR
from mcsmoe.calibration.streams import stream_square, streams_after
from mcsmoe.evaluate.confidence import Interval
from mcsmoe.evaluate.language import ratio
from mcsmoe.types import LayerId


class LayerErrors:
    """Sums by layer and row, filled whenever the full model runs inside ``watching``.

    Args:
        model: the reduced model; a layer that it has no module for is an error.
        reference: the full model.
    """

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        self.model, self.reference = model, reference
        self.adapter = adapter_for(reference)
        self.layers: list[LayerId] = self.adapter.layers(reference)
        self._error: dict[LayerId, list[Tensor]] = {layer: [] for layer in self.layers}
        self._energy: dict[LayerId, list[Tensor]] = {layer: [] for layer in self.layers}
        self._change_T: dict[LayerId, Tensor] = {}
        self._rows = 1  # of the batch that goes through the full model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run each reduced layer on what the full model's layer is called with."""
        hooks = [
            self.reference.get_submodule(layer).register_forward_hook(self._compare(layer), with_kwargs=True)
            for layer in self.layers
        ]
        try:
            with (
                self.adapter.capture(self.reference) as captured,
                streams_after(self.reference, self.layers) as streams,
            ):

                def gather(_module: nn.Module, _inputs: Any, _output: Any) -> None:
                    squares = streams.squares(captured.batches)
                    for layer, batch in captured.batches.items():
                        change_T, valid_T = self._change_T.pop(layer), batch.valid_T
                        energy_T = None if squares is None else squares[layer]
                        if energy_T is None:  # a model whose blocks do not return the stream
                            energy_T = stream_square(batch.inputs_TD, batch.inputs_TD)
                        assert energy_T is not None
                        for kept, value_T in ((self._error, change_T), (self._energy, energy_T)):
                            value_BT = value_T.double().masked_fill(~valid_T, 0).reshape(self._rows, -1)
                            kept[layer].append(value_BT.sum(dim=1).cpu())

                hooks.append(self.reference.register_forward_hook(gather))
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(self, layer: LayerId) -> Any:
        own = self.model.get_submodule(layer)

        def compare(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            full, other = _first(output), _first(own(*given, **named))
            self._rows = len(full) if full.ndim > 2 else 1
            self._change_T[layer] = (other.float() - full.float()).square().sum(dim=-1).flatten()

        return compare

    def scores(self, resamples: int, seed: int) -> Iterator[tuple[str, Interval]]:
        """(``layer_error/LAYER``, error with its interval over rows) of each layer that was called."""
        for layer in (layer for layer in self.layers if self._error[layer]):
            error_U, energy_U = (np.asarray(torch.cat(kept[layer])) for kept in (self._error, self._energy))
            found = ratio(error_U, energy_U, resamples, seed)
            yield f"{LAYER_ERROR}/{layer}", Interval(found.value, found.low, found.high, len(error_U))


def _first(output: Any) -> Tensor:
    found: Tensor = next(leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim > 1)
    return found
