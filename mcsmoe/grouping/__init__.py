"""Which experts of each layer are merged: budget, then groups (section 3.1 of MC-SMoE)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.grouping import baselines, hierarchical
from mcsmoe.grouping.budget import BUDGETS, by_priority, normalised
from mcsmoe.grouping.dominant import group_by_dominant
from mcsmoe.types import Grouping, LayerId

__all__ = ["BUDGETS", "METHODS", "check_choices", "from_labels", "identity", "plan"]


@dataclass(frozen=True)
class _Layer:
    """What a method may look at."""

    name: LayerId
    frequency_E: Tensor
    similarity_EE: Tensor  # empty where the method needs none
    dominant_G: Tensor
    capacity: int | None
    linkage: str
    seed: int

    @property
    def groups(self) -> int:
        return len(self.dominant_G)


def _dominant(layer: _Layer) -> Grouping:
    return group_by_dominant(layer.frequency_E, layer.similarity_EE, layer.dominant_G, layer.capacity, layer=layer.name)


def _spectral(layer: _Layer) -> Grouping:
    return _led(baselines.spectral(layer.similarity_EE, layer.groups, layer.seed), layer.frequency_E)


def _hierarchical(layer: _Layer) -> Grouping:
    labels_E = hierarchical.cluster(layer.similarity_EE, layer.groups, layer.linkage)
    return _led(labels_E, layer.frequency_E)


def _random(layer: _Layer) -> Grouping:
    labels_E = baselines.chance(len(layer.frequency_E), layer.groups, layer.seed, layer.name)
    return _led(labels_E, layer.frequency_E)


METHODS: dict[str, Callable[[_Layer], Grouping]] = {
    "dominant": _dominant,
    "spectral": _spectral,
    "hierarchical": _hierarchical,
    "random": _random,
}
"""Grouping methods by name. All but ``dominant`` take only the number of groups from the budget."""


def _led(labels_E: Tensor, frequency_E: Tensor) -> Grouping:
    """Clusters with their most frequent member as leader (ties by lower index), in ascending order of leaders."""
    order_E = by_priority(frequency_E)
    groups = int(labels_E.max()) + 1
    # The first of its cluster in order of priority leads it.
    first_G = (labels_E[order_E][None, :] == torch.arange(groups)[:, None]).to(torch.int8).argmax(dim=1)
    dominant_G, by_leader_G = order_E[first_G].sort()
    rank_G = torch.empty_like(by_leader_G)
    rank_G[by_leader_G] = torch.arange(groups)
    return Grouping(rank_G[labels_E], dominant_G)


def identity(experts: int) -> Grouping:
    """Every expert its own group: no merging."""
    return Grouping(torch.arange(experts), torch.arange(experts))


def _check_similarity(layer: LayerId, similarity: Mapping[LayerId, Tensor], experts: int) -> Tensor:
    if layer not in similarity:
        raise ValueError(f"layer {layer!r}: no similarity given; there is one for {sorted(similarity)}")
    similarity_EE = similarity[layer].detach().to("cpu", torch.float64)
    if similarity_EE.shape != (experts, experts):
        raise ValueError(
            f"layer {layer!r}: the similarity has shape {tuple(similarity_EE.shape)}, the frequency has {experts} "
            "experts; are both from this model?"
        )
    bad_EE = ~torch.isfinite(similarity_EE)
    if bad_EE.any():
        i, j = bad_EE.nonzero()[0].tolist()
        raise ValueError(f"layer {layer!r}: the similarity of experts {i} and {j} is {float(similarity_EE[i, j])}")
    gap_EE = (similarity_EE - similarity_EE.T).abs()
    if float(gap_EE.max()) > 1e-5:
        i, j = divmod(int(gap_EE.argmax()), experts)
        raise ValueError(
            f"layer {layer!r}: the similarity of experts {i} and {j} is {float(similarity_EE[i, j])} one way and "
            f"{float(similarity_EE[j, i])} the other; it must be symmetric"
        )
    return similarity_EE


def _choose(field: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{field} is {name!r}; choose one of {', '.join(known)}")


def check_choices(method: str, budget: str, capacity: int | None, linkage: str) -> None:
    """Raise ValueError naming field, value and remedy for names that are not known, or a capacity that cannot be."""
    _choose("method", method, METHODS)
    _choose("budget", budget, BUDGETS)
    _choose("linkage", linkage, hierarchical.LINKAGES)
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
        raise ValueError(f"capacity is {capacity!r}; give a whole number of experts, at least 1, or leave it out")
    if capacity is not None and method != "dominant":
        raise ValueError(f"capacity is {capacity}, but method {method!r} has no capacity; leave it out")


def plan(
    frequency: Mapping[LayerId, Tensor],
    similarity: Mapping[LayerId, Tensor],
    average: int,
    *,
    method: str = "dominant",
    budget: str = "adaptive",
    capacity: int | None = None,
    linkage: str = "average",
    seed: int = 0,
    excluded: Collection[LayerId] = (),
) -> dict[LayerId, Grouping]:
    """Group the experts of every layer so that ``average`` groups a layer are left on average.

    Args:
        frequency: by layer in forward order, [E] how often each expert is used (any scale).
        similarity: by layer, [E, E] symmetric; not needed for ``random``, for excluded layers, or without merging.
        average: groups per layer on average over the layers not excluded; their total is exact. The number of
            experts means no merging.
        method: one of ``METHODS``.
        budget: one of ``BUDGETS``.
        capacity: most experts in a group, its leader included (``dominant`` only).
        linkage: one of ``hierarchical.LINKAGES`` (``hierarchical`` only).
        seed: of k-means and of chance.
        excluded: layers that keep all their experts.

    Returns:
        By layer, in the order of ``frequency``; groups are numbered by ascending index of their dominant expert.

    Raises:
        ValueError: a value out of range, an unknown name, statistics that are not finite or do not fit each other;
            names the field or layer, the value and the remedy.
    """
    check_choices(method, budget, capacity, linkage)
    unknown = [layer for layer in excluded if layer not in frequency]
    if unknown:
        raise ValueError(f"excluded layer {unknown[0]!r} is not a layer of this model; it has {list(frequency)}")
    skipped = set(excluded)
    shares = {layer: normalised(layer, this) for layer, this in frequency.items()}
    chosen = BUDGETS[budget]({layer: this for layer, this in shares.items() if layer not in skipped}, average)
    groupings: dict[LayerId, Grouping] = {}
    for layer, frequency_E in shares.items():
        experts = len(frequency_E)
        if layer in skipped or len(chosen[layer]) == experts:
            groupings[layer] = identity(experts)
            continue
        needs_similarity = method != "random"
        similarity_EE = _check_similarity(layer, similarity, experts) if needs_similarity else torch.empty(0, 0)
        groupings[layer] = METHODS[method](
            _Layer(layer, frequency_E, similarity_EE, chosen[layer], capacity, linkage, seed)
        )
    return groupings


def from_labels(labels: Sequence[int], dominant: Sequence[bool], layer: LayerId = "") -> Grouping:
    """The grouping of one layer from its rows in table ``groups``, in ascending order of experts.

    Args:
        labels: the group of each expert, 0..G-1.
        dominant: whether each expert leads its group.
        layer: named in errors.

    Raises:
        ValueError: a group that is missing, has no leader or has two; names layer, group and experts.
    """
    if not len(labels) or len(labels) != len(dominant):
        raise ValueError(f"layer {layer!r}: {len(labels)} groups and {len(dominant)} dominant flags; give one each")
    groups = max(labels) + 1
    leaders: list[list[int]] = [[] for _ in range(groups)]
    for expert, (group, leads) in enumerate(zip(labels, dominant, strict=True)):
        if group < 0:
            raise ValueError(f"layer {layer!r}: expert {expert} is in group {group}; groups are numbered from 0")
        if leads:
            leaders[group].append(expert)
    for group, found in enumerate(leaders):
        if group not in labels:
            raise ValueError(f"layer {layer!r}: no expert is in group {group} of 0..{groups - 1}")
        if len(found) != 1:
            raise ValueError(f"layer {layer!r}: group {group} is led by experts {found}; it needs exactly one leader")
    made = Grouping(
        torch.tensor(list(labels), dtype=torch.int64), torch.tensor([found[0] for found in leaders], dtype=torch.int64)
    )
    made.validate(layer)
    return made
