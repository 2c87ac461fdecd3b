"""Groups that respect the sets of experts among which a router chooses first (``n_group`` of DeepSeek and its kin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mcsmoe.types import Grouping, LayerId


def divide(
    values: Mapping[LayerId, Tensor], sets: Mapping[LayerId, int]
) -> tuple[dict[LayerId, Tensor], dict[LayerId, list[LayerId]]]:
    """Per set of consecutive experts, what ``values`` (by layer, [E] or [E, E]) has for it.

    Returns:
        The parts by a name of their own, and by layer the names of its parts in order.
    """
    parts: dict[LayerId, Tensor] = {}
    names: dict[LayerId, list[LayerId]] = {}
    for layer, value in values.items():
        width = len(value) // sets[layer]
        for number in range(sets[layer]):
            here = slice(number * width, (number + 1) * width)
            name = f"{layer}, experts {here.start} to {here.stop - 1}"
            names.setdefault(layer, []).append(name)
            parts[name] = value[here] if value.ndim == 1 else value[here, here]
    return parts, names


def join(groupings: Sequence[Grouping]) -> Grouping:
    """One grouping of consecutive sets of experts, from that of each; groups stand set by set."""
    tables, leaders = [], []
    experts = groups = 0
    for grouping in groupings:
        tables.append(grouping.expert_to_group + groups)
        leaders.append(grouping.dominant + experts)
        experts, groups = experts + grouping.num_experts, groups + grouping.num_groups
    return Grouping(torch.cat(tables), torch.cat(leaders))


def respects(table: Tensor, sets: int) -> bool:
    """Whether the groups of a redirect table [E] stand set by set, equally many for each of ``sets`` sets of experts."""
    experts, groups = len(table), int(table.max()) + 1
    if experts % sets or groups % sets:
        return False
    return bool((table // (groups // sets) == torch.arange(experts) // (experts // sets)).all())
