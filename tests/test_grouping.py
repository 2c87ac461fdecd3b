"""Budgets, groups and their controls: closed forms, brute force and laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from mcsmoe.grouping import METHODS, from_labels, plan
from mcsmoe.grouping.budget import adaptive, uniform
from mcsmoe.grouping.dominant import group_by_dominant
from mcsmoe.grouping.hierarchical import LINKAGES, cluster
from mcsmoe.types import Grouping


def random_similarity(experts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(experts, experts, generator=generator, dtype=torch.float64)
    similarity = (half + half.T) / 2
    return similarity.fill_diagonal_(1.0)


def random_layers(layers: int, experts: int, seed: int, levels: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Frequencies (whole numbers below ``levels``, hence tied, if given) and similarities."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"block.{layer}.mlp" for layer in range(layers)]
    if levels:
        frequency = {name: torch.randint(levels, (experts,), generator=generator).double() for name in names}
    else:
        frequency = {name: torch.rand(experts, generator=generator, dtype=torch.float64) for name in names}
    return frequency, {name: random_similarity(experts, seed * 100 + i) for i, name in enumerate(names)}


def parts(grouping: Grouping) -> set[frozenset[int]]:
    table = grouping.expert_to_group.tolist()
    return {frozenset(e for e, g in enumerate(table) if g == group) for group in range(grouping.num_groups)}


def blocks(sizes: tuple[int, ...], near: float = 0.9, far: float = 0.1) -> Tensor:
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.where(label[:, None] == label, near, far).double().fill_diagonal_(1.0)


# -- budgets -----------------------------------------------------------------------------------------------------
def test_adaptive_worked_example() -> None:
    frequency = {"a": torch.tensor([5.0, 3.0, 2.0, 0.0]), "b": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    # Normalised, maxima raised: a = 1, .3, .2, 0 and b = 1, .25, .25, .25; the four largest are a0, b0, a1, b1.
    assert {name: kept.tolist() for name, kept in adaptive(frequency, 2).items()} == {"a": [0, 1], "b": [0, 1]}
    assert {name: kept.tolist() for name, kept in adaptive(frequency, 3).items()} == {"a": [0, 1], "b": [0, 1, 2, 3]}
    assert {name: kept.tolist() for name, kept in uniform(frequency, 3).items()} == {"a": [0, 1, 2], "b": [0, 1, 2]}


@pytest.mark.parametrize("levels", [1, 2, 4, 0])
@pytest.mark.parametrize("average", [1, 2, 3, 5, 8])
def test_adaptive_total_is_exact_and_ties_break_by_layer_then_index(levels: int, average: int) -> None:
    for seed in range(8):
        frequency, _ = random_layers(5, 8, seed, levels)
        kept = adaptive(frequency, average)
        ranked = []
        for place, values in enumerate(frequency.values()):
            shares = (values / values.sum() if values.sum() else torch.full((8,), 1 / 8)).tolist()
            shares[shares.index(max(shares))] = 1.0
            ranked += [(-share, place, expert) for expert, share in enumerate(shares)]
        expected: dict[int, list[int]] = {place: [] for place in range(5)}
        for _, place, expert in sorted(ranked)[: average * 5]:
            expected[place].append(expert)
        assert [these.tolist() for these in kept.values()] == [sorted(these) for these in expected.values()]
        assert sum(map(len, kept.values())) == average * 5
        assert min(map(len, kept.values())) >= 1


def test_one_dominating_expert_leaves_no_layer_empty() -> None:
    frequency = {"a": torch.tensor([0.0, 7.0, 0.0]), "b": torch.tensor([4.0, 4.0, 4.0]), "c": torch.zeros(3)}
    assert {name: kept.tolist() for name, kept in adaptive(frequency, 1).items()} == {"a": [1], "b": [0], "c": [0]}


def test_scale_of_frequencies_does_not_matter() -> None:
    frequency, similarity = random_layers(3, 8, 5)
    scaled = {name: values * 10.0 ** (3 * i) for i, (name, values) in enumerate(frequency.items())}
    for one, other in zip(plan(frequency, similarity, 3).values(), plan(scaled, similarity, 3).values(), strict=True):
        assert torch.equal(one.expert_to_group, other.expert_to_group)


# -- groups around leaders ---------------------------------------------------------------------------------------
def slow_dominant(frequency: list[float], similarity: Any, leaders: list[int], capacity: int | None) -> dict[int, int]:
    """Straight from the definition, with Python's sort."""
    joined = {leader: leader for leader in leaders}
    for expert in sorted(range(len(frequency)), key=lambda e: (-frequency[e], e)):
        if expert in leaders:
            continue
        sizes = {leader: list(joined.values()).count(leader) for leader in leaders}
        free = [leader for leader in leaders if capacity is None or sizes[leader] < capacity]
        joined[expert] = min(free, key=lambda leader: (-float(similarity[expert, leader]), leader))
    return joined


