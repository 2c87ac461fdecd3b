"""Every similarity base against one computation per pair, and the laws all of them keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from similarity_cases import (
    EXPERTS,
    HIDDEN,
    TOKEN_BASES,
    UNUSED,
    WIDTH,
    batch,
    correlations,
    everything,
    own,
    run,
    stacked,
    statistics_of,
)
from torch import Tensor

from mcsmoe.methods import SIMILARITIES
from mcsmoe.similarity import BASES, similarity
from mcsmoe.similarity import tokens as token_bases
from mcsmoe.similarity.base import SimilarityInputs
from mcsmoe.types import ExpertWeights, RoutedBatch, RouterWeights


def plain_cosine(left: Tensor, right: Tensor) -> float:
    left, right = left.flatten().double(), right.flatten().double()
    norms = float(left.norm() * right.norm())
    return (1 + (float(left @ right) / norms if norms > 0 else 0.0)) / 2


# -- one expert, one pair at a time --------------------------------------------------------------------------------
def average_error(weights: ExpertWeights, routed: RoutedBatch, i: int, j: int) -> float:
    average = weights.map(lambda _, tensor: ((tensor[i] + tensor[j]) / 2)[None])
    return sum(
        float((run(average, 0, own(routed, e)) - run(weights, e, own(routed, e))).square().sum()) for e in (i, j)
    )


def slow_mse(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    counts = [len(own(routed, e)) for e in range(EXPERTS)]
    outputs = sum(float(run(given.weights, e, own(routed, e)).square().sum()) for e in range(EXPERTS))
    mean = average_error(given.weights, routed, i, j) / (counts[i] + counts[j])
    return 1 / (1 + mean / (outputs / sum(counts)))


def slow_lsa(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    found = correlations(given.weights, routed, i, j).numpy()
    return float((1 + found[linear_sum_assignment(found, maximize=True)]).mean() / 2)


def slow_max(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    found = correlations(given.weights, routed, i, j)
    return float(((1 + found.max(dim=0).values).mean() + (1 + found.max(dim=1).values).mean()) / 4)


def slow_output(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    shared = torch.cat([own(routed, e) for e in range(EXPERTS)])
    return plain_cosine(run(given.weights, i, shared).mean(dim=0), run(given.weights, j, shared).mean(dim=0))


def slow_distance(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    shared = torch.cat([own(routed, e) for e in range(EXPERTS)])
    means = [run(given.weights, e, shared).mean(dim=0) for e in range(EXPERTS)]
    largest = max(float((one - other).norm()) for one in means for other in means)
    return 1 - float((means[i] - means[j]).norm()) / largest


def vectors(given: SimilarityInputs, routed: RoutedBatch) -> dict[str, Callable[[int], Tensor]]:
    weights, gradients, router = given.weights, given.gradients, given.router
    assert weights is not None
    assert gradients is not None
    assert router is not None

    def mean(values: Tensor) -> Tensor:
        return values.mean(dim=0) if len(values) else torch.zeros(WIDTH)

    return {
        "router-logits": lambda e: routed.logits_TE[:, e],
        "router-weight": lambda e: router.weight_ED[e],
        "router-weight-feature": lambda e: router.weight_ED[e] * routed.inputs_TD.norm(dim=0),
        "weight": lambda e: torch.cat([tensor[e].flatten() for tensor in weights.tensors.values()]),
        "feature": lambda e: mean(own(routed, e)),
        "feature.abs": lambda e: mean(own(routed, e).abs()),
        "weight-feature": lambda e: torch.cat(
            [weights.tensors[name][e] * own(routed, e).norm(dim=0) for name in ("gate", "up")]
        ),
        "gradient": lambda e: torch.cat([tensor[e].flatten() for tensor in gradients.tensors.values()]),
        "weight-gradient": lambda e: torch.cat(
            [(gradients.tensors[name][e] * tensor[e]).flatten() for name, tensor in weights.tensors.items()]
        ),
    }


@pytest.mark.parametrize("base", [name for name in BASES if name not in ("random", *TOKEN_BASES)])
@pytest.mark.parametrize("choices", [1, 2])
def test_cosine_bases_equal_one_cosine_per_pair(base: str, choices: int) -> None:
    routed = batch(choices=choices)
    given = everything(routed)
    vector, found = vectors(given, routed)[base], similarity(base, given)
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            expected = 1.0 if i == j else plain_cosine(vector(i), vector(j))
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-7), (i, j)


@pytest.mark.parametrize(
    ("base", "slow"),
    [
        ("mse", slow_mse),
        ("feature-correlation.lsa", slow_lsa),
        ("feature-correlation.max", slow_max),
        ("expert-output", slow_output),
        ("expert-output.distance", slow_distance),
    ],
)
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("block", [1, 2**26])
def test_token_bases_equal_one_computation_per_pair(
    base: str, slow: Callable[..., float], choices: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_bases, "_BLOCK_BYTES", block)
    routed = batch(choices=choices)
    given = everything(routed)
    found = similarity(base, given)
    for i in range(EXPERTS):
        for j in range(i + 1, EXPERTS):
            assert float(found[i, j]) == pytest.approx(slow(given, routed, i, j), abs=2e-6), (i, j)


# -- laws ----------------------------------------------------------------------------------------------------------
def test_names_are_those_of_the_configuration() -> None:
    assert set(BASES) == set(SIMILARITIES)
    assert all(base.__doc__ for base in BASES.values())
    assert frozenset().union(*(base.needs for base in SIMILARITIES.values())) == {
        *("statistics", "weights", "router", "gradients", "tokens"),
    }


def situations() -> dict[str, SimilarityInputs]:
    nothing = batch(tokens=9)
    nothing = RoutedBatch(**{**vars(nothing), "valid_T": torch.zeros(9, dtype=torch.bool)})
    one = batch(tokens=1, choices=1)
    zero = stacked(0).map(lambda _, tensor: torch.zeros_like(tensor))
    same = stacked(3, experts=1).map(lambda _, tensor: tensor.expand(EXPERTS, *tensor.shape[1:]).clone())
    constant = batch()
    constant = RoutedBatch(
        **{**vars(constant), "inputs_TD": torch.ones(160, WIDTH), "logits_TE": torch.zeros(160, EXPERTS)}
    )
    return {
        "ordinary": everything(),
        "nothing routed": everything(nothing),
        "one token": everything(one),
        "all zero": everything(weights=zero, gradients=zero, router=RouterWeights(torch.zeros(EXPERTS, WIDTH))),
        "identical experts": everything(weights=same, gradients=same),
        "constant inputs": everything(constant),
        "tiny numbers": everything(weights=stacked(1, scale=1e-30), gradients=stacked(2, scale=1e-30)),
        "bfloat16": everything(weights=stacked(1).map(lambda _, tensor: tensor.bfloat16())),
    }


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("situation", list(situations()))
def test_symmetric_in_0_1_with_a_diagonal_of_1_whatever_is_given(base: str, situation: str) -> None:
    found = similarity(base, situations()[situation])
    assert found.dtype == torch.float64
    assert found.shape == (EXPERTS, EXPERTS)
    assert torch.isfinite(found).all()
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(EXPERTS, dtype=torch.float64))
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("base", list(BASES))
def test_one_expert(base: str) -> None:
    routed = batch(tokens=20, choices=1, experts=2)
    alone = RoutedBatch(**{**vars(routed), "logits_TE": routed.logits_TE[:, :1]})
    given = everything(
        alone,
        weights=stacked(0, experts=1),
        gradients=stacked(1, experts=1),
        router=RouterWeights(torch.ones(1, WIDTH)),
    )
    assert torch.equal(similarity(base, given), torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("base", ["feature", "feature.abs", "weight-feature"])
def test_an_expert_that_was_never_used_is_neutral(base: str) -> None:
    found = similarity(base, everything())
    assert torch.equal(found[UNUSED, :UNUSED], torch.full((UNUSED,), 0.5, dtype=torch.float64))
    assert float((found[:UNUSED, :UNUSED] - 0.5).abs().max()) > 0.01


@pytest.mark.parametrize("base", [name for name in BASES if name != "random"])
def test_order_of_tokens_and_batches_changes_nothing(base: str) -> None:
    routed = batch()
    order = torch.randperm(160, generator=torch.Generator().manual_seed(4))
    parts = [
        RoutedBatch(**{name: tensor[part] for name, tensor in vars(routed).items() if tensor is not None})
        for part in order.split(37)
    ]
    given = everything(routed)
    shuffled = everything(statistics=statistics_of(*parts))
    torch.testing.assert_close(similarity(base, shuffled), similarity(base, given), rtol=0, atol=2e-6)


@pytest.mark.parametrize("base", [name for name in BASES if name != "random"])
def test_order_of_experts_only_reorders(base: str) -> None:
    routed, order_E = batch(), torch.tensor([3, 0, 5, 1, 4, 2])
    rank_E = order_E.argsort()
    moved = RoutedBatch(
        *(routed.inputs_TD, routed.logits_TE[:, order_E], rank_E[routed.wanted_TK], rank_E[routed.chosen_TK]),
        *(routed.weights_TK, routed.valid_T),
    )
    given = everything(routed)
    assert given.weights is not None
    assert given.gradients is not None
    assert given.router is not None
    other = everything(
        moved,
        weights=given.weights.select(order_E),
        gradients=given.gradients.select(order_E),
        router=RouterWeights(given.router.weight_ED[order_E]),
    )
    expected = similarity(base, given)[order_E][:, order_E]
    torch.testing.assert_close(similarity(base, other), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "base", ["feature-correlation.lsa", "feature-correlation.max", "expert-output", "expert-output.distance"]
)
def test_order_of_neurons_changes_nothing(base: str) -> None:
    given = everything()
    assert given.weights is not None
    generator = torch.Generator().manual_seed(8)
    orders = [torch.randperm(HIDDEN, generator=generator) for _ in range(EXPERTS)]

    def permuted(name: str, tensor: Tensor) -> Tensor:
        axis = ExpertWeights.neuron_axis(given.weights, name)  # type: ignore[arg-type]
        if axis is None:
            return tensor
        return torch.stack([one.index_select(axis - 1, order) for one, order in zip(tensor, orders, strict=True)])

    other = everything(weights=given.weights.map(permuted))
    torch.testing.assert_close(similarity(base, other), similarity(base, given), rtol=0, atol=2e-6)
    assert (similarity("weight", other) - similarity("weight", given)).abs().max() > 0.01


def test_random_depends_on_seed_and_layer_alone() -> None:
    given = [everything(seed=3), everything(statistics=None), everything(layer="layer.1")]
    first, again, elsewhere = (similarity("random", one) for one in given)
    assert torch.equal(first, again)
    assert not torch.equal(first, elsewhere)
    values = similarity("random", SimilarityInputs(router=RouterWeights(torch.zeros(200, 1)), seed=9))
    above = values[tuple(torch.triu_indices(200, 200, 1))]
    assert above.unique().shape[0] == 200 * 199 // 2
    # The mean of 19900 uniform numbers has a standard deviation of 0.002.
    assert float(above.mean()) == pytest.approx(0.5, abs=0.011)


def test_closed_forms_of_the_router_logits() -> None:
    base_T = torch.randn(50, generator=torch.Generator().manual_seed(0))
    logits_TE = torch.stack([base_T, 2 * base_T, -base_T, torch.zeros(50), base_T.abs(), base_T + 1], dim=1)
    found = similarity("router-logits", everything(RoutedBatch(**{**vars(batch(50)), "logits_TE": logits_TE})))
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-12)
    assert float(found[0, 2]) == pytest.approx(0, abs=1e-12)
    assert float(found[0, 3]) == 0.5
