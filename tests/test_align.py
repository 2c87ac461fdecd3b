"""Alignment: the optimum, its laws for every layout of experts, determinism, and bad input."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from tiny_experts import LAYOUTS, activation, compute, difference, experts, orders, tokens
from torch import Tensor

from mcsmoe.align import (
    activation_correlation,
    align_by_activation,
    align_by_tokens,
    align_by_weight,
    apply_permutation,
    correlation,
    permute_,
)
from mcsmoe.types import ExpertWeights

FIRST = torch.zeros(6, dtype=torch.int64)


def _copies(layout: str, noise: float = 0.0) -> tuple[ExpertWeights, Tensor]:
    """Six experts that are expert 0 in other orders (which are returned), each with some noise."""
    one = experts(layout, count=1).select(FIRST)
    order_EF = orders(6, 12)
    order_EF[0] = torch.arange(12)
    noisy = experts(layout, seed=9)
    moved = apply_permutation(one, order_EF)
    return moved.map(
        lambda name, tensor: (
            tensor + noise * noisy.tensors[name] * (torch.arange(6) != FIRST).view(-1, *[1] * (tensor.ndim - 1))
        )
    ), order_EF


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("include_output", [True, False])
def test_a_permuted_copy_is_put_back(layout: str, include_output: bool) -> None:
    weights, order_EF = _copies(layout)
    found = align_by_weight(weights, FIRST, include_output)
    assert torch.equal(found.permutation_EF, order_EF.argsort(dim=1))
    aligned = apply_permutation(weights, found.permutation_EF)
    assert difference(aligned, weights.select(FIRST)) == 0.0
    assert (found.gain_E[1:] > 0).all()
    assert float(found.gain_E[0]) == 0.0
    assert torch.equal(found.reference_E, FIRST)


def test_noise_does_not_mislead_and_aligning_again_changes_nothing() -> None:
    weights, order_EF = _copies("gated-biased", noise=0.05)
    found = align_by_weight(weights, FIRST, workers=2)
    assert torch.equal(found.permutation_EF, order_EF.argsort(dim=1))
    again = align_by_weight(apply_permutation(weights, found.permutation_EF), FIRST)
    assert torch.equal(again.permutation_EF, torch.arange(12).repeat(6, 1))
    assert (again.gain_E == 0).all()


@pytest.mark.parametrize("include_output", [True, False])
def test_the_permutation_is_the_best_of_all(include_output: bool) -> None:
    weights = experts("biased", count=3, width=5)
    found = align_by_weight(weights, torch.zeros(3, dtype=torch.int64), include_output)
    names = ["wi", "wi_bias", *(["wo"] if include_output else [])]

    def neurons(expert: int) -> Tensor:
        parts = {"wi": weights.tensors["wi"][expert], "wi_bias": weights.tensors["wi_bias"][expert, :, None]}
        parts["wo"] = weights.tensors["wo"][expert].t()
        return torch.cat([parts[name] for name in names], dim=1).double()

    for expert in (1, 2):
        value = {p: float((neurons(0) * neurons(expert)[list(p)]).sum()) for p in permutations(range(5))}
        best = max(value, key=lambda p: value[p])
        assert tuple(found.permutation_EF[expert].tolist()) == best
        gain = (value[best] - value[tuple(range(5))]) / float(neurons(0).square().sum())
        assert float(found.gain_E[expert]) == pytest.approx(gain, rel=1e-6)


def test_the_output_projection_counts_only_when_asked() -> None:
    one = experts(count=1, width=4)
    tensors = {name: tensor.repeat(2, 1, 1) for name, tensor in one.tensors.items()}
    tensors["wo"][1] = 100 * tensors["wo"][0][:, [1, 0, 3, 2]]
    weights = ExpertWeights(tensors, one.roles)
    both = torch.zeros(2, dtype=torch.int64)
    assert align_by_weight(weights, both, include_output=False).permutation_EF[1].tolist() == [0, 1, 2, 3]
    assert align_by_weight(weights, both, include_output=True).permutation_EF[1].tolist() == [1, 0, 3, 2]


def test_several_references_are_each_matched_by_their_own_experts() -> None:
    weights, references = experts("gated"), torch.tensor([3, 1, 1, 3, 3, 1])
    found = align_by_weight(weights, references, workers=2)
    for reference in (1, 3):
        members = (references == reference).nonzero()[:, 0]
        alone = align_by_weight(weights.select(members), (members == reference).nonzero()[0].repeat(len(members)))
        assert torch.equal(found.permutation_EF[members], alone.permutation_EF)
        assert torch.allclose(found.gain_E[members], alone.gain_E)


@pytest.mark.parametrize("block_bytes", [1, 4 * 12 * 12 * 2, 2**30])
def test_workers_and_blocks_do_not_matter(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = align_by_weight(experts(), FIRST)
    monkeypatch.setattr("mcsmoe.align._BLOCK_BYTES", block_bytes)
    for workers in (1, 3):
        found = align_by_weight(experts(), FIRST, workers=workers)
        assert torch.equal(found.permutation_EF, expected.permutation_EF)
        assert torch.equal(found.gain_E, expected.gain_E)


def test_half_precision_is_matched_in_single() -> None:
    half = experts().map(lambda _, tensor: tensor.bfloat16())
    single = half.map(lambda _, tensor: tensor.float())
    assert torch.equal(align_by_weight(half, FIRST).permutation_EF, align_by_weight(single, FIRST).permutation_EF)


def test_identical_or_zero_experts_keep_their_order() -> None:
    same = experts(count=1).select(FIRST)
    zero = same.map(lambda _, tensor: torch.zeros_like(tensor))
    for weights in (same, zero):
        found = align_by_weight(weights, FIRST)
        assert torch.equal(found.permutation_EF, torch.arange(12).repeat(6, 1))
        assert (found.gain_E == 0).all()


# -- by activation ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_put_a_permuted_copy_back(layout: str) -> None:
    weights, order_EF = _copies(layout)
    routed = tokens([40] * 6)
    found = align_by_tokens(weights, routed, activation, FIRST, workers=2)
    assert torch.equal(found.permutation_EF, order_EF.argsort(dim=1))
    again = align_by_activation(activation_correlation(weights, routed, activation, FIRST), FIRST)
    assert torch.equal(again.permutation_EF, found.permutation_EF)
    assert torch.equal(again.gain_E, found.gain_E)


def test_correlations_are_those_of_numpy_over_the_tokens_of_the_pair_or_the_pool() -> None:
    weights, routed = experts("gated-biased"), tokens([7, 3, 0, 9, 4, 5])
    pool_E = torch.tensor([0, 0, 1, 0, 1, 1])
    for pool, members in ((None, (0, 3)), (pool_E, (0, 1, 3))):
        found_EFF = activation_correlation(weights, routed, activation, FIRST, pool)
        inputs_TD = torch.cat([routed[member] for member in members])

        both = torch.cat([weights.hidden(e, inputs_TD, activation) for e in (0, 3)], dim=1)
        expected = np.corrcoef(both.double().numpy(), rowvar=False)[:12, 12:]
        assert np.abs(found_EFF[3].numpy() - expected).max() < 1e-5


def test_silent_neurons_correlate_with_nothing_and_too_few_tokens_keep_the_order() -> None:
    constant = torch.full((5, 1), 0.1)
    varying = torch.arange(5.0)[:, None]
    first, second = torch.cat([varying, constant], dim=1), torch.cat([2 * varying + 1, -varying], dim=1)
    assert torch.allclose(correlation(first, second), torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    found = align_by_tokens(experts(), tokens([1, 0, 0, 1, 0, 0]), activation, FIRST)
    assert torch.equal(found.permutation_EF[[1, 2]], torch.arange(12).repeat(2, 1))
    assert float(found.gain_E[1]) == 0.0


# -- permuting -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_permuting_neurons_changes_no_output(layout: str) -> None:
    weights, order_EF = experts(layout), orders(6, 12)
    moved = apply_permutation(weights, order_EF)
    (inputs_TD,) = tokens([20])
    first = "gate" if "gated" in layout else "wi"
    for expert in range(6):
        assert torch.equal(moved.tensors[first][expert], weights.tensors[first][expert][order_EF[expert]])
        before, after = compute(weights, expert, inputs_TD), compute(moved, expert, inputs_TD)
        assert (after - before).abs().max() < 2e-6 * before.abs().max()
    assert difference(apply_permutation(moved, order_EF.argsort(dim=1)), weights) == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [([0, 1, 2, 2], "neuron 2 2 times"), ([0, 1, 2, 4], "neuron 4"), ([-1, 1, 2, 3], "neuron -1")],
)
def test_what_is_no_permutation_names_layer_expert_and_value(row: list[int], message: str) -> None:
    order_EF = torch.arange(4).repeat(3, 1)
    order_EF[2] = torch.tensor(row)
    with pytest.raises(ValueError, match=rf"'some\.layer'.*expert 2 .*{message}"):
        apply_permutation(experts(count=3, width=4), order_EF, "some.layer")


def test_permutations_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'x'.*\(6, 4\).*\(6, 12\)"):
        apply_permutation(experts(), torch.arange(4).repeat(6, 1), "x")
    with pytest.raises(ValueError, match="permutations have shape"):
        permute_(experts(), torch.arange(4).repeat(6, 1), "x")


@pytest.mark.parametrize("block", [1, 3000, 2**24])
def test_in_place_is_the_same_in_the_memory_that_there_is(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsmoe.align._BLOCK_BYTES", block)
    weights = experts()
    # A view whose last two axes are stored the other way round, as some families have them.
    stored = {name: tensor.mT.contiguous() if tensor.ndim == 3 else tensor for name, tensor in weights.tensors.items()}
    views = ExpertWeights(
        {name: tensor.mT if tensor.ndim == 3 else tensor for name, tensor in stored.items()}, weights.roles
    )
    order_EF = torch.stack([torch.randperm(weights.width) for _ in range(weights.num_experts)])
    wanted = apply_permutation(weights, order_EF)
    permute_(views, order_EF)
    for name, tensor in stored.items():
        given = tensor.mT if tensor.ndim == 3 else tensor
        assert torch.equal(given, wanted.tensors[name])
        assert given.data_ptr() == views.tensors[name].data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_and_correlations_are_refused(value: float) -> None:
    weights = experts()
    weights.tensors["wo"][4, 0, 0] = value
    with pytest.raises(ValueError, match=r"'a\.b'.*'wo' of expert 4"):
        align_by_weight(weights, FIRST, layer="a.b")
    with pytest.raises(ValueError, match=r"'a\.b'.*'wo' of expert 4"):
        align_by_tokens(weights, tokens([3] * 6), activation, FIRST, layer="a.b")
    correlation_EFF = torch.zeros(6, 3, 3)
    correlation_EFF[5, 0, 1] = value
    with pytest.raises(ValueError, match=r"'a\.b'.*expert 5"):
        align_by_activation(correlation_EFF, FIRST, layer="a.b")


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([0, 0, 0], "shape"),
        ([0, 0, 0, 0, 0, 6], "expert 5 refers to expert 6"),
        ([0, 0, 1, 0, 0, 0], "expert 2 refers to expert 1, which refers on to expert 0"),
    ],
)
def test_bad_references_are_refused(references: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_by_weight(experts(), torch.tensor(references))
