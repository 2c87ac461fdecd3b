"""How domains are to be mixed so that the one that suffers most suffers least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from mcsmoe.console import log
from mcsmoe.criteria.quadratic import Limits, cost
from mcsmoe.criteria.scores import CriterionInputs, choose
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.budget import energy
from mcsmoe.types import LayerId

STEPS = 32


@dataclass(frozen=True)
class Mixture:
    """Shares of the tokens by domain, and the error that pruning by them is predicted to make in each."""

    weights: dict[str, float]
    errors: dict[
        str, float
    ]  # squared change of the layers' outputs over that of the residual stream, summed over layers

    @property
    def worst(self) -> float:
        """The largest error of a domain."""
        return max(self.errors.values())


def slim(statistics: LayerStatistics) -> LayerStatistics:
    """The same without what is as wide as the model: all that criteria of experts read."""
    narrow = {name: getattr(statistics, name)[:, :0] for name in vars(statistics) if name.endswith("_ED")}
    narrow["token_square_sum_D"] = statistics.token_square_sum_D[:0]
    outputs = statistics.outputs
    if outputs is not None:
        own = {name: tensor[:, :0] for name, tensor in outputs.tensors().items() if name.endswith("_ED")}
        outputs = replace(outputs, **own)
    return replace(statistics, **narrow, input_gram_EDD=None, reservoir=None, outputs=outputs)


def max_min(
    layers: Mapping[LayerId, Mapping[str, LayerStatistics]],
    counts: Mapping[LayerId, int],
    criterion: str,
    limits: Mapping[LayerId, Limits],
    start: Mapping[str, float] | None = None,
    seed: int = 0,
    steps: int = STEPS,
) -> Mixture:
    """The mixture by which ``criterion`` leaves the worst domain the smallest predicted error.

    For given weights layers are independent, and the error of a domain falls as it weighs more. So its weight grows while
    it is the worst (multiplicative weights, Arora, Hazan and Kale, 2012), and the best mixture met on the way is taken:
    never a worse one than ``start``.

    Args:
        layers: statistics by layer and domain, with outputs (see ``slim``).
        counts: experts to keep.
        limits: as for ``choose``; layers without any are free.
        start: shares that are tried first; as many tokens as there are if None.
    """
    names = sorted(next(iter(layers.values())))
    tokens = {name: sum(float(found[name].valid_tokens) for found in layers.values()) for name in names}
    weights = {name: max(1e-6, (tokens if start is None else start)[name]) for name in names}
    energies = {(layer, name): energy(found[name]) for layer, found in layers.items() for name in names}
    best: Mixture | None = None
    for step in range(1, steps + 1):
        total = sum(weights.values())
        weights = {name: weight / total for name, weight in weights.items()}
        errors = dict.fromkeys(names, 0.0)
        for layer, found in layers.items():
            inputs = CriterionInputs(layer, blend(found, weights), seed)
            kept_K = choose(criterion, inputs, counts[layer], limits.get(layer))
            dropped_E = torch.ones(inputs.statistics.num_experts, dtype=torch.bool)
            dropped_E[kept_K] = False
            for name in names:
                own = CriterionInputs(layer, found[name]).outputs.gram_EE
                errors[name] += max(0.0, cost(own.cpu(), dropped_E)) / energies[layer, name]
        made = Mixture(dict(weights), errors)
        if best is None or made.worst < best.worst:
            best = made
        if not made.worst > 0:
            break
        mean = sum(errors.values()) / len(errors)
        weights = {name: weights[name] * math.exp((errors[name] / mean - 1) / step**0.5) for name in names}
    assert best is not None
    return best


def mixed(
    by_domain: Callable[[LayerId], Mapping[str, LayerStatistics]],
    counts: Mapping[LayerId, int],
    criterion: str,
    limits: Mapping[LayerId, Limits],
    start: Mapping[str, float] | None = None,
    seed: int = 0,
) -> tuple[Mixture, Mixture]:
    """The mixture as given, and the one by which the worst domain suffers least; what changes is said.

    Args:
        by_domain: from a layer to its statistics by domain; only what criteria read is kept of them.
        counts, criterion, limits, start, seed: as in ``max_min``.
    """
    layers = {layer: {name: slim(one) for name, one in by_domain(layer).items()} for layer in counts}
    given = max_min(layers, counts, criterion, limits, start, seed, steps=1)
    found = max_min(layers, counts, criterion, limits, start, seed)
    for name in sorted(found.weights):
        log.info(
            "domain %s: weight %.3f in place of %.3f, predicted error %.4f in place of %.4f",
            *(name, found.weights[name], given.weights[name], found.errors[name], given.errors[name]),
        )
    return given, found
