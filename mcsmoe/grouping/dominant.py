"""Groups around dominant experts: the paper's grouping (section 3.1, equation 1 and the paragraph after it)."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.grouping.budget import by_priority
from mcsmoe.types import Grouping, LayerId


def group_by_dominant(
    frequency_E: Tensor,
    similarity_EE: Tensor,
    dominant_G: Tensor,
    capacity: int | None = None,
    layer: LayerId = "",
) -> Grouping:
    """Every other expert, in descending frequency, joins the most similar leader whose group is not full.

    Ties in frequency go to the lower expert index, ties in similarity to the lower leader index.

    Args:
        frequency_E: how often each expert is used.
        similarity_EE: symmetric; larger is more similar.
        dominant_G: int64, the leaders.
        capacity: most experts a group may hold, its leader included; None for no limit.
        layer: named in errors.

    Raises:
        ValueError: the groups cannot hold all experts; names the layer, the capacity and what would do.
    """
    experts = len(frequency_E)
    leaders_G = dominant_G.sort().values
    groups = len(leaders_G)
    if capacity is not None and capacity * groups < experts:
        raise ValueError(
            f"layer {layer!r}: capacity is {capacity}, so {groups} groups hold at most {capacity * groups} of the "
            f"{experts} experts; give a capacity of at least {-(-experts // groups)}, a larger average, "
            "or the uniform budget"
        )
    affinity_EG = similarity_EE.index_select(1, leaders_G)
    expert_to_group = affinity_EG.argmax(dim=1)
    expert_to_group[leaders_G] = torch.arange(groups)
    if capacity is not None:
        free_G = torch.full((groups,), capacity - 1)
        open_EG = affinity_EG.clone()
        open_EG[:, free_G == 0] = -torch.inf
        leads_E = torch.zeros(experts, dtype=torch.bool)
        leads_E[leaders_G] = True
        for expert in by_priority(frequency_E).tolist():
            if leads_E[expert]:
                continue
            group = int(open_EG[expert].argmax())
            expert_to_group[expert] = group
            free_G[group] -= 1
            if free_G[group] == 0:
                open_EG[:, group] = -torch.inf
    return Grouping(expert_to_group, leaders_G)
