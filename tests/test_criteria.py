"""Criteria against brute force over all subsets, and the limits they respect."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mcsmoe.criteria.quadratic import Limits, cheapest, cost, curve, highest
from mcsmoe.criteria.scores import QUADRATICS, SCORES, CriterionInputs, choose, super_experts
from mcsmoe.grouping.budget import predicted
from mcsmoe.statistics.outputs import OutputSums


def random_gram(seed: int, experts: int = 8, tokens: int = 60, choices: int = 3) -> Tensor:
    """Gram matrix of gated outputs of experts, each token choosing some of them."""
    generator = torch.Generator().manual_seed(seed)
    gated_TED = torch.randn(tokens, experts, 5, generator=generator, dtype=torch.float64)
    gated_TED = gated_TED + torch.randn(5, generator=generator, dtype=torch.float64)  # outputs have much in common
    chosen_TE = torch.rand(tokens, experts, generator=generator).argsort(dim=1) < choices
    gated_TED = gated_TED * chosen_TE[:, :, None] * torch.rand(experts, generator=generator)[None, :, None]
    return torch.einsum("tid,tjd->ij", gated_TED, gated_TED)


def smallest(matrix_EE: Tensor, dropped: int, allowed: list[int] | None = None) -> float:
    costs = []
    for subset in combinations(range(len(matrix_EE)) if allowed is None else allowed, dropped):
        mask_E = torch.zeros(len(matrix_EE), dtype=torch.bool)
        mask_E[list(subset)] = True
        costs.append(cost(matrix_EE, mask_E))
    return min(costs)


def cost_of(matrix_EE: Tensor, kept_K: Tensor) -> float:
    mask_E = torch.ones(len(matrix_EE), dtype=torch.bool)
    mask_E[kept_K] = False
    return cost(matrix_EE, mask_E)


@pytest.mark.parametrize("seed", range(12))
def test_cheapest_set_is_that_of_all_subsets(seed: int) -> None:
    matrix_EE = random_gram(seed)
    exact = 0
    for kept in range(1, 8):
        found, best = cost_of(matrix_EE, cheapest(matrix_EE, kept, Limits.none(8))), smallest(matrix_EE, 8 - kept)
        assert found <= 1.02 * best
        exact += found <= best * (1 + 1e-12)
    assert exact >= 6


def test_the_quadratic_is_the_change_of_the_output() -> None:
    generator = torch.Generator().manual_seed(3)
    outputs_TKD = torch.randn(40, 2, 5, generator=generator)
    chosen_TK = torch.rand(40, 6, generator=generator).argsort(dim=1)[:, :2]
    gate_TK = torch.rand(40, 2, generator=generator)
    sums = OutputSums.measured(outputs_TKD, chosen_TK, gate_TK, 6)
    dropped_E = torch.tensor([True, False, True, False, False, True])
    lost_TD = (outputs_TKD * gate_TK[:, :, None] * dropped_E[chosen_TK][:, :, None]).sum(dim=1)
    assert cost(sums.gram_EE, dropped_E) == pytest.approx(float(lost_TD.double().square().sum()), rel=1e-6)


def test_protected_and_dropped_experts_are_respected() -> None:
    matrix_EE = random_gram(1)
    free = cheapest(matrix_EE, 4, Limits.none(8)).tolist()
    gone = [expert for expert in range(8) if expert not in free]
    limits = Limits(torch.zeros(8).bool(), torch.zeros(8).bool(), torch.zeros(8).long())
    limits.protected_E[gone[0]] = True
    limits.dropped_E[free[0]] = True
    for kept_K in (cheapest(matrix_EE, 4, limits), highest(-matrix_EE.diagonal(), 4, limits)):
        assert gone[0] in kept_K.tolist()
        assert free[0] not in kept_K.tolist()
        assert len(kept_K) == 4
        assert kept_K.tolist() == sorted(kept_K.tolist())


@pytest.mark.parametrize("groups", [2, 4])
def test_router_groups_keep_the_same_number_each(groups: int) -> None:
    matrix_EE = random_gram(2)
    group_E = torch.arange(8) // (8 // groups)
    limits = Limits(torch.zeros(8).bool(), torch.zeros(8).bool(), group_E)
    for kept_K in (cheapest(matrix_EE, 4, limits), highest(matrix_EE.diagonal(), 4, limits)):
        assert torch.bincount(group_E[kept_K]).tolist() == [4 // groups] * groups
    if groups == 2:
        with pytest.raises(ValueError, match=r"layer 'x': 3 experts are to be kept.*multiple of 2"):
            cheapest(matrix_EE, 3, limits, "x")


def test_impossible_limits_are_refused_with_the_remedy() -> None:
    limits = Limits.none(8)
    limits.protected_E[:5] = True
    with pytest.raises(ValueError, match="layer 'x': 5 experts are protected, but only 4 are kept; protect fewer"):
        cheapest(random_gram(0), 4, limits, "x")
    limits.dropped_E[4] = True
    with pytest.raises(ValueError, match="expert 4 is both protected and dropped"):
        cheapest(random_gram(0), 6, limits, "x")
    limits = Limits.none(8)
    limits.dropped_E[:5] = True
    with pytest.raises(ValueError, match="3 experts are left, not 4; drop fewer"):
        highest(torch.ones(8), 4, limits)
    with pytest.raises(ValueError, match="9 of 8 experts are to be kept; give 1 to 8"):
        highest(torch.ones(8), 9, Limits.none(8))


def test_ties_do_not_depend_on_last_bits() -> None:
    score_E = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    shaken_E = score_E * (1 + 1e-15 * torch.tensor([-1.0, 0.0, 1.0, 2.0, 0.0], dtype=torch.float64))
    assert highest(score_E, 2, Limits.none(5)).tolist() == highest(shaken_E, 2, Limits.none(5)).tolist() == [0, 1]
    even_EE = torch.eye(6, dtype=torch.float64)
    shaken_EE = even_EE * (1 + 1e-15 * torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert cheapest(even_EE, 3, Limits.none(6)).tolist() == cheapest(shaken_EE, 3, Limits.none(6)).tolist() == [0, 1, 2]


def test_the_curve_never_rises_and_ends_at_nothing() -> None:
    matrix_EE = random_gram(5)
    found = curve(matrix_EE, Limits.none(8), fewest=2)
    assert torch.isinf(found[:2]).all()
    assert bool((found[3:] <= found[2:-1] + 1e-12).all())
    assert float(found[8]) == 0
    assert float(found[4]) == pytest.approx(smallest(matrix_EE, 4), rel=0.02)


def inputs(seed: int = 0) -> CriterionInputs:
    generator = torch.Generator().manual_seed(seed)
    outputs_TKD = torch.randn(90, 2, 5, generator=generator)
    chosen_TK = torch.rand(90, 6, generator=generator).argsort(dim=1)[:, :2]
    chosen_TK[chosen_TK == 5] = -1  # an expert without tokens
    gate_TK = torch.rand(90, 2, generator=generator)
    computed_E = torch.bincount(chosen_TK[chosen_TK >= 0], minlength=6)
    statistics = SimpleNamespace(
        outputs=OutputSums.measured(outputs_TKD, chosen_TK, gate_TK, 6), computed_E=computed_E, num_experts=6
    )
    return CriterionInputs("x", statistics), outputs_TKD, chosen_TK, gate_TK  # type: ignore


def test_scores_are_what_their_sources_define() -> None:
    given, outputs_TKD, chosen_TK, gate_TK = inputs()  # type: ignore
    norm_TK = outputs_TKD.double().norm(dim=2)
    for expert in range(6):
        here_TK = chosen_TK == expert
        norm_N, gate_N = norm_TK[here_TK], gate_TK[here_TK].double()
        count = max(1, len(norm_N))
        wanted = {
            "frequency": float(here_TK.sum()),
            "mass": float((norm_N * gate_N).sum()),
            "reap": float((norm_N * gate_N).sum()) / count,
            "man": float(norm_N.sum()) / count,
            "msan": float(norm_N.square().sum()) / count,
        }
        for name, value in wanted.items():
            assert float(SCORES[name](given)[expert]) == pytest.approx(value, rel=1e-6), name


def test_hope_bounds_gram_and_both_choose() -> None:
    given, *_ = inputs()  # type: ignore
    hope_EE, gram_EE = QUADRATICS["hope"](given), QUADRATICS["gram"](given)
    assert bool((hope_EE + 1e-9 >= gram_EE.abs()).all())
    assert torch.allclose(hope_EE.diagonal(), gram_EE.diagonal())
    for name in (*SCORES, *QUADRATICS):
        assert len(choose(name, given, 3)) == 3
    # An expert that nothing was routed to leaves first.
    assert 5 not in choose("gram", given, 5).tolist()


def test_random_is_the_same_for_a_seed_and_layer_only() -> None:
    given, *_ = inputs()  # type: ignore
    again = CriterionInputs("x", given.statistics)
    other = CriterionInputs("y", given.statistics)
    assert torch.equal(SCORES["random"](given), SCORES["random"](again))
    assert not torch.equal(SCORES["random"](given), SCORES["random"](other))


def test_super_experts_are_outliers_of_the_model() -> None:
    largest = {"a": torch.rand(100) + 1, "b": torch.rand(100) + 1}
    largest["b"][7] = 50.0
    found = super_experts(largest)
    assert found["b"].nonzero()[:, 0].tolist() == [7]
    assert not found["a"].any()


def test_predicted_budget_is_the_cheapest_spread() -> None:
    """Convex curves: giving up the cheapest next expert is optimal, seen against all spreads."""
    generator = torch.Generator().manual_seed(0)
    curves = {}
    for layer in "abc":
        rises = torch.rand(5, generator=generator, dtype=torch.float64).sort().values
        costs = torch.cat([torch.zeros(1, dtype=torch.float64), rises.cumsum(0)])  # from all kept down to none
        curves[layer] = costs.flip(0)
        curves[layer][0] = torch.inf
    found = predicted(curves, 3)
    assert sum(found.values()) == 9
    spent = sum(float(curves[layer][kept]) for layer, kept in found.items())
    every = [
        sum(float(curves[layer][k]) for layer, k in zip("abc", spread, strict=True))
        for spread in product(range(1, 6), repeat=3)
        if sum(spread) == 9
    ]
    assert spent == pytest.approx(min(every))


def test_predicted_budget_keeps_what_a_layer_must() -> None:
    steep, flat = (
        torch.tensor([torch.inf, torch.inf, 9.0, 8.0, 0.0]),
        torch.tensor([torch.inf, torch.inf, 0.2, 0.1, 0.0]),
    )
    assert predicted({"a": steep, "b": flat}, 3) == {"a": 4, "b": 2}
    with pytest.raises(ValueError, match=r"average is 1, but the layers must keep 4 experts in all, 2.0 on average"):
        predicted({"a": steep, "b": flat}, 1)
    even = torch.tensor([torch.inf, torch.inf, 0.5, torch.inf, 0.0])
    assert predicted({"a": even, "b": even}, 3) == {"a": 2, "b": 4}
