"""ZipIt! (Stoica et al., arXiv 2305.03053) for a group of experts: neurons pair up across experts and within one.

All neurons of the group are pooled and the most similar pair is merged, again and again, until as many are left as one
expert has. Unlike a permutation this may merge two neurons of one expert and leave one of another alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcsmoe.align import correlation, require_finite
from mcsmoe.grouping.weighting import shares
from mcsmoe.merge.base import Merged, MergeInputs, grouping_members
from mcsmoe.types import ExpertWeights, Role

ALPHA = 0.1


@dataclass(frozen=True)
class Joined:
    """Two neurons that become one, as a rule sees them: their similarities to all N neurons, and what those are."""

    first_N: NDArray[np.floating]
    second_N: NDArray[np.floating]
    between: float  # similarity of the two
    first: float  # coefficient
    second: float
    coefficient_N: NDArray[np.floating]
    repeated_N: NDArray[np.bool_]  # whether a neuron has a part from an expert that the joined one has a part of, too


Rule = Callable[[Joined], NDArray[np.floating]]
"""Similarities of the joined neuron to all others."""


def penalised(alpha: float) -> Rule:
    """The smaller of the two similarities, times ``alpha`` where it is positive and an expert would be met again.

    For two experts this is the published penalty on repeated matches, except that a negative similarity stays as it is:
    shrunk towards zero, an opposed neuron would become more attractive. From three experts on, a neuron of the third
    may still join a pair of the others at no penalty, so that neurons that agree in all experts end up together.
    """

    def rule(joined: Joined) -> NDArray[np.floating]:
        lower_N = np.minimum(joined.first_N, joined.second_N)
        return np.where(joined.repeated_N & (lower_N > 0), np.float32(alpha) * lower_N, lower_N)

    return rule


def ward(joined: Joined) -> NDArray[np.floating]:
    """Update of ``ward_similarity``, exact for weighted means (Lance and Williams, 1967)."""
    others_N, first, second = joined.coefficient_N, joined.first, joined.second
    grown_N = (first + others_N) * joined.first_N + (second + others_N) * joined.second_N - others_N * joined.between
    return grown_N / (first + second + others_N)


def pair_up(similarity_NN: Tensor, keep: int, coefficient_N: Tensor, rule: Rule) -> Tensor:
    """Merge the most similar pair until ``keep`` neurons are left.

    Args:
        similarity_NN: symmetric (the upper triangle is used); neurons expert by expert, ``keep`` of each. Copied.
        keep: how many to leave.
        coefficient_N: positive weights of the neurons; a joined one has the sum of its parts'.
        rule: similarities of a joined neuron.

    Returns:
        int64 [N]: slots 0..keep-1, numbered by the lowest neuron in each. Ties go to the lowest indices.
    """
    similar = _symmetric(similarity_NN)
    count = len(similar)
    weight_N = coefficient_N.cpu().numpy().astype(similar.dtype)
    parts_NE = np.arange(count)[:, None] // keep == np.arange(count // keep)[None, :]
    parent = np.arange(count)
    partner, best = similar.argmax(axis=1), similar.max(axis=1)
    fresh = np.ones(count, dtype=bool)
    for _ in range(count - keep):
        # A row is searched again only when its bound comes out on top, which few rows of a joined neuron's partners do.
        while not fresh[first := int(best.argmax())]:
            partner[first] = similar[first].argmax()
            best[first], fresh[first] = similar[first, partner[first]], True
        first, second = sorted((first, int(partner[first])))
        parts_NE[first] |= parts_NE[second]
        row = rule(
            Joined(
                first_N=similar[first],
                second_N=similar[second],
                between=float(similar[first, second]),
                first=float(weight_N[first]),
                second=float(weight_N[second]),
                coefficient_N=weight_N,
                repeated_N=(parts_NE & parts_NE[first]).any(axis=1),
            )
        )
        row[[first, second]] = -np.inf
        weight_N[first] += weight_N[second]
        parent[second] = first
        similar[first, :] = similar[:, first] = row
        similar[second, :] = similar[:, second] = -np.inf
        fresh[(partner == first) | (partner == second)] = False
        better = row > best
        partner[better], best[better], fresh[better] = first, row[better], True
        partner[first], best[first], fresh[first] = row.argmax(), row.max(), True
        best[second], fresh[second] = -np.inf, True
    # Neurons merge into lower ones, so one ascending pass finds every root.
    for neuron in range(count):
        parent[neuron] = parent[parent[neuron]]
    return torch.from_numpy(np.unique(parent, return_inverse=True)[1]).long()


def _symmetric(similarity_NN: Tensor) -> NDArray[np.floating]:
    """A copy with the upper triangle mirrored (products leave the last bits unequal) and -inf on the diagonal."""
    similar = similarity_NN.cpu().numpy().copy()
    for start in range(0, len(similar), 1024):
        end = start + 1024
        similar[end:, start:end] = similar[start:end, end:].T
        block = np.triu(similar[start:end, start:end], 1)
        similar[start:end, start:end] = block + block.T
    np.fill_diagonal(similar, -np.inf)
    return similar


def inner_products(weights: ExpertWeights, include_output: bool = True) -> Tensor:
    """[N, N] inner products of all neurons of the stacked experts, N = E x F, expert by expert.

    A neuron is its input rows and biases and, if ``include_output``, its output column.
    """
    parts = [_neurons(weights, name) for name in weights.names(Role.INPUT, Role.INPUT_BIAS)]
    if include_output:
        parts += [_neurons(weights, name) for name in weights.names(Role.OUTPUT)]
    neurons_NP = torch.cat(parts, dim=1)
    return neurons_NP @ neurons_NP.t()


def ward_similarity(product_NN: Tensor, coefficient_N: Tensor) -> Tensor:
    """[N, N]: minus what merging two neurons adds to the squared distance of neurons from the mean of their slot.

    That is a b / (a + b) times the squared distance of the two, for coefficients a and b (Ward's criterion). Inner
    products themselves would pair a small neuron with a large one rather than with its equal.

    Args:
        product_NN: inner products of the neurons.
        coefficient_N: their positive weights.
    """
    square_N, weight_N = product_NN.diagonal(), coefficient_N.to(product_NN)
    distance_NN = (square_N[:, None] + square_N[None, :]).sub_(product_NN, alpha=2).clamp_(min=0)
    return distance_NN.mul_(-(weight_N[:, None] * weight_N[None, :]) / (weight_N[:, None] + weight_N[None, :]))


def _neurons(weights: ExpertWeights, name: str) -> Tensor:
    """[E x F, ...]: one row per neuron."""
    tensor = weights.tensors[name].to(torch.promote_types(weights.tensors[name].dtype, torch.float32))
    tensor = tensor.transpose(1, 2) if weights.roles[name] is Role.OUTPUT else tensor
    return tensor.reshape(weights.num_experts * weights.width, -1)


@torch.no_grad()
def zip_weights(weights: ExpertWeights, slot_N: Tensor, share_E: Tensor) -> ExpertWeights:
    """One expert (stacked as G = 1) from the E given, neuron n going to slot ``slot_N[n]`` of F.

    Rows of a slot are averaged, weighted by the share of the expert they come from. Output columns are summed with
    those shares: the merged expert then computes the share-weighted mean of the experts' outputs from the merged
    neurons, however many neurons of each expert a slot holds. With one neuron of each it is their weighted mean.
    """
    slots = weights.width
    part_N = share_E.double().repeat_interleave(slots)
    total_F = torch.zeros(slots, dtype=torch.float64).index_add_(0, slot_N, part_N)

    def zipped(name: str, tensor: Tensor) -> Tensor:
        role = weights.roles[name]
        if role is Role.OUTPUT_BIAS:
            return (share_E.double() @ tensor.double())[None].to(tensor.dtype)
        factor_N = part_N if role is Role.OUTPUT else part_N / total_F[slot_N]
        neurons_NP = _neurons(weights, name).double() * factor_N[:, None]
        made_FP = neurons_NP.new_zeros(slots, neurons_NP.shape[1]).index_add_(0, slot_N, neurons_NP)
        made = made_FP.t() if role is Role.OUTPUT else made_FP.reshape(tensor.shape[1:])
        return made.contiguous()[None].to(tensor.dtype)

    return weights.map(zipped)


def _merge(inputs: MergeInputs, by_activation: bool, importance_E: Tensor | None = None) -> Merged:
    require_finite(inputs.weights, inputs.layer)
    grouping = inputs.grouping
    share_E = shares(grouping, torch.ones(grouping.num_experts) if importance_E is None else importance_E)
    made = inputs.weights.select(grouping.dominant)
    for group, experts in enumerate(grouping_members(grouping)):
        if len(experts) == 1:
            continue
        members = inputs.weights.select(experts)
        # An expert without any share would leave its neurons without an average of their own.
        coefficient_N = share_E[experts].clamp(min=1e-9).repeat_interleave(members.width)
        similarity_NN: Tensor | None = None
        rule: Rule = ward
        if by_activation:
            tokens, activation = inputs.require_tokens("ZipIt")
            inputs_TD = torch.cat([tokens[expert] for expert in experts.tolist()])
            if len(inputs_TD) >= 2:
                hidden_TN = torch.cat([members.hidden(e, inputs_TD, activation) for e in range(len(experts))], dim=1)
                similarity_NN, rule = correlation(hidden_TN, hidden_TN), penalised(ALPHA)
        if similarity_NN is None:
            similarity_NN = ward_similarity(inner_products(members), coefficient_N)
        slot_N = pair_up(similarity_NN, members.width, coefficient_N, rule)
        for name, tensor in zip_weights(members, slot_N, share_E[experts]).tensors.items():
            made.tensors[name][group] = tensor[0]
    return Merged(made, grouping.expert_to_group.clone(), share_E, grouping.dominant.clone())


def zipit(inputs: MergeInputs) -> Merged:
    """Pair neurons by the correlation of their activations on the tokens of the group, experts counting evenly.

    Reads ``tokens`` and ``activation``. A group with fewer than two tokens has no correlations: it is paired by
    weights. Holds the similarities of all neurons of a group twice: 8 (k F)^2 bytes for k experts.
    """
    inputs.require_tokens("ZipIt")
    return _merge(inputs, by_activation=True)


def zipit_frequency(inputs: MergeInputs) -> Merged:
    """``zipit`` with experts counting by how often they are used, as in plain averaging; reads ``frequency_E`` too."""
    inputs.require_tokens("ZipIt")
    return _merge(inputs, by_activation=True, importance_E=inputs.frequency_E.clamp(min=1e-9))


def zipit_weight(inputs: MergeInputs) -> Merged:
    """Pair neurons by the distance of their weights, input rows with output columns; needs no tokens."""
    return _merge(inputs, by_activation=False)
