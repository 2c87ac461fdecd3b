"""Merge methods: each takes one layer with its groups and gives the experts that answer for them."""

from __future__ import annotations

from collections.abc import Callable

from mcsmoe.merge import average, fisher, git_rebasin, prune, reap, repair, zipit
from mcsmoe.merge.base import Merged, MergeInputs

__all__ = ["METHODS", "MergeInputs", "MergeMethod", "Merged"]

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
        "fisher": fisher.fisher,
        "prune": prune.prune,
        "drop": prune.drop,
        "reap": reap.reap,
        "git-rebasin": git_rebasin.git_rebasin,
        "repair": repair.repair,
        "zipit": zipit.zipit,
        "zipit-frequency": zipit.zipit_frequency,
        "zipit-weight": zipit.zipit_weight,
    }.items()
}
"""By name; all check their inputs first and raise ValueError naming layer, expert and value."""
