"""What every similarity base takes, and what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.statistics.gram import column_gram
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId, RouterWeights

NEUTRAL = 0.5
"""Similarity of a pair of which nothing is known; also that of a cosine of zero."""

_REMEDIES = {
    "statistics": "collect routing statistics",
    "weights": "give the layer's experts",
    "router": "give the layer's router",
    "gradients": "collect gradients",
    "tokens": "collect routing statistics with a reservoir, and give the layer's experts and their activation",
}


@dataclass(frozen=True)
class SimilarityInputs:
    """One layer, and what is known of it; ``mcsmoe.methods.SIMILARITIES`` says which fields a base reads."""

    statistics: LayerStatistics | None = None
    weights: ExpertWeights | None = None  # E stacked experts
    router: RouterWeights | None = None
    gradients: ExpertWeights | None = None  # shaped like the weights; zero for an expert that was never used
    activation: ExpertActivation | None = None
    seed: int = 0
    layer: LayerId = ""

    def check(self, base: str, needs: frozenset[str]) -> None:
        """Raise ValueError, naming layer, base and what is wrong, unless the inputs are there and belong together."""
        given = {
            "statistics": self.statistics is not None,
            "weights": self.weights is not None,
            "router": self.router is not None,
            "gradients": self.gradients is not None,
            "tokens": self.weights is not None
            and self.activation is not None
            and self.statistics is not None
            and self.statistics.reservoir is not None,
        }
        for need in sorted(needs):
            if not given[need]:
                raise ValueError(f"layer {self.layer!r}: similarity {base!r} needs {need}; {_REMEDIES[need]}")
        experts, width = self.num_experts, None if self.weights is None else self.weights.d_model
        if self.statistics is not None and needs & {"statistics", "tokens"}:
            self.statistics.check_against(self.layer, experts, width)
            self.statistics.check_finite(self.layer)
        if self.router is not None and "router" in needs:
            self._check_router(self.router, experts, width)
        if self.weights is not None and needs & {"weights", "tokens"}:
            self.weights.require_finite(self.layer)
        if self.gradients is not None and "gradients" in needs:
            self._check_gradients(self.gradients)

    @property
    def num_experts(self) -> int:
        """E.

        Raises:
            ValueError: nothing was given that tells.
        """
        if self.weights is not None:
            return self.weights.num_experts
        if self.statistics is not None:
            return self.statistics.num_experts
        if self.router is not None:
            return self.router.weight_ED.shape[0]
        if self.gradients is not None:
            return self.gradients.num_experts
        raise ValueError(f"layer {self.layer!r}: nothing is given of it; give its statistics, experts or router")

    def _check_router(self, router: RouterWeights, experts: int, width: int | None) -> None:
        rows, columns = router.weight_ED.shape
        if width is None:
            width = columns if self.statistics is None else self.statistics.d_model
        if (rows, columns) != (experts, width):
            raise ValueError(
                f"layer {self.layer!r}: the router is {rows} x {columns}, the layer has {experts} experts of width "
                f"{width}; they are of different models"
            )
        bad_E = ~torch.isfinite(router.weight_ED).all(dim=1)
        if bad_E.any():
            raise ValueError(
                f"layer {self.layer!r}: the router's row of expert {int(bad_E.nonzero()[0])} is not finite"
            )

    def _check_gradients(self, gradients: ExpertWeights) -> None:
        if self.weights is not None:
            mine = {name: tuple(tensor.shape) for name, tensor in self.weights.tensors.items()}
            given = {name: tuple(tensor.shape) for name, tensor in gradients.tensors.items()}
            if mine != given:
                raise ValueError(f"layer {self.layer!r}: gradients are of {given}, the experts are {mine}")
        for name, tensor in gradients.tensors.items():
            bad_E = ~torch.isfinite(tensor).flatten(1).all(dim=1)
            if bad_E.any():
                expert = int(bad_E.nonzero()[0])
                raise ValueError(f"layer {self.layer!r}: the gradient of {name!r} of expert {expert} is not finite")


Base = Callable[[SimilarityInputs], Tensor]
"""A way to compare experts: [E, E]; ``finish`` puts diagonal and rounding right."""


def cosine(gram_EE: Tensor) -> Tensor:
    """[E, E] cosines of vectors from their Gram matrix; 0 with a vector that is zero."""
    norm_E = gram_EE.diagonal().clamp(min=0).sqrt()
    # Scaled one side at a time: the product of two norms may be too small for a number, or too large.
    inverse_E = torch.where(norm_E > 0, 1 / norm_E, 0.0)
    return (gram_EE * inverse_E[:, None] * inverse_E[None, :]).clamp(-1, 1)


def mapped(cosine_EE: Tensor) -> Tensor:
    """A cosine or correlation as a similarity in [0, 1]."""
    return (1 + cosine_EE) / 2


def gram(blocks: Iterable[Tensor]) -> Tensor:
    """[E, E] float64 Gram matrix of vectors that come as blocks [E, P] of their elements."""
    total: Tensor | None = None
    for block_EP in blocks:
        part_EE = column_gram(block_EP.T)
        total = part_EE if total is None else total.add_(part_EE)
    assert total is not None
    return total


def finish(similarity_EE: Tensor) -> Tensor:
    """The same as float64 on the CPU, exactly symmetric, with a diagonal of exactly 1."""
    made_EE = similarity_EE.detach().double().cpu()
    made_EE = ((made_EE + made_EE.T) / 2).clamp(0, 1)
    made_EE.fill_diagonal_(1.0)
    return made_EE
