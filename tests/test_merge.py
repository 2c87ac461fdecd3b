"""Averaging, Fisher, Git Re-Basin and REPAIR: closed forms, laws for every layout of experts, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_experts import LAYOUTS, activation, compute, difference, experts, orders, tokens
from torch import Tensor

from mcsmoe.align import align_by_tokens, align_by_weight, apply_permutation
from mcsmoe.grouping.weighting import shares
from mcsmoe.merge import METHODS
from mcsmoe.merge.base import MergeInputs, grouping_members
from mcsmoe.merge.fisher import FisherMean
from mcsmoe.types import ExpertWeights, Grouping

TABLE = torch.tensor([0, 1, 0, 2, 1, 0])
GROUPING = Grouping(TABLE, torch.tensor([2, 1, 3]))  # group 2 is one expert; group 0 is not led by its lowest
FREQUENCY = torch.tensor([0.1, 0.3, 0.25, 0.05, 0.1, 0.2])
AVERAGES = ("frequency", "uniform", "reversed", "random")
DETERMINISTIC = tuple(METHODS)


def inputs(weights: ExpertWeights, **changes: Any) -> MergeInputs:
    values: dict[str, Any] = {
        "layer": "some.layer",
        "weights": weights,
        "grouping": GROUPING,
        "frequency_E": FREQUENCY,
        "fisher": weights.map(lambda _, tensor: tensor.square() + 0.1),
        "tokens": tokens([30, 20, 25, 10, 15, 5]),
        "gates": [torch.ones(count) for count in (30, 20, 25, 10, 15, 5)],
        "activation": activation,
    }
    return MergeInputs(**(values | changes))


def _mean(weights: ExpertWeights, share_E: Tensor) -> ExpertWeights:
    """The definition, in float64 with a dense coefficient matrix."""
    part_GE = torch.zeros(3, 6, dtype=torch.float64)
    part_GE[TABLE, torch.arange(6)] = share_E.double()
    return weights.map(lambda _, tensor: torch.einsum("ge,e...->g...", part_GE, tensor.double()).to(tensor.dtype))


# -- averages --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_are_equation_2(layout: str) -> None:
    weights = experts(layout)
    merged = METHODS["frequency"](inputs(weights))
    by_hand = FREQUENCY.double() / torch.tensor([0.55, 0.4, 0.55, 0.05, 0.4, 0.55], dtype=torch.float64)
    assert torch.allclose(merged.share_E, by_hand, atol=1e-7)
    assert difference(merged.weights, _mean(weights, by_hand)) < 1e-6
    even = torch.tensor([1 / 3, 1 / 2, 1 / 3, 1, 1 / 2, 1 / 3])
    assert difference(METHODS["uniform"](inputs(weights)).weights, _mean(weights, even)) < 1e-6
    reverse = shares(GROUPING, 1 - FREQUENCY)
    assert torch.allclose(reverse[[1, 4]], torch.tensor([0.7 / 1.6, 0.9 / 1.6]).double(), atol=1e-7)
    assert difference(METHODS["reversed"](inputs(weights)).weights, _mean(weights, reverse)) < 1e-6


def test_random_weights_depend_on_seed_and_layer_and_nothing_else() -> None:
    weights = experts()
    first = METHODS["random"](inputs(weights, seed=3))
    torch.rand(5)
    again = METHODS["random"](inputs(weights, seed=3))
    assert torch.equal(first.share_E, again.share_E)
    assert difference(first.weights, _mean(weights, first.share_E)) < 1e-6
    for change in ({"seed": 4}, {"seed": 3, "layer": "other.layer"}):
        assert not torch.equal(METHODS["random"](inputs(weights, **change)).share_E, first.share_E)


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("layout", ["plain", "gated-biased"])
def test_every_method_gives_complete_groups_and_leaves_single_experts_alone(method: str, layout: str) -> None:
    weights = experts(layout)
    before = weights.map(lambda _, tensor: tensor.clone())
    merged = METHODS[method](inputs(weights))
    assert merged.weights.num_experts == 3
    assert merged.weights.roles == weights.roles
    assert difference(weights, before) == 0.0
    merged.grouping.validate("x")
    total_G = torch.zeros(3, dtype=torch.float64).index_add_(0, merged.expert_to_group, merged.share_E)
    assert torch.allclose(total_G, torch.ones(3, dtype=torch.float64))
    if method != "reap":  # which chooses its own
        alone = merged.weights.select(torch.tensor([2]))
        assert difference(alone, weights.select(torch.tensor([3]))) == 0.0
        assert torch.equal(merged.expert_to_group, TABLE)
    identity = Grouping(torch.arange(6), torch.arange(6))
    assert difference(METHODS[method](inputs(weights, grouping=identity)).weights, weights) == 0.0


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_identical_experts_gives_that_expert(method: str, layout: str) -> None:
    one = experts(layout, count=1)
    weights = one.select(torch.zeros(6, dtype=torch.int64))
    fisher = weights.map(lambda _, tensor: tensor.abs() + 0.1)
    merged = METHODS[method](inputs(weights, fisher=fisher))
    (inputs_TD,) = tokens([20], seed=5)
    for group in range(3):
        found, expected = compute(merged.weights, group, inputs_TD), compute(one, 0, inputs_TD)
        assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    weights = experts().map(lambda _, tensor: tensor.to(dtype))
    merged = METHODS["frequency"](inputs(weights))
    exact = METHODS["frequency"](inputs(weights.map(lambda _, tensor: tensor.float())))
    for name, tensor in merged.weights.tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact.weights.tensors[name].to(dtype))


# -- regression: groups without use ----------------------------------------------------------------------------------
def test_a_group_that_was_never_routed_is_averaged_evenly_not_zeroed() -> None:
    unused = torch.tensor([0.0, 0.6, 0.0, 0.0, 0.4, 0.0])
    weights = experts()
    merged = METHODS["frequency"](inputs(weights, frequency_E=unused))
    assert torch.allclose(merged.share_E[[0, 2, 5]], torch.full((3,), 1 / 3, dtype=torch.float64))
    even = METHODS["uniform"](inputs(weights)).weights
    assert difference(merged.weights.select(torch.tensor([0])), even.select(torch.tensor([0]))) < 1e-6
    alone = merged.weights.select(torch.tensor([2]))  # a single expert without use
    assert difference(alone, weights.select(torch.tensor([3]))) == 0.0


# -- Fisher ----------------------------------------------------------------------------------------------------------
def test_fisher_is_the_element_by_element_quotient() -> None:
    weights, fisher = experts("gated-biased"), experts("gated-biased", seed=4).map(lambda _, t: t.square())
    merged = METHODS["fisher"](inputs(weights, fisher=fisher))
    for group, members in enumerate(grouping_members(GROUPING)):
        for name, tensor in weights.tensors.items():
            importance = fisher.tensors[name][members].double()
            expected = (importance * tensor[members].double()).sum(0) / importance.sum(0)
            assert (merged.weights.tensors[name][group] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-30, 1e30])
def test_only_ratios_of_fisher_information_matter(scale: float) -> None:
    weights = experts()
    fisher = experts(seed=4).map(lambda _, tensor: tensor.square())
    expected = METHODS["fisher"](inputs(weights, fisher=fisher)).weights
    scaled = fisher.map(lambda _, tensor: tensor * scale)
    assert difference(METHODS["fisher"](inputs(weights, fisher=scaled)).weights, expected) < 1e-5


def test_elements_without_fisher_information_are_the_plain_mean() -> None:
    weights = experts()
    fisher = weights.map(lambda _, tensor: torch.ones_like(tensor))
    fisher.tensors["wi"][:, 0, 0] = 0.0
    fisher.tensors["wo"][[0, 2]] = 0.0
    merged = METHODS["fisher"](inputs(weights, fisher=fisher)).weights
    even = METHODS["uniform"](inputs(weights)).weights
    assert difference(merged.select(torch.tensor([1, 2])), even.select(torch.tensor([1, 2]))) < 1e-6
    assert torch.allclose(merged.tensors["wi"][0], even.tensors["wi"][0])
    assert torch.allclose(merged.tensors["wo"][0], weights.tensors["wo"][5])


def test_fisher_information_is_permuted_with_its_weights() -> None:
    weights, fisher = experts("biased"), experts("biased", seed=4).map(lambda _, tensor: tensor.square())
    one_F = orders(1, 12)
    same_EF, merged = one_F.repeat(6, 1), METHODS["fisher"](inputs(weights, fisher=fisher)).weights
    moved, moved_fisher = apply_permutation(weights, same_EF), apply_permutation(fisher, same_EF)
    both = METHODS["fisher"](inputs(moved, fisher=moved_fisher)).weights
    assert difference(both, apply_permutation(merged, one_F.repeat(3, 1))) < 1e-6
    # Left behind, it weighs the wrong neurons.
    assert difference(METHODS["fisher"](inputs(moved, fisher=fisher)).weights, both) > 0.1


def test_fisher_merging_follows_the_alignment_it_is_given() -> None:
    """fisher_strategy: alignment by activations and by weights are two things, for Fisher merging, too."""
    weights, fisher = experts("gated"), experts("gated", seed=4).map(lambda _, tensor: tensor.square())
    reference_E, routed = GROUPING.dominant[TABLE], tokens([30] * 6)
    orders_by = {
        "weight": align_by_weight(weights, reference_E).permutation_EF,
        "activation": align_by_tokens(weights, routed, activation, reference_E).permutation_EF,
    }
    merged = {
        how: METHODS["fisher"](
            inputs(apply_permutation(weights, order_EF), fisher=apply_permutation(fisher, order_EF))
        ).weights
        for how, order_EF in orders_by.items()
    }
    assert difference(merged["weight"], merged["activation"]) > 0.1


def test_fisher_information_is_the_mean_of_squared_gradients() -> None:
    first, second = experts(seed=1), experts(seed=2)
    found = FisherMean()
    found.update(first)
    found.update(second, weight=0.25)
    found.update(first, weight=0.75, examples=0.0)
    expected = first.map(lambda name, tensor: (1.75 * tensor.square() + 0.25 * second.tensors[name].square()) / 2)
    assert difference(found.result(), expected) < 1e-5
    with pytest.raises(ValueError, match="empty"):
        FisherMean().result()


# -- Git Re-Basin and REPAIR -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["git-rebasin", "repair"])
def test_permuted_copies_of_one_expert_merge_into_it_in_the_order_of_the_dominant_one(method: str, layout: str) -> None:
    one = experts(layout, count=1)
    copies = apply_permutation(one.select(torch.zeros(6, dtype=torch.int64)), orders(6, 12))
    merged = METHODS[method](inputs(copies, workers=2)).weights
    assert difference(merged, copies.select(GROUPING.dominant)) < 1e-5
    # Without alignment the copies cancel one another.
    assert difference(METHODS["uniform"](inputs(copies)).weights, copies.select(GROUPING.dominant)) > 0.5


@pytest.mark.parametrize("method", ["git-rebasin", "repair", "zipit", "zipit-frequency", "zipit-weight"])
def test_the_order_of_neurons_in_experts_other_than_the_leader_does_not_matter(method: str) -> None:
    weights = experts("gated", width=6)
    order_EF = orders(6, 6)
    order_EF[GROUPING.dominant] = torch.arange(6)
    (inputs_TD,) = tokens([20], seed=5)
    first = METHODS[method](inputs(weights)).weights
    second = METHODS[method](inputs(apply_permutation(weights, order_EF))).weights
    for group in range(3):
        found, expected = compute(second, group, inputs_TD), compute(first, group, inputs_TD)
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repair_restores_the_statistics_of_pre_activations(layout: str) -> None:
    weights = experts(layout, width=8)
    given = inputs(weights)
    routed = given.tokens
    assert routed is not None
    repaired, collapsed = METHODS["repair"](given).weights, METHODS["git-rebasin"](given).weights
    shrunk = 0
    for group, members in enumerate(grouping_members(GROUPING)):
        inputs_TD = torch.cat([routed[expert] for expert in members.tolist()])
        # Means over a group do not depend on the order of neurons; the sum over neurons does not, either.
        for name in weights.preactivations(0, inputs_TD):
            each = [weights.preactivations(expert, inputs_TD)[name] for expert in members.tolist()]
            wanted_std = sum(one.std(dim=0).sum() for one in each) / len(each)
            wanted_mean = sum(one.mean(dim=0).sum() for one in each) / len(each)
            found = repaired.preactivations(group, inputs_TD)[name]
            assert float(found.std(dim=0).sum()) == pytest.approx(float(wanted_std), rel=1e-4)
            if "biased" in layout:
                assert float(found.mean(dim=0).sum()) == pytest.approx(float(wanted_mean), abs=1e-3)
            shrunk += int(collapsed.preactivations(group, inputs_TD)[name].std(dim=0).sum() < 0.9 * wanted_std)
    assert shrunk >= 2


def test_repair_of_each_neuron_by_hand() -> None:
    from mcsmoe.merge.repair import rescaled

    weights, routed = experts("biased"), tokens([9, 8, 7, 6, 5, 4])
    share_E = shares(GROUPING, FREQUENCY)
    merged = METHODS["frequency"](inputs(weights)).weights
    found = rescaled(merged, weights, torch.arange(12).repeat(6, 1), GROUPING, share_E, routed)
    inputs_TD = torch.cat([routed[1], routed[4]])
    first, second = (weights.preactivations(expert, inputs_TD)["wi"] for expert in (1, 4))
    after = found.preactivations(1, inputs_TD)["wi"]
    assert torch.allclose(after.std(dim=0), 0.75 * first.std(dim=0) + 0.25 * second.std(dim=0), atol=1e-5)
    assert torch.allclose(after.mean(dim=0), 0.75 * first.mean(dim=0) + 0.25 * second.mean(dim=0), atol=1e-5)
    assert torch.equal(found.tensors["wo"], merged.tensors["wo"])


def test_repair_of_a_group_without_tokens_is_git_rebasin() -> None:
    weights = experts("gated")
    silent = tokens([30, 0, 25, 10, 1, 5])
    merged = METHODS["repair"](inputs(weights, tokens=silent)).weights
    plain = METHODS["git-rebasin"](inputs(weights)).weights
    second = torch.tensor([1])
    assert difference(merged.select(second), plain.select(second)) == 0.0
    assert difference(merged, plain) > 0.01


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize(
    ("table", "dominant", "message"),
    [
        ([0, 1, 0, 2, 1], [2, 1, 3], "5 experts, the layer has 6"),
        ([0, 1, 0, -1, 1, 0], [2, 1, 3], "expert 3 is in group -1"),
        ([0, 1, 0, 2, 1, 3], [2, 1, 3], "expert 5 is in group 3"),
        ([0, 1, 0, 2, 1, 0], [2, 1, 1], "group 2 is led by expert 1"),
    ],
)
def test_incomplete_groupings_are_refused(method: str, table: list[int], dominant: list[int], message: str) -> None:
    grouping = Grouping(torch.tensor(table), torch.tensor(dominant))
    with pytest.raises(ValueError, match=rf"'some\.layer'.*{message}"):
        METHODS[method](inputs(experts(), grouping=grouping))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"prune", "drop", "reap"}))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_whatever_their_share(method: str, value: float) -> None:
    weights = experts("gated-biased")
    weights.tensors["up_bias"][4, 0] = value
    unused = torch.tensor([0.1, 0.9, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"'some\.layer'.*'up_bias' of expert 4"):
        METHODS[method](inputs(weights, frequency_E=unused, fisher=experts("gated-biased").map(lambda _, t: t.abs())))


def test_pruning_refuses_non_finite_weights_it_keeps() -> None:
    weights = experts()
    weights.tensors["wo"][2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'some\.layer'.*'wo' of expert 2"):
        METHODS["prune"](inputs(weights))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frequency_E": torch.ones(5)}, r"frequency has shape \(5,\)"),
        ({"frequency_E": torch.tensor([0.5, 0.5, 0, 0, float("nan"), 0])}, "frequency of expert 4 is nan"),
        ({"frequency_E": torch.tensor([0.5, 0.6, 0, -0.1, 0, 0])}, "frequency of expert 3 is -0.1"),
        ({"saliency_E": torch.tensor([0, 0, 0, 0, 0, float("inf")])}, "saliency of expert 5 is inf"),
        ({"tokens": tokens([3] * 5)}, "tokens are of 5 experts, the layer has 6"),
        ({"tokens": tokens([3] * 6, d_model=4)}, "tokens of expert 0 have shape .*width 5"),
        ({"gates": [torch.ones(3)] * 5}, "combine weights are of 5 experts"),
        ({"fisher": experts(width=8)}, "Fisher information of 'wi' has shape"),
        ({"fisher": experts("gated")}, "Fisher information is of"),
    ],
)
def test_statistics_of_another_model_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"'some\.layer'.*{message}"):
        METHODS["fisher"](inputs(experts(), **changes))


def test_statistics_object_of_another_model_is_refused() -> None:
    from mcsmoe.statistics.routing import RoutingStatistics
    from mcsmoe.types import RoutedBatch

    collected = RoutingStatistics()
    one = torch.zeros(4, 1, dtype=torch.int64)
    batch = RoutedBatch(
        torch.randn(4, 9), torch.randn(4, 6), one, one, torch.ones(4, 1), torch.ones(4, dtype=torch.bool)
    )
    collected.update({"some.layer": batch})
    with pytest.raises(ValueError, match=r"'some\.layer'.*9 input features, the layer has 5"):
        METHODS["frequency"](inputs(experts(), statistics=collected.layers["some.layer"]))


def test_bad_fisher_information_is_refused() -> None:
    for value, shown in ((-1e-3, "-0.001"), (float("nan"), "nan"), (float("inf"), "inf")):
        fisher = experts().map(lambda _, tensor: tensor.square())
        fisher.tensors["wo"][3, 1, 2] = value
        with pytest.raises(ValueError, match=rf"'some\.layer'.*'wo' of expert 3 contains {shown}"):
            METHODS["fisher"](inputs(experts(), fisher=fisher))


@pytest.mark.parametrize(
    ("method", "missing"),
    [("fisher", "fisher"), ("repair", "tokens"), ("zipit", "activation"), ("reap", "tokens"), ("reap", "gates")],
)
def test_what_a_method_needs_is_named(method: str, missing: str) -> None:
    with pytest.raises(ValueError, match=r"'some\.layer'.*needs"):
        METHODS[method](inputs(experts(), **{missing: None}))
