"""Groupings to compare with: spectral clustering on a similarity, and chance."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from mcsmoe.types import LayerId


def spectral(similarity_EE: Tensor, groups: int, seed: int = 0) -> Tensor:
    """Spectral clustering (normalised Laplacian, k-means) with exactly ``groups`` non-empty clusters.

    Negative similarities count as none. Returns int64 [E], labels 0..groups-1, the same for the same seed.
    """
    experts = similarity_EE.shape[0]
    if groups >= experts:
        return torch.arange(experts)
    if groups == 1:
        return torch.zeros(experts, dtype=torch.int64)
    from sklearn.cluster import SpectralClustering

    # The floor connects the graph, as the Laplacian's embedding needs, and is far below any similarity that counts.
    affinity_EE = np.clip(similarity_EE.to(torch.float64).numpy(), 1e-12, None)
    affinity_EE = (affinity_EE + affinity_EE.T) / 2
    model = SpectralClustering(groups, affinity="precomputed", random_state=seed, assign_labels="kmeans")
    labels_E = torch.from_numpy(model.fit_predict(affinity_EE).astype(np.int64))
    return _fill(labels_E, similarity_EE.to(torch.float64), groups)


def _fill(labels_E: Tensor, similarity_EE: Tensor, groups: int) -> Tensor:
    """Found every empty cluster with the member of the largest cluster that is least similar to the rest of it."""
    labels_E = labels_E.unique(return_inverse=True)[1]
    for label in range(int(labels_E.max()) + 1, groups):
        crowd = int(torch.bincount(labels_E).argmax())
        members = (labels_E == crowd).nonzero()[:, 0]
        outsider = similarity_EE[members][:, members].sum(dim=1).argmin()
        labels_E[members[outsider]] = label
    return labels_E


def chance(experts: int, groups: int, seed: int = 0, layer: LayerId = "") -> Tensor:
    """Random groups, none empty: int64 [E], labels 0..groups-1; depends on the seed and the layer's name only."""
    # A name keyed seed: leaving one layer out must not change the groups of another.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(layer.encode())) % (2**63))
    order_E = torch.randperm(experts, generator=generator)
    labels_E = torch.randint(0, groups, (experts,), generator=generator)
    labels_E[order_E[:groups]] = torch.arange(groups)
    return labels_E
