"""ZipIt for a group of experts: the greedy search, what it computes, and the defects of the published one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_experts import LAYOUTS, activation, compute, difference, experts, orders, tokens
from torch import Tensor

from mcsmoe.align import apply_permutation, correlation
from mcsmoe.merge import METHODS
from mcsmoe.merge.base import MergeInputs
from mcsmoe.merge.zipit import (
    ALPHA,
    Joined,
    Rule,
    inner_products,
    pair_up,
    penalised,
    ward,
    ward_similarity,
    zip_weights,
)
from mcsmoe.types import ExpertWeights, Grouping

ONE_GROUP = torch.zeros(3, dtype=torch.int64)
EVEN = torch.full((3,), 1 / 3, dtype=torch.float64)


def _inputs(weights: ExpertWeights, **changes: Any) -> MergeInputs:
    count = weights.num_experts
    values: dict[str, Any] = {
        "layer": "some.layer",
        "weights": weights,
        "grouping": Grouping(torch.zeros(count, dtype=torch.int64), torch.tensor([1])),
        "frequency_E": torch.full((count,), 1 / count),
        "tokens": tokens([30] * count),
        "activation": activation,
    }
    return MergeInputs(**(values | changes))


# -- the search ------------------------------------------------------------------------------------------------------
def _slowly(similar: np.ndarray, keep: int, weight: list[float], by: str) -> list[set[int]]:
    """The definition, with every similarity taken anew from the members of the slots."""
    slots = [{neuron} for neuron in range(len(similar))]
    penalty: dict[frozenset[int], float] = {}
    while len(slots) > keep:
        best, pair = -np.inf, (0, 0)
        for i in range(len(slots)):
            for j in range(i + 1, len(slots)):
                value = _between(similar, slots[i], slots[j], weight, by, penalty)
                if value > best:
                    best, pair = value, (i, j)
        i, j = pair
        joined = slots[i] | slots[j]
        owners = {n // keep for n in joined}
        for k, other in enumerate(slots):
            if k in pair:
                continue
            repeated = bool(owners & {n // keep for n in other})
            lower = min(_between(similar, slots[m], other, weight, by, penalty) for m in pair)
            penalty[frozenset(joined | other)] = lower * (ALPHA if repeated and lower > 0 else 1.0)
        slots[i] = joined
        del slots[j]
    return slots


def _between(
    similar: np.ndarray, first: set[int], second: set[int], weight: list[float], by: str, penalty: dict[Any, float]
) -> float:
    if by == "penalised":
        if len(first) == len(second) == 1:
            return float(similar[min(first), min(second)])
        return penalty[frozenset(first | second)]
    # Ward: what the squared distance from the slot's mean grows by, from the points themselves.
    means, total = [], []
    for slot in (first, second):
        part = np.array([weight[n] for n in slot])
        means.append((part[:, None] * similar[list(slot)]).sum(0) / part.sum())
        total.append(part.sum())
    return -float(total[0] * total[1] / (total[0] + total[1]) * np.square(means[0] - means[1]).sum())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("by", ["penalised", "ward"])
def test_the_search_agrees_with_the_definition(by: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    keep, points = 5, generator.standard_normal((15, 7))
    weight = generator.uniform(0.2, 2.0, 3).repeat(keep)
    if by == "ward":
        table, rule = points, ward
        similarity_NN = ward_similarity(torch.from_numpy(points @ points.T), torch.from_numpy(weight))
    else:
        table = np.corrcoef(points)
        similarity_NN, rule = torch.from_numpy(table), penalised(ALPHA)
    slot_N = pair_up(similarity_NN, keep, torch.from_numpy(weight), rule)
    found = [set(np.flatnonzero(slot_N.numpy() == slot)) for slot in range(keep)]
    assert found == _slowly(table, keep, weight.tolist(), by)


@pytest.mark.parametrize("rule", [ward, penalised(ALPHA)])
def test_equal_similarities_join_the_lowest_neurons(rule: Rule) -> None:
    assert pair_up(torch.zeros(6, 6), 3, torch.ones(6), rule).tolist() == [0, 0, 0, 0, 1, 2]


# -- what is computed ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["zipit", "zipit-frequency", "zipit-weight"])
def test_permuted_copies_come_together_again(method: str, layout: str) -> None:
    one = experts(layout, count=1)
    copies = apply_permutation(one.select(ONE_GROUP), orders(3, 12))
    (inputs_TD,) = tokens([20], seed=5)
    merged = METHODS[method](_inputs(copies)).weights
    expected = compute(one, 0, inputs_TD)
    assert (compute(merged, 0, inputs_TD) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share_E", [EVEN, torch.tensor([0.7, 0.3, 0.0]).double()])
def test_neurons_that_are_equal_lose_nothing_however_many_an_expert_has_of_them(layout: str, share_E: Tensor) -> None:
    """Experts over one set of input rows, but with other repetitions and outputs: the merged one computes their mean."""
    weights = experts(layout, count=3, width=6)
    pick_EF = torch.tensor([[0, 0, 0, 1, 2, 3], [3, 3, 2, 1, 1, 0], [2, 0, 1, 3, 2, 2]])
    for name in weights.names():
        if name in ("wi", "gate", "up", "wi_bias", "gate_bias", "up_bias"):
            source = weights.tensors[name][0, :4].clone()
            weights.tensors[name][:] = source[pick_EF]
    slot_N = pick_EF.flatten()
    # Slots 4 and 5 take one neuron each, so that all six are used.
    slot_N[torch.tensor([1, 7])] = torch.tensor([4, 5])
    merged = zip_weights(weights, slot_N, share_E)
    (inputs_TD,) = tokens([20], seed=5)
    expected = sum(float(share_E[e]) * compute(weights, e, inputs_TD) for e in range(3))
    assert (compute(merged, 0, inputs_TD) - expected).abs().max() < 1e-5 * float(expected.abs().max())


def test_one_neuron_of_each_expert_in_a_slot_is_the_weighted_mean_of_aligned_experts() -> None:
    weights, share_E = experts("gated-biased", count=3), torch.tensor([0.5, 0.2, 0.3]).double()
    order_EF = orders(3, 12)
    merged = zip_weights(weights, order_EF.flatten(), share_E)
    aligned = apply_permutation(weights, order_EF.argsort(dim=1))
    expected = aligned.map(lambda _, tensor: torch.einsum("e,e...->...", share_E, tensor.double()).float()[None])
    assert difference(merged, expected) < 1e-6


def test_two_neurons_of_one_expert_may_merge_where_a_permutation_may_not() -> None:
    weights = experts(count=2, width=3)
    rows = torch.eye(5)
    weights.tensors["wi"][0] = torch.stack([rows[0], rows[0] * 1.01, rows[1]])
    weights.tensors["wi"][1] = torch.stack([rows[1], rows[2], rows[3]])
    similarity_NN = ward_similarity(inner_products(weights, include_output=False), torch.ones(6))
    assert pair_up(similarity_NN, 4 - 1, torch.ones(6), ward).tolist()[:3] == [0, 0, 1]


# -- regressions -----------------------------------------------------------------------------------------------------
def test_without_the_output_projection_it_has_no_say_at_any_step() -> None:
    """zipit_wo: the published search brings the output projection back in when it updates its costs."""
    weights = experts(count=3)
    other = experts(count=3, seed=7)
    changed = ExpertWeights({"wi": weights.tensors["wi"], "wo": 50 * other.tensors["wo"]}, weights.roles)
    coefficient_N = torch.ones(36)

    def slots(given: ExpertWeights, include_output: bool) -> list[int]:
        products_NN = inner_products(given, include_output)
        return pair_up(ward_similarity(products_NN, coefficient_N), 12, coefficient_N, ward).tolist()

    assert slots(weights, False) == slots(changed, False)
    assert slots(weights, True) != slots(changed, True)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 1, 0]])
def test_a_group_without_tokens_is_merged_by_weights_not_replaced_by_its_first_expert(counts: list[int]) -> None:
    """zipit_empty."""
    weights = experts(count=3)
    merged = METHODS["zipit"](_inputs(weights, tokens=tokens(counts))).weights
    assert difference(merged, METHODS["zipit-weight"](_inputs(weights)).weights) == 0.0
    assert difference(merged, weights.select(torch.tensor([0]))) > 0.1


def test_the_penalty_never_makes_an_opposed_neuron_more_attractive() -> None:
    """zipit_alpha: a tenth of a negative correlation is a higher one."""
    first_N, second_N = np.array([0.8, 0.5, -0.9, -0.2]), np.array([0.6, -0.4, -0.5, 0.7])
    joined = Joined(first_N, second_N, 0.0, 1.0, 1.0, np.ones(4), np.array([True, True, True, False]))
    assert penalised(0.1)(joined) == pytest.approx([0.06, -0.4, -0.9, -0.2])
    free = Joined(first_N, second_N, 0.0, 1.0, 1.0, np.ones(4), np.zeros(4, dtype=bool))
    assert penalised(0.1)(free) == pytest.approx([0.6, -0.4, -0.9, -0.2])
    # a and b of the first expert are opposed, once a has met its like all that is left is negative.
    similarity_NN = torch.tensor(
        [[1.0, -0.9, 0.9, -0.3], [-0.9, 1.0, -0.8, -0.2], [0.9, -0.8, 1.0, -0.3], [-0.3, -0.2, -0.3, 1.0]]
    )

    def published(joined: Joined) -> Any:
        return 0.1 * np.minimum(joined.first_N, joined.second_N)

    rules: dict[str, Rule] = {"ours": penalised(0.1), "published": published}
    slots = {name: pair_up(similarity_NN, 2, torch.ones(4), rule).tolist() for name, rule in rules.items()}
    assert slots == {"ours": [0, 1, 0, 1], "published": [0, 1, 0, 0]}


def test_activations_decide_in_zipit_and_weights_in_zipit_weight() -> None:
    """Neurons with unlike weights that answer the calibration tokens alike: only activations bring them together."""
    weights = experts(count=2, width=2, d_model=5)
    rows = torch.eye(5)
    weights.tensors["wi"][0] = torch.stack([rows[0], rows[1]])
    weights.tensors["wi"][1] = torch.stack([rows[1] * 1.1, rows[2] * 3.0])
    # The tokens only vary along one direction each: dimensions 0 and 2 rise together, 1 on its own.
    generator = torch.Generator().manual_seed(0)
    rising, apart = torch.rand(50, 1, generator=generator), torch.rand(50, 1, generator=generator)
    inputs_TD = torch.cat([rising, apart, rising, torch.zeros(50, 2)], dim=1)
    both = torch.cat([weights.hidden(e, inputs_TD, activation) for e in (0, 1)], dim=1)
    slot_N = pair_up(correlation(both, both), 2, torch.ones(4), penalised(ALPHA))
    assert slot_N.tolist() == [0, 1, 1, 0]
    products_NN = inner_products(weights, include_output=False)
    by_weight_N = pair_up(ward_similarity(products_NN, torch.ones(4)), 2, torch.ones(4), ward)
    assert by_weight_N.tolist() == [0, 0, 0, 1]
