"""REAM (arXiv 2604.04356): router-weighted merging of experts into the most salient ones, as its source does it.

Centroids are the experts with the largest saliency. In descending saliency each takes its nearest experts that are not
taken yet, up to a group of C; where few experts are left for few large groups, most centroids stay as they are
(pseudo-pruning). Members are aligned to their centroid, averaged by saliency, and the rows of the router that belong to
others than centroids are deleted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mcsmoe.grouping.budget import by_priority
from mcsmoe.grouping.weighting import shares
from mcsmoe.merge.base import Merged, grouping_members, weighted_average
from mcsmoe.similarity.base import cosine, gram, mapped
from mcsmoe.similarity.tokens import hidden
from mcsmoe.types import ExpertActivation, ExpertWeights, Grouping, LayerId, Role, RouterWeights

GROUP_SIZE = 16
"""C: most experts in a group, its centroid included."""


def pseudo_groups(saliency_E: Tensor, similarity_EE: Tensor, groups: int, size: int = GROUP_SIZE) -> Grouping:
    """Groups around the ``groups`` most salient experts (ties by lower index), at most ``size`` in each while they last.

    What no group has room for joins its most similar centroid. Groups are numbered by ascending centroid.

    Raises:
        ValueError: a group size below 1.
    """
    if size < 1:
        raise ValueError(f"the size of a group is {size}; give at least 1")
    experts = len(saliency_E)
    centroids = by_priority(saliency_E.detach().cpu().double())[:groups]
    leader_E = torch.full((experts,), -1, dtype=torch.int64)
    leader_E[centroids] = centroids
    similarity_EE = similarity_EE.detach().cpu().double()
    for centroid in centroids.tolist():
        order_E = by_priority(similarity_EE[centroid])
        free = order_E[leader_E[order_E] == -1][: size - 1]
        leader_E[free] = centroid
    left_E = leader_E == -1
    if bool(left_E.any()):
        leader_E[left_E] = centroids[similarity_EE[left_E][:, centroids].argmax(dim=1)]
    dominant_G = centroids.sort().values
    return Grouping(torch.searchsorted(dominant_G, leader_E), dominant_G)


@torch.no_grad()
def mean_gated_outputs(
    weights: ExpertWeights, activation: ExpertActivation, router: RouterWeights, inputs: Iterable[Tensor]
) -> Tensor:
    """float64 [E, D]: mean over tokens of router probability (softmax) times output, every expert on every token.

    ``inputs`` come as blocks [T, D]. The output is linear in the hidden activations, whose mean is taken first.
    """
    (name,) = weights.names(Role.OUTPUT)
    total_EF = torch.zeros(weights.num_experts, weights.width, dtype=torch.float64)
    probability_E, count = torch.zeros(weights.num_experts, dtype=torch.float64), 0
    for inputs_TD in inputs:
        logits_TE = inputs_TD.float() @ router.weight_ED.float().T
        logits_TE = logits_TE if router.bias_E is None else logits_TE + router.bias_E.float()
        chance_TE = logits_TE.softmax(dim=1).double()
        for expert in range(weights.num_experts):
            one = weights.select(torch.tensor([expert]))
            hidden_TF = hidden(one, inputs_TD[None], activation)[0]
            total_EF[expert] += (chance_TE[:, expert] @ hidden_TF.double()).cpu()
        probability_E += chance_TE.sum(dim=0).cpu()
        count += len(inputs_TD)
    made_ED = torch.einsum("edf,ef->ed", weights.tensors[name].double().cpu(), total_EF)
    bias_ED = weights.tensors.get(f"{name}_bias")
    if bias_ED is not None:
        made_ED += probability_E[:, None] * bias_ED.double().cpu()
    return made_ED / max(1, count)


def similarity(mean_output_ED: Tensor, logits_gram_EE: Tensor) -> Tensor:
    """float64 [E, E] in [0, 1]: the mean of two similarities.

    One is the cosine of mean gated outputs, mapped to [0, 1]; the other 1 less the distance of the experts' router
    logits (over tokens, scaled to norm 1) over the largest such distance. Logits enter by their Gram matrix.
    """
    outputs_EE = mapped(cosine(gram([mean_output_ED])))
    distance_EE = (2 - 2 * cosine(logits_gram_EE.double().cpu())).clamp(min=0).sqrt()
    largest = float(distance_EE.max())
    routing_EE = 1 - distance_EE / largest if largest > 0 else torch.ones_like(distance_EE)
    made_EE = (outputs_EE + routing_EE) / 2
    return (made_EE + made_EE.T) / 2


@torch.no_grad()
def align_to_centroids(
    weights: ExpertWeights, grouping: Grouping, inputs_TD: Tensor, activation: ExpertActivation
) -> Tensor:
    """int64 [E, F]: order of each expert's neurons that is nearest to its centroid's.

    The cost of matching two neurons is the distance of their activations over the tokens plus that of their weights
    (rows of the input projections with the column of the output projection), each scaled to norm 1. The source takes
    the weights' distance in 64 principal directions, to save time; here it is exact.
    """
    from scipy.optimize import linear_sum_assignment

    permutation_EF = torch.arange(weights.width).repeat(weights.num_experts, 1)
    for group, members in enumerate(grouping_members(grouping)):
        centroid = int(grouping.dominant[group])
        others = [expert for expert in members.tolist() if expert != centroid]
        if not others:
            continue
        first = _neurons(weights, centroid, inputs_TD, activation)
        for expert in others:
            found = _neurons(weights, expert, inputs_TD, activation)
            cost_FF = sum(torch.cdist(one, two) for one, two in zip(first, found, strict=True))
            assert isinstance(cost_FF, Tensor)
            permutation_EF[expert] = torch.from_numpy(linear_sum_assignment(cost_FF.cpu().numpy())[1])
    return permutation_EF


def _neurons(
    weights: ExpertWeights, expert: int, inputs_TD: Tensor, activation: ExpertActivation
) -> tuple[Tensor, Tensor]:
    """[F, T] activations and [F, ...] weights of the neurons of an expert, rows of norm 1."""
    one = weights.select(torch.tensor([expert]))
    hidden_FT = hidden(one, inputs_TD[None], activation)[0].T.float()
    parts = [one.tensors[name][0].float() for name in one.names(Role.INPUT)]
    parts += [one.tensors[name][0].float().T for name in one.names(Role.OUTPUT)]
    return _unit(hidden_FT), _unit(torch.cat(parts, dim=1))


def _unit(rows: Tensor) -> Tensor:
    return rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-8)


@torch.no_grad()
def merge(
    weights: ExpertWeights,
    grouping: Grouping,
    saliency_E: Tensor,
    inputs_TD: Tensor,
    activation: ExpertActivation,
    layer: LayerId = "",
) -> Merged:
    """Align, average by saliency, and leave the centroids' rows of the router.

    An expert without saliency counts as the least salient one that has some, so that it still has a part.
    """
    positive_E = saliency_E.double().cpu().clone()
    if bool((positive_E > 0).any()):
        positive_E[positive_E <= 0] = min(0.5, float(positive_E[positive_E > 0].min()))
    share_E = shares(grouping, positive_E)
    permutation_EF = align_to_centroids(weights, grouping, inputs_TD, activation)
    merged = weighted_average(weights, grouping, share_E, layer, permutation_EF)
    return Merged(merged, grouping.expert_to_group.clone(), share_E, grouping.dominant.clone(), ~grouping.leads())
