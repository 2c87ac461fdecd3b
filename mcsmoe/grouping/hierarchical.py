"""Agglomerative clustering of experts on any similarity (HC-SMoE, arXiv 2410.08589, uses it on expert outputs)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LINKAGES = ("average", "complete", "single", "weighted", "ward")


def cluster(similarity_EE: Tensor, groups: int, linkage: str = "average") -> Tensor:
    """Merge the closest clusters, at distance 1 - similarity, until ``groups`` are left.

    Returns:
        int64 [E], labels 0..groups-1, every label present, also where distances are tied.

    Raises:
        ValueError: an unknown linkage.
    """
    if linkage not in LINKAGES:
        raise ValueError(f"linkage is {linkage!r}; choose one of {', '.join(LINKAGES)}")
    experts = similarity_EE.shape[0]
    if groups >= experts:
        return torch.arange(experts)
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    distance_EE = 1.0 - similarity_EE.to(torch.float64).numpy()
    distance_EE = (distance_EE + distance_EE.T) / 2
    np.fill_diagonal(distance_EE, 0.0)
    steps = hierarchy.linkage(squareform(distance_EE, checks=False), method=linkage)
    # Cutting at a height can miss the number of groups when heights are tied; the first E - G merges cannot.
    members: dict[int, list[int]] = {expert: [expert] for expert in range(experts)}
    for made, (left, right) in enumerate(steps[: experts - groups, :2].astype(int)):
        members[experts + made] = members.pop(int(left)) + members.pop(int(right))
    labels_E = torch.empty(experts, dtype=torch.int64)
    for label, cluster_members in enumerate(members.values()):
        labels_E[cluster_members] = label
    return labels_E
