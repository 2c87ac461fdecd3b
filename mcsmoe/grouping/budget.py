"""How many experts each layer may keep, and which: the dominant experts of a model (section 3.1 of MC-SMoE).

n experts on average over L layers are n x L dominant experts, exactly, whatever ties the frequencies have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mcsmoe.types import LayerId

Budget = Callable[[Mapping[LayerId, Tensor], int], dict[LayerId, Tensor]]


def normalised(layer: LayerId, frequency_E: Tensor) -> Tensor:
    """[E] float64 that sums to 1; uniform for a layer none of whose experts was ever used.

    Raises:
        ValueError: a frequency is negative or not finite; names layer, expert and value.
    """
    frequency_E = frequency_E.detach().to("cpu", torch.float64)
    if frequency_E.ndim != 1 or not len(frequency_E):
        raise ValueError(
            f"layer {layer!r}: the frequency has shape {tuple(frequency_E.shape)}, not one value an expert"
        )
    bad_E = ~torch.isfinite(frequency_E) | (frequency_E < 0)
    if bad_E.any():
        expert = int(bad_E.nonzero()[0])
        raise ValueError(
            f"layer {layer!r}: the frequency of expert {expert} is {float(frequency_E[expert])}; "
            "frequencies are finite and not negative: collect the routing statistics again"
        )
    total = frequency_E.sum()
    if total == 0:
        return torch.full_like(frequency_E, 1.0 / len(frequency_E))
    return frequency_E / total


def by_priority(score_E: Tensor) -> Tensor:
    """int64 [E]: expert indices in descending score, ties by lower index."""
    return torch.argsort(score_E, descending=True, stable=True)


def check_average(frequency: Mapping[LayerId, Tensor], average: int) -> None:
    """Raise ValueError unless 1 <= average <= the experts of every layer."""
    if isinstance(average, bool) or not isinstance(average, int):
        raise ValueError(f"average is {average!r}; give the whole number of experts to keep in a layer on average")
    if average < 1:
        raise ValueError(f"average is {average}; at least 1 expert must be kept in a layer")
    for layer, frequency_E in frequency.items():
        if average > len(frequency_E):
            raise ValueError(
                f"average is {average}, but layer {layer!r} has {len(frequency_E)} experts; "
                f"give at most {len(frequency_E)}, which means no merging"
            )


def adaptive(frequency: Mapping[LayerId, Tensor], average: int, fewest: int = 1) -> dict[LayerId, Tensor]:
    """The average x L most frequent experts over all L layers, at least ``fewest`` in each.

    Frequencies are normalised in each layer and each layer's largest is set to 1, so that no layer is left empty; where a
    layer must have more, its ``fewest`` largest are.
    Ties break by the order of the layers, then by lower index.

    Args:
        frequency: by layer, [E] how often each expert is used.
        average: experts to keep in a layer on average.
        fewest: experts that every layer keeps at least, from 1 to ``average``.

    Returns:
        By layer, int64 [G] dominant experts in ascending order; the G sum to average x L.

    Raises:
        ValueError: ``average`` or ``fewest`` out of range, or a frequency that is negative or not finite.
    """
    check_average(frequency, average)
    if not 1 <= fewest <= average:
        raise ValueError(f"every layer is to keep at least {fewest} experts, {average} on average; give 1 to {average}")
    scores = []
    for layer, frequency_E in frequency.items():
        score_E = normalised(layer, frequency_E)
        # That many only: were every tied maximum raised, ties in one layer would starve the others.
        score_E[by_priority(score_E)[:fewest]] = 1.0
        scores.append(score_E)
    if not scores:
        return {}
    kept_N = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    # The concatenation is in layer order, so a stable sort breaks ties as promised. A leader scores 1; another expert
    # scores at most 1/2, hence every leader is among the first fewest x L.
    kept_N[by_priority(torch.cat(scores))[: average * len(scores)]] = True
    parts = kept_N.split([len(score_E) for score_E in scores])
    return {layer: part_E.nonzero()[:, 0] for layer, part_E in zip(frequency, parts, strict=True)}


def uniform(frequency: Mapping[LayerId, Tensor], average: int) -> dict[LayerId, Tensor]:
    """The ``average`` most frequent experts of each layer, ties by lower index; otherwise as ``adaptive``."""
    check_average(frequency, average)
    return {
        layer: by_priority(normalised(layer, frequency_E))[:average].sort().values
        for layer, frequency_E in frequency.items()
    }


BUDGETS: dict[str, Budget] = {"adaptive": adaptive, "uniform": uniform}


def predicted(curves: Mapping[LayerId, Tensor], average: int) -> dict[LayerId, int]:
    """By layer the number of experts to keep, ``average`` on average, by what losing more of them is predicted to cost.

    Starting from all experts the layer gives up one (or as many as it must at once) whose cost rises least per expert,
    again and again; ties go to the earlier layer. Where numbers must be multiples the total may end below the average.

    Args:
        curves: by layer, [E + 1]: cost with k experts kept, never rising with k, infinite where k cannot be. Costs of
            different layers must be of one measure, such as a share of the energy of the residual stream.
        average: experts to keep in a layer on average.

    Raises:
        ValueError: ``average`` is out of range, or below what the layers need.
    """
    check_average({layer: curve[1:] for layer, curve in curves.items()}, average)
    kept = {layer: len(curve) - 1 for layer, curve in curves.items()}
    steps: dict[LayerId, tuple[float, int]] = {}

    def step(layer: LayerId) -> tuple[float, int]:
        curve, now = curves[layer], kept[layer]
        below = torch.isfinite(curve[:now]).nonzero()[:, 0]
        if not len(below):
            return float("inf"), 0
        count = now - int(below[-1])
        return max(0.0, float(curve[now - count] - curve[now])) / count, count

    for layer in curves:
        steps[layer] = step(layer)
    while sum(kept.values()) > average * len(kept):
        layer = min(steps, key=lambda one: steps[one][0])
        rise, count = steps[layer]
        if rise == float("inf"):
            raise ValueError(
                f"average is {average}, but the layers must keep {sum(kept.values())} experts in all, "
                f"{sum(kept.values()) / len(kept):.1f} on average; give a larger average"
            )
        kept[layer] -= count
        steps[layer] = step(layer)
    return kept
