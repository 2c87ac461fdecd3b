"""The sparse layers of a model, in memory or on disk, as everything that changes experts sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from mcsmoe.adapters.base import Adapter
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId, LowRankFactors, Novices, RouterWeights


@dataclass(frozen=True)
class SparseLayer:
    """One sparse layer of a model, and the adapter that knows its family."""

    model: nn.Module
    adapter: Adapter
    id: LayerId

    @property
    def module(self) -> nn.Module:
        """The module that holds its router and experts."""
        return self.model.get_submodule(self.id)

    @property
    def num_experts(self) -> int:
        """E: outputs of the router."""
        return self.adapter.num_experts(self.model, self.id)

    @property
    def expert_to_group(self) -> Tensor:
        """int64 [E]: the redirect table; arange(E) where nothing is merged."""
        return self.adapter.expert_to_group(self.model, self.id)

    @property
    def activation(self) -> ExpertActivation:
        """From the outputs of the input projections to the hidden activation."""
        return self.adapter.activation(self.model, self.id)

    def read_experts(self) -> ExpertWeights:
        """Copies of the stacked experts, E of them, or G once merged."""
        return self.adapter.read_experts(self.model, self.id)

    def view_experts(self) -> ExpertWeights:
        """The same without a copy where there need be none: only to be read, and only until the layer changes."""
        return self.adapter.view_experts(self.model, self.id)

    def read_router(self) -> RouterWeights:
        """A copy of the router."""
        return self.adapter.read_router(self.model, self.id)

    def write_experts(self, weights: ExpertWeights, expert_to_group: Tensor | None = None) -> None:
        """Install experts; with a redirect table G of them for the router's E outputs."""
        self.adapter.write_experts(self.model, self.id, weights, expert_to_group)

    def write_compressed(
        self, factors: Mapping[str, LowRankFactors], biases: Mapping[str, Tensor], expert_to_group: Tensor
    ) -> None:
        """Install low-rank factors with a dense residual in place of every matrix."""
        self.adapter.write_compressed(self.model, self.id, factors, biases, expert_to_group)

    @property
    def expert_sets(self) -> int:
        """How many sets of consecutive experts the router chooses among before it chooses experts."""
        return self.adapter.expert_sets(self.model, self.id)

    def check_dropping(self, kept: int) -> None:
        """Raise ValueError, naming layer and reason, if the layer cannot go on with ``kept`` of its experts."""
        self.adapter.check_dropping(self.model, self.id, kept)

    def drop_experts(self, weights: ExpertWeights, expert_to_group: Tensor, dropped_E: Tensor) -> None:
        """Install the experts that stay, so that the router never chooses one marked in ``dropped_E`` (bool [E])."""
        self.adapter.drop_experts(self.model, self.id, weights, expert_to_group, dropped_E)

    def write_novices(self, weights: ExpertWeights, table: Tensor, novices: Novices) -> None:
        """Install G experts and N novices; ``table`` sends each of the router's outputs to 0..G+N-1."""
        self.adapter.write_novices(self.model, self.id, weights, table, novices)

    def read_novices(self) -> Novices | None:
        """Copies of the novices; None where there are none."""
        return self.adapter.read_novices(self.model, self.id)


class Layers(Protocol):
    """The sparse layers of a model wherever its weights are."""

    @property
    def ids(self) -> list[LayerId]:
        """Every sparse layer, in forward order."""

    def structure(self, layer: LayerId) -> SparseLayer:
        """A layer whose shapes are known and whose weights need not be there."""

    def open(self, layer: LayerId) -> AbstractContextManager[SparseLayer]:
        """A layer whose weights are in memory inside the context; what is written to them there is not kept."""

    def change(self, function: Callable[[SparseLayer], None], layers: Iterable[LayerId]) -> None:
        """Apply ``function`` to each of ``layers`` in turn, and keep what it writes."""


class ModelLayers:
    """The layers of a model in memory; changes are made in place."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter

    @property
    def ids(self) -> list[LayerId]:
        """Every sparse layer, in forward order."""
        return self.adapter.layers(self.model)

    def structure(self, layer: LayerId) -> SparseLayer:
        """The layer itself."""
        return SparseLayer(self.model, self.adapter, layer)

    @contextmanager
    def open(self, layer: LayerId) -> Iterator[SparseLayer]:
        """The layer itself: here what is written does stay."""
        yield self.structure(layer)

    def change(self, function: Callable[[SparseLayer], None], layers: Iterable[LayerId]) -> None:
        """Apply ``function`` to each of ``layers`` in turn."""
        for layer in layers:
            function(self.structure(layer))
