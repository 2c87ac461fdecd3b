"""How many experts each layer keeps, from the statistics of all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mcsmoe.criteria.quadratic import Limits, cost, curve
from mcsmoe.criteria.scores import QUADRATICS, CriterionInputs, choose, gram
from mcsmoe.grouping.budget import adaptive, predicted
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.types import LayerId

Spread = Callable[[Mapping[LayerId, LayerStatistics], int, str, Mapping[LayerId, Limits], int], dict[LayerId, int]]
"""From statistics, experts on average, criterion, what each layer's experts must respect, and the fewest in a layer."""


def by_frequency(
    statistics: Mapping[LayerId, LayerStatistics],
    average: int,
    _criterion: str,
    limits: Mapping[LayerId, Limits],
    fewest: int,
) -> dict[LayerId, int]:
    """As many as a layer has among the most frequent experts of the model (MC-SMoE).

    Raises:
        ValueError: routers that choose among sets of experts, which this budget does not know.
    """
    if max(one.groups for one in limits.values()) > 1:
        raise ValueError("--budget adaptive does not know routers that choose sets of experts; use predicted")
    chosen = adaptive({layer: one.frequency_E for layer, one in statistics.items()}, average, fewest)
    return {layer: len(kept) for layer, kept in chosen.items()}


def by_error(
    statistics: Mapping[LayerId, LayerStatistics],
    average: int,
    criterion: str,
    limits: Mapping[LayerId, Limits],
    fewest: int,
) -> dict[LayerId, int]:
    """By the squared change of the layer's output over the energy of the residual stream behind it."""
    curves = {layer: relative_curve(layer, statistics[layer], criterion, limits[layer], fewest) for layer in statistics}
    return predicted(curves, average)


def relative_curve(layer: LayerId, statistics: LayerStatistics, criterion: str, limits: Limits, fewest: int) -> Tensor:
    """float64 [E + 1]: squared change of the output with k experts kept, over ``energy``."""
    inputs, experts = CriterionInputs(layer, statistics), statistics.num_experts
    matrix_EE = gram(inputs).cpu()
    scale = energy(statistics)
    if criterion in QUADRATICS:
        return curve(QUADRATICS[criterion](inputs).cpu(), limits, fewest) / scale
    made = torch.full((experts + 1,), torch.inf, dtype=torch.float64)
    for kept in limits.numbers(fewest):
        dropped_E = torch.ones(experts, dtype=torch.bool)
        dropped_E[choose(criterion, inputs, kept, limits)] = False
        made[kept] = max(0.0, cost(matrix_EE, dropped_E)) / scale
    return made


def energy(statistics: LayerStatistics) -> float:
    """What a change of a layer's output is large or small against: the squared residual stream behind it, over all tokens.

    Where the stream was not seen the output's own energy stands in for it.
    """
    outputs = CriterionInputs("", statistics).outputs
    return float(outputs.stream_square_sum) or float(outputs.layer_square_sum) or 1.0


SPREADS: dict[str, Spread] = {"adaptive": by_frequency, "predicted": by_error}
