"""Criteria that say which experts of a layer stay: scores of single experts, and costs of sets of them.

All are taken from sums over calibration tokens, so they cost nothing beyond the pass, and sums of several domains in any
blend give the criterion of that blend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.criteria.quadratic import Limits, cheapest, highest
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.outputs import OutputSums
from mcsmoe.types import LayerId


@dataclass(frozen=True)
class CriterionInputs:
    """What a criterion may look at: one layer's statistics, with the sums over its experts' outputs."""

    layer: LayerId
    statistics: LayerStatistics
    seed: int = 0

    @property
    def outputs(self) -> OutputSums:
        """Raises ValueError, naming the layer, where the statistics hold no outputs."""
        if self.statistics.outputs is None:
            raise ValueError(
                f"layer {self.layer!r}: the statistics hold nothing of its experts' outputs; collect them anew"
            )
        return self.statistics.outputs

    def mean(self, sum_E: Tensor) -> Tensor:
        """[E]: a sum over an expert's tokens as their mean; 0 for an expert without tokens."""
        return sum_E.double() / self.statistics.computed_E.clamp(min=1)


def frequency(inputs: CriterionInputs) -> Tensor:
    """Tokens of each expert (MC-SMoE, arXiv 2310.01334)."""
    return inputs.statistics.computed_E.double()


def reap(inputs: CriterionInputs) -> Tensor:
    """Mean over an expert's tokens of gate times norm of its output (arXiv 2510.13999, equation 9)."""
    return inputs.mean(inputs.outputs.gated_norm_sum_E)


def mass(inputs: CriterionInputs) -> Tensor:
    """Sum over an expert's tokens of gate times norm of its output: REAP times frequency."""
    return inputs.outputs.gated_norm_sum_E.double()


def man(inputs: CriterionInputs) -> Tensor:
    """Mean over an expert's tokens of the norm of its output, gates left out."""
    return inputs.mean(inputs.outputs.norm_sum_E)


def msan(inputs: CriterionInputs) -> Tensor:
    """Mean over an expert's tokens of the squared norm of its output, gates left out."""
    return inputs.mean(inputs.outputs.norm_square_sum_E)


def random(inputs: CriterionInputs) -> Tensor:
    """A control: drawn evenly from [0, 1) by the seed and the layer's name."""
    key = int.from_bytes(f"{inputs.seed} {inputs.layer}".encode(), "little") % (2**61 - 1)
    generator = torch.Generator().manual_seed(key)
    return torch.rand(inputs.statistics.num_experts, generator=generator, dtype=torch.float64)


def hope(inputs: CriterionInputs) -> Tensor:
    """[E, E]: sum over tokens that chose both of the product of gates and norms of outputs (after arXiv 2609.18916)."""
    return inputs.outputs.norm_gram_EE.double()


def gram(inputs: CriterionInputs) -> Tensor:
    """[E, E]: sum over tokens that chose both of the inner product of gated outputs; the exact squared change."""
    return inputs.outputs.gram_EE.double()


Score = Callable[[CriterionInputs], Tensor]

SCORES: dict[str, Score] = {
    "frequency": frequency,
    "reap": reap,
    "mass": mass,
    "man": man,
    "msan": msan,
    "random": random,
}
"""[E] by name: the higher, the better worth keeping."""

QUADRATICS: dict[str, Score] = {"hope": hope, "gram": gram}
"""[E, E] by name: a set of dropped experts costs the sum over its pairs."""


def choose(criterion: str, inputs: CriterionInputs, kept: int, limits: Limits | None = None) -> Tensor:
    """int64 [kept], ascending: the experts of a layer that stay.

    Raises:
        ValueError: the limits leave no such set, or the statistics lack what the criterion needs; names the layer.
    """
    limits = Limits.none(inputs.statistics.num_experts) if limits is None else limits
    if criterion in QUADRATICS:
        return cheapest(QUADRATICS[criterion](inputs), kept, limits, inputs.layer)
    return highest(SCORES[criterion](inputs), kept, limits, inputs.layer)


def super_experts(largest: dict[LayerId, Tensor], share: float = 0.995, part: float = 0.1) -> dict[LayerId, Tensor]:
    """By layer, bool [E]: experts with outlying outputs, whose loss breaks a model whatever a mean says of them.

    Those whose largest output norm is above the 99.5th percentile of all experts of the model and above a tenth of the
    largest of all (arXiv 2507.23279, section 3, there on the largest activation).
    """
    every = torch.cat([values_E.double().flatten() for values_E in largest.values()])
    line = max(float(torch.quantile(every, share)), part * float(every.max()))
    # An even model has no outliers: what merely comes first is not protected.
    return {layer: (values_E.double() > line) & (values_E > 0) for layer, values_E in largest.items()}
