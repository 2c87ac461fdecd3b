"""What every model family must offer so that the algorithms never meet a model class.

Laws, tested for every adapter: read then write changes no logit; permuting hidden neurons changes no logit; merging
identical experts changes no logit; token counts sum to valid dispatched tokens times K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from mcsmoe.types import (
    ExpertActivation,
    ExpertWeights,
    LayerId,
    LayerSpec,
    LowRankFactors,
    Novices,
    RoutedBatch,
    RouterWeights,
)

if TYPE_CHECKING:
    from mcsmoe.adapters.dropping import Slices


@dataclass
class Capture:
    """Filled anew by every forward pass inside ``Adapter.capture``: what each sparse layer routed."""

    batches: dict[LayerId, RoutedBatch] = field(default_factory=dict)


class Adapter(ABC):
    """Reads and writes the experts of one family of models. Stateless: the model is always an argument."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter treats ``model`` exactly."""

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        """Why a model of this kind is not treated, if this adapter can tell."""
        return None

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Called once ``model`` is found to match, before anything else: repairs what its library does wrong."""

    @abstractmethod
    def layers(self, model: nn.Module) -> list[LayerId]:
        """Sparse layers in forward order; the module path is the name in every table."""

    @abstractmethod
    def experts_path(self, model: nn.Module, layer: LayerId) -> str:
        """Path of the module that holds the experts of a layer."""

    @abstractmethod
    def num_experts(self, model: nn.Module, layer: LayerId) -> int:
        """E: the router's outputs, unchanged by merging."""

    @abstractmethod
    def read_experts(self, model: nn.Module, layer: LayerId) -> ExpertWeights:
        """Detached copies of the stacked experts (E of them, or G once merged), canonical orientation.

        A compressed layer is returned as its dense equivalent.
        """

    def view_experts(self, model: nn.Module, layer: LayerId) -> ExpertWeights:
        """As ``read_experts``, but perhaps the layer's own tensors: only to be read, and only until the layer changes."""
        return self.read_experts(model, layer)

    @abstractmethod
    def expert_to_group(self, model: nn.Module, layer: LayerId) -> Tensor:
        """int64 [E]: the redirect table; arange(E) for a layer that is not merged."""

    @abstractmethod
    def write_experts(
        self, model: nn.Module, layer: LayerId, weights: ExpertWeights, expert_to_group: Tensor | None = None
    ) -> None:
        """Install ``weights``.

        With ``expert_to_group`` None the layer keeps its structure and only its values change. With a redirect table
        the layer's experts become a run-time module that holds the G stacked experts once; the router keeps its E
        outputs, so no routing decision changes.

        Raises:
            ValueError: shapes that do not fit the layer, or a redirect table that misses an expert; names the layer.
        """

    @abstractmethod
    def write_compressed(
        self,
        model: nn.Module,
        layer: LayerId,
        factors: Mapping[str, LowRankFactors],
        biases: Mapping[str, Tensor],
        expert_to_group: Tensor,
    ) -> None:
        """Install low-rank plus residual experts, residual dense and trainable; ``modules.pack`` makes it compact."""

    def write_novices(
        self, model: nn.Module, layer: LayerId, weights: ExpertWeights, expert_to_group: Tensor, novices: Novices
    ) -> None:
        """Install G experts and N novices; the router keeps its E outputs, ``expert_to_group`` sends each to 0..G+N-1.

        Raises:
            ValueError: the family has no place for novices, shapes or a table that do not fit; names the layer.
        """
        raise ValueError(
            f"layer {layer!r}: experts of {self.name} have no novices; delete the dropped experts, or redirect them"
        )

    def read_novices(self, model: nn.Module, layer: LayerId) -> Novices | None:
        """Detached copies of the layer's novices; None where there are none."""
        return None

    @abstractmethod
    def install(self, model: nn.Module, layer: LayerId, spec: LayerSpec) -> None:
        """Replace the layer's experts by the empty run-time module ``spec`` describes, on the layer's device (meta too)."""

    @abstractmethod
    def read_router(self, model: nn.Module, layer: LayerId) -> RouterWeights:
        """Detached copy of the router."""

    def mask_router(self, model: nn.Module, layer: LayerId, dropped_E: Tensor) -> None:
        """Let the router of ``layer`` never choose the experts marked in ``dropped_E`` (bool [E]) again.

        Raises:
            ValueError: the family's router has no place for it; names the layer.
        """
        raise ValueError(
            f"layer {layer!r}: the router of {self.name} cannot be kept from choosing an expert; "
            "prune with a redirect instead (merge method 'prune')"
        )

    def expert_sets(self, model: nn.Module, layer: LayerId) -> int:
        """How many sets of consecutive experts the router chooses among before it chooses experts; 1 if it does not.

        Dropping experts goes best with equally many left in each set.
        """
        return 1

    def check_dropping(self, model: nn.Module, layer: LayerId, kept: int) -> None:  # noqa: B027
        """Raise ValueError, naming the layer and the reason, if ``layer`` cannot go on with ``kept`` of its experts.

        Needs no weights, so it can be asked before any work starts.
        """

    def drop_experts(
        self, model: nn.Module, layer: LayerId, weights: ExpertWeights, expert_to_group: Tensor, dropped_E: Tensor
    ) -> None:
        """Install the experts that stay, so that the router never chooses one marked in ``dropped_E`` (bool [E]).

        Where a router of fewer rows does the same, the layer becomes one of the family's own with fewer experts.
        Else the router is masked, and the dropped experts keep their entries in the redirect table.

        Args:
            weights: G stacked experts, one for each that stays.
            expert_to_group: int64 [E]; an expert that stays has a group of its own.

        Raises:
            ValueError: the router can do neither, or is left with too few to choose from; names the layer.
        """
        self.mask_router(model, layer, dropped_E)
        self.write_experts(model, layer, weights, expert_to_group)

    def slices(self, model: nn.Module, layer: LayerId, kept: Tensor) -> Slices | None:
        """What of a layer's tensors stays if only the experts ``kept`` (int64, ascending) do; needs no weights.

        None where that does not make it one of the family's own with fewer experts.

        Raises:
            ValueError: the router is left with too few to choose from; names the layer.
        """
        return None

    def leave(self, model: nn.Module, layer: LayerId, kept: Tensor) -> None:
        """Leave only the experts ``kept`` in a layer, where ``slices`` says how."""
        raise ValueError(f"layer {layer!r}: {self.name} takes no experts out of a layer")

    @abstractmethod
    def router_parameters(self, model: nn.Module) -> list[str]:
        """Full parameter names of every router, to freeze them."""

    @abstractmethod
    def activation(self, model: nn.Module, layer: LayerId) -> ExpertActivation:
        """From input-projection outputs to the hidden activation, e.g. relu(wi) or silu(gate) * up."""

    @abstractmethod
    def capture(self, model: nn.Module, detach: bool = True) -> AbstractContextManager[Capture]:
        """Record what every sparse layer routes during forward passes inside the context.

        The valid-token mask comes from the arguments of the model's own forward (attention_mask for encoder and
        decoder-only positions; labels, else decoder_attention_mask, for decoder positions). With ``detach`` False the
        logits keep their graph, so that a load-balancing loss can be taken from them.
        """
