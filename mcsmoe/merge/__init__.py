"""Merge methods: each takes one layer with its groups and gives the experts that answer for them."""

from __future__ import annotations

from collections.abc import Callable

from mcsmoe.merge import average, prune
from mcsmoe.merge.base import Merged, MergeInputs, shares

__all__ = ["METHODS", "MergeInputs", "MergeMethod", "Merged", "shares"]

MergeMethod = Callable[[MergeInputs], Merged]


def _checked(method: MergeMethod) -> MergeMethod:
    def merge(inputs: MergeInputs) -> Merged:
        inputs.check()
        return method(inputs)

    merge.__doc__ = method.__doc__
    return merge


METHODS: dict[str, MergeMethod] = {
    name: _checked(method)
    for name, method in {
        "frequency": average.frequency,
        "uniform": average.uniform,
        "reversed": average.reversed_frequency,
        "random": average.random,
        "prune": prune.prune,
        "drop": prune.drop,
    }.items()
}
"""By name; all check their inputs first and raise ValueError naming layer, expert and value."""