@pytest.mark.parametrize("capacity", [None, 3, 4, 9])
def test_groups_follow_the_definition(capacity: int | None) -> None:
    for seed in range(12):
        frequency, similarity = random_layers(1, 9, seed, levels=5 if seed % 2 else 0)
        (values,), (pairs,) = frequency.values(), similarity.values()
        if seed % 3 == 0:  # ties between leaders
            pairs = (pairs * 4).round() / 4
        leaders = sorted(torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:3].tolist())
        made = group_by_dominant(values, pairs, torch.tensor(leaders), capacity)
        made.validate("layer")
        expected = slow_dominant(values.tolist(), pairs, leaders, capacity)
        assert {e: int(made.dominant[g]) for e, g in enumerate(made.expert_to_group.tolist())} == expected


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize(("average", "fewest"), [(3, 2), (4, 4), (5, 1), (3, 3)])
def test_adaptive_with_a_least_number_takes_it_from_every_layer_first(levels: int, average: int, fewest: int) -> None:
    """By a plain loop: the most frequent of each layer as often as it must, then of all that are left."""
    for seed in range(10):
        frequency, _ = random_layers(3, 6, seed, levels)
        made = adaptive(frequency, average, fewest)
        share = {
            name: (one / one.sum() if one.sum() else torch.ones(6) / 6).tolist() for name, one in frequency.items()
        }
        order = {name: sorted(range(6), key=lambda one: (-values[one], one)) for name, values in share.items()}
        wanted = {name: set(order[name][:fewest]) for name in share}
        left = [(-share[name][one], place, one) for place, name in enumerate(share) for one in order[name][fewest:]]
        for _, place, one in sorted(left)[: 3 * (average - fewest)]:
            wanted[list(share)[place]].add(one)
        assert {name: set(one.tolist()) for name, one in made.items()} == wanted
    with pytest.raises(ValueError, match="at least 4 experts, 3 on average; give 1 to 3"):
        adaptive(frequency, 3, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_every_method_gives_a_valid_grouping_of_the_asked_size(method: str, budget: str) -> None:
    for levels in (0, 1, 3):
        frequency, similarity = random_layers(3, 8, 4, levels)
        for average in range(1, 9):
            made = plan(frequency, similarity, average, method=method, budget=budget)
            assert list(made) == list(frequency)
            assert sum(grouping.num_groups for grouping in made.values()) == 3 * average
            for layer, grouping in made.items():
                grouping.validate(layer)
                assert (torch.bincount(grouping.expert_to_group, minlength=grouping.num_groups) > 0).all()
                assert grouping.dominant.tolist() == sorted(grouping.dominant.tolist())
                if method != "dominant":
                    for group, leader in enumerate(grouping.dominant.tolist()):
                        members = (grouping.expert_to_group == group).nonzero()[:, 0]
                        assert leader == int(members[frequency[layer][members].argmax()])


@pytest.mark.parametrize("method", ["dominant", "hierarchical", "spectral"])
def test_numbering_experts_differently_changes_no_group(method: str) -> None:
    frequency, similarity = random_layers(1, 8, 11)
    (name,) = frequency
    if method == "spectral":  # k-means depends on its start unless the blocks are plain
        similarity = {name: blocks((3, 3, 2)) + 0.01 * similarity[name]}
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    before = plan(frequency, similarity, 3, method=method)[name]
    after = plan({name: frequency[name][order]}, {name: similarity[name][order][:, order]}, 3, method=method)[name]
    assert {frozenset(order[list(members)].tolist()) for members in parts(after)} == parts(before)


def test_excluded_layers_keep_all_experts_and_cost_no_budget() -> None:
    frequency, similarity = random_layers(3, 8, 6)
    names = list(frequency)
    del similarity[names[0]]
    made = plan(frequency, similarity, 2, excluded=[names[0]])
    assert made[names[0]].expert_to_group.tolist() == list(range(8)) == made[names[0]].dominant.tolist()
    assert made[names[1]].num_groups + made[names[2]].num_groups == 4
    assert plan(frequency, {}, 2, excluded=names)[names[2]].num_groups == 8


def test_leaving_a_layer_out_does_not_change_chance_elsewhere() -> None:
    frequency, _ = random_layers(3, 8, 6)
    names = list(frequency)
    every = plan(frequency, {}, 3, method="random", budget="uniform", seed=1)
    fewer = plan(frequency, {}, 3, method="random", budget="uniform", seed=1, excluded=names[:1])
    again = plan(frequency, {}, 3, method="random", budget="uniform", seed=2)
    assert torch.equal(every[names[2]].expert_to_group, fewer[names[2]].expert_to_group)
    assert any(not torch.equal(every[name].expert_to_group, again[name].expert_to_group) for name in names)


def test_layers_may_differ_in_experts() -> None:
    frequency = {"a": torch.rand(4), "b": torch.rand(8)}
    made = plan(frequency, {"a": random_similarity(4, 1), "b": random_similarity(8, 2)}, 3)
    assert made["a"].num_experts == 4
    assert made["a"].num_groups + made["b"].num_groups == 6


# -- clustering --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["spectral", "hierarchical"])
def test_plain_blocks_are_found(method: str) -> None:
    frequency = {"a": torch.arange(9.0)}
    made = plan(frequency, {"a": blocks((4, 3, 2))}, 3, method=method)["a"]
    assert parts(made) == {frozenset(range(4)), frozenset(range(4, 7)), frozenset({7, 8})}
    assert made.dominant.tolist() == [3, 6, 8]


@pytest.mark.parametrize("kind", LINKAGES)
def test_hierarchical_agrees_with_scipys_own_cut(kind: str) -> None:
    for seed in range(5):
        similarity = random_similarity(10, seed)
        steps = linkage(squareform(1 - similarity.numpy(), checks=False), method=kind)
        for groups in range(1, 11):
            theirs = fcluster(steps, groups, "maxclust")
            ours = cluster(similarity, groups, kind).numpy()
            assert np.array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_tied_heights_still_give_the_asked_number() -> None:
    tied = torch.full((6, 6), 0.5).fill_diagonal_(1.0)
    for groups in range(1, 7):
        assert len(cluster(tied, groups).unique()) == groups
        made = plan({"a": torch.ones(6)}, {"a": tied}, groups, method="spectral")["a"]
        assert made.num_groups == groups


def test_spectral_is_the_same_every_time_and_bears_negative_and_zero_similarity() -> None:
    similarity = random_similarity(12, 3) - 0.4
    first, second = (plan({"a": torch.ones(12)}, {"a": similarity}, 5, method="spectral")["a"] for _ in range(2))
    assert torch.equal(first.expert_to_group, second.expert_to_group)
    isolated = torch.eye(6)
    assert plan({"a": torch.ones(6)}, {"a": isolated}, 3, method="spectral")["a"].num_groups == 3


# -- defects of the published implementation (by name) -----------------------------------------------------------
def test_defect_uniform_index() -> None:
    # Experts 4 and 5 lead; expert 0, below the number of groups, must be assigned as well.
    frequency = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0, 5.0])}
    similarity = blocks((6,), near=0.2)
    similarity[0, 5] = similarity[5, 0] = 0.9
    made = plan(frequency, {"a": similarity}, 2, budget="uniform")["a"]
    assert made.dominant.tolist() == [4, 5]
    assert made.expert_to_group.tolist() == [1, 0, 0, 0, 0, 1]


def test_defect_uniform_stale() -> None:
    frequency, similarity = random_layers(2, 8, 9)
    fresh = plan(frequency, similarity, 2, budget="uniform")
    plan(frequency, similarity, 6, budget="uniform")
    for layer, grouping in plan(frequency, similarity, 2, budget="uniform").items():
        assert torch.equal(grouping.expert_to_group, fresh[layer].expert_to_group)
        assert set(grouping.expert_to_group.tolist()) == {0, 1}


@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_defect_uniform_reverse(budget: str) -> None:
    # Reversed similarities have a zero diagonal: leaders must not join one another.
    frequency, similarity = random_layers(2, 8, 10)
    reversed_ = {name: 1 - pairs for name, pairs in similarity.items()}
    for grouping in plan(frequency, reversed_, 3, budget=budget).values():
        assert grouping.expert_to_group[grouping.dominant].tolist() == list(range(grouping.num_groups))


@pytest.mark.parametrize("layer", ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"])
def test_defects_decoder_capacity_and_kickout(layer: str) -> None:
    # All experts are closest to expert 7, so that only the capacity spreads them.
    similarity = blocks((8,), near=0.3)
    similarity[7] = similarity[:, 7] = 0.8
    similarity[2, 6] = similarity[6, 2] = 0.7
    similarity[7, 7] = 1.0
    made = plan({layer: torch.arange(1.0, 9.0)}, {layer: similarity}, 3, capacity=3)[layer]
    assert torch.bincount(made.expert_to_group).tolist() == [3, 2, 3]
    # In descending frequency: 4 and 3 fill the group of 7, then 2 goes to 6, its own second choice, then 1, 0 to 5.
    assert made.dominant.tolist() == [5, 6, 7]
    assert made.expert_to_group.tolist() == [0, 0, 1, 2, 2, 0, 1, 2]


@pytest.mark.parametrize("capacity", [None, 8])
def test_defect_encoder_single_group(capacity: int | None) -> None:
    layer = "encoder.block.1.layer.1.mlp"
    made = plan({layer: torch.rand(8)}, {layer: random_similarity(8, 1)}, 1, capacity=capacity)[layer]
    assert made.expert_to_group.tolist() == [0] * 8


def test_defect_encoder_exact_fit() -> None:
    layer = "encoder.block.1.layer.1.mlp"
    made = plan({layer: torch.rand(8)}, {layer: random_similarity(8, 1)}, 2, capacity=4)[layer]
    assert torch.bincount(made.expert_to_group).tolist() == [4, 4]


@pytest.mark.parametrize("method", METHODS)
def test_defect_avg_equals_experts(method: str) -> None:
    frequency, _ = random_layers(2, 8, 3)
    for grouping in plan(frequency, {}, 8, method=method).values():  # and needs no similarity
        assert grouping.expert_to_group.tolist() == list(range(8)) == grouping.dominant.tolist()


def test_defect_ties() -> None:
    frequency = {name: torch.ones(8) for name in "abc"}
    for average in range(1, 9):
        made = plan(frequency, {name: random_similarity(8, 1) for name in "abc"}, average)
        assert sum(grouping.num_groups for grouping in made.values()) == 3 * average


# -- bad input ---------------------------------------------------------------------------------------------------
def _nan(value: float) -> Tensor:
    damaged = random_similarity(8, 0)
    damaged[2, 5] = damaged[5, 2] = value
    return damaged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": 9}, r"average is 9, but layer 'a' has 8 experts; give at most 8"),
        ({"average": 0}, "average is 0; at least 1"),
        ({"average": 2.5}, r"average is 2\.5; give the whole number"),
        (
            {"frequency": {"a": torch.tensor([1.0, torch.nan] + [1.0] * 6)}},
            "layer 'a': the frequency of expert 1 is nan",
        ),
        ({"frequency": {"a": torch.tensor([1.0] * 7 + [-2.0])}}, r"layer 'a': the frequency of expert 7 is -2\.0"),
        ({"frequency": {"a": torch.ones(2, 4)}}, r"layer 'a': the frequency has shape \(2, 4\)"),
        ({"similarity": {"a": random_similarity(6, 0)}}, r"layer 'a': the similarity has shape \(6, 6\)"),
        ({"similarity": {"a": _nan(torch.nan)}}, "layer 'a': the similarity of experts 2 and 5 is nan"),
        ({"similarity": {"a": torch.rand(8, 8)}}, "must be symmetric"),
        ({"similarity": {}}, "layer 'a': no similarity given"),
        ({"capacity": 2}, "layer 'a': capacity is 2, so 3 groups hold at most 6 .* capacity of at least 3"),
        ({"capacity": 0}, "capacity is 0; give a whole number"),
        ({"capacity": 4, "method": "spectral"}, "method 'spectral' has no capacity"),
        ({"excluded": ["z"]}, "excluded layer 'z' is not a layer of this model; it has"),
        ({"method": "nearest"}, "method is 'nearest'; choose one of dominant"),
        ({"budget": "greedy"}, "budget is 'greedy'; choose one of adaptive"),
        ({"linkage": "median"}, "linkage is 'median'; choose one of average"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {
        "frequency": {"a": torch.arange(1.0, 9.0)},
        "similarity": {"a": random_similarity(8, 0)},
        "average": 3,
    }
    values |= changes
    with pytest.raises(ValueError, match=message):
        plan(values.pop("frequency"), values.pop("similarity"), values.pop("average"), **values)


def test_a_table_of_labels_round_trips() -> None:
    frequency, similarity = random_layers(1, 8, 1)
    (made,) = plan(frequency, similarity, 3).values()
    leads = [expert in made.dominant.tolist() for expert in range(8)]
    back = from_labels(made.expert_to_group.tolist(), leads)
    assert torch.equal(back.expert_to_group, made.expert_to_group)
    assert torch.equal(back.dominant, made.dominant)


@pytest.mark.parametrize(
    ("labels", "leads", "message"),
    [
        ([0, 2, 0], [True, True, False], "layer 'a': no expert is in group 1 of 0..2"),
        ([0, 1, 1], [True, False, False], r"group 1 is led by experts \[\]"),
        ([0, 1, 1], [True, True, True], r"group 1 is led by experts \[1, 2\]"),
        ([0, -1], [True, True], "expert 1 is in group -1"),
        ([0, 1], [True], "2 groups and 1 dominant flags"),
    ],
)
def test_a_bad_table_of_labels_is_refused(labels: list[int], leads: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_labels(labels, leads, "a")
