"""Pruning: dominant experts, REAP's saliency, and task-specific pruning while fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_experts import LAYOUTS, activation, compute, difference, experts, tokens
from torch import Tensor

from mcsmoe.grouping.kept import keep_highest
from mcsmoe.merge import METHODS
from mcsmoe.merge.base import MergeInputs
from mcsmoe.merge.reap import saliency
from mcsmoe.train.usage import TaskSpecificPruner, UsageAverage, living_grouping
from mcsmoe.types import ExpertWeights, Grouping

TABLE = torch.tensor([0, 1, 0, 2, 1, 0])
GROUPING = Grouping(TABLE, torch.tensor([2, 1, 3]))
FREQUENCY = torch.tensor([0.1, 0.3, 0.25, 0.05, 0.1, 0.2])


def _inputs(weights: ExpertWeights, **changes: Any) -> MergeInputs:
    return MergeInputs(**({"layer": "x", "weights": weights, "grouping": GROUPING, "frequency_E": FREQUENCY} | changes))


def _route(logits_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    return (logits_TE if bias_E is None else logits_TE + bias_E).argmax(dim=1)


@pytest.mark.parametrize("method", ["prune", "drop"])
def test_dominant_experts_are_kept_bit_by_bit(method: str) -> None:
    weights = experts("gated-biased")
    merged = METHODS[method](_inputs(weights))
    assert difference(merged.weights, weights.select(GROUPING.dominant)) == 0.0
    assert merged.share_E.tolist() == [0, 1, 1, 1, 0, 0]
    assert torch.equal(merged.expert_to_group, TABLE)


def test_pruning_redirects_and_dropping_keeps_the_router_away() -> None:
    weights = experts()
    generator = torch.Generator().manual_seed(0)
    for offset in (0.0, -8.0, 8.0):  # a factor on the logits would turn around with their sign
        logits_TE = torch.randn(500, 6, generator=generator) + offset
        pruned, dropped = METHODS["prune"](_inputs(weights)), METHODS["drop"](_inputs(weights))
        assert pruned.router_bias_E is None
        assert pruned.dropped_E is None
        chosen_T = _route(logits_TE, dropped.router_bias_E)
        assert dropped.dropped_E is not None
        assert dropped.dropped_E.tolist() == [True, False, False, False, True, True]
        assert not dropped.dropped_E[chosen_T].any()
        # A token goes to the best expert that is kept, with all the probability spread over those.
        best_T = torch.tensor([1, 2, 3])[logits_TE[:, [1, 2, 3]].argmax(dim=1)]
        assert torch.equal(chosen_T, best_T)
        probability_TE = (logits_TE + dropped.router_bias_E).softmax(dim=1)
        assert torch.allclose(probability_TE[:, [1, 2, 3]], logits_TE[:, [1, 2, 3]].softmax(dim=1), atol=1e-6)


# -- REAP ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saliency_is_the_mean_of_gate_times_output_norm(layout: str) -> None:
    weights, routed = experts(layout), tokens([9, 4, 0, 1, 7, 3])
    gates = [torch.linspace(0.2, 0.9, len(listed)) for listed in routed]
    found_E = saliency(weights, routed, gates, activation)
    for expert, (inputs_TD, gate_T) in enumerate(zip(routed, gates, strict=True)):
        each = [float(g * compute(weights, expert, x[None]).norm()) for x, g in zip(inputs_TD, gate_T, strict=True)]
        assert float(found_E[expert]) == pytest.approx(sum(each) / max(1, len(each)), rel=1e-5)
    merged = METHODS["reap"](_inputs(weights, tokens=routed, gates=gates, activation=activation))
    assert merged.dominant.tolist() == sorted(found_E.argsort(descending=True)[:3].tolist())
    given = METHODS["reap"](_inputs(weights, saliency_E=found_E))
    assert torch.equal(given.dominant, merged.dominant)


def test_reap_keeps_the_most_salient_and_drops_the_rest() -> None:
    weights = experts()
    merged = METHODS["reap"](_inputs(weights, saliency_E=torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])))
    assert merged.dominant.tolist() == [0, 2, 5]
    assert difference(merged.weights, weights.select(torch.tensor([0, 2, 5]))) == 0.0
    assert merged.dropped_E is not None
    assert merged.dropped_E.tolist() == [False, True, False, True, True, False]
    # Expert 5 is the best of all; 1, 3 and 4 have no kept expert in their groups.
    assert merged.expert_to_group.tolist() == [0, 2, 1, 2, 2, 2]


def test_a_dropped_expert_joins_the_best_kept_one_of_its_group() -> None:
    kept = keep_highest(GROUPING, torch.tensor([5.0, 7.0, 6.0, 9.0, 1.0, 2.0]))
    assert kept.dominant.tolist() == [1, 2, 3]
    assert kept.expert_to_group.tolist() == [1, 0, 1, 2, 0, 1]
    kept.validate("x")
    assert keep_highest(GROUPING, torch.zeros(6)).dominant.tolist() == [0, 1, 2]


def test_where_a_router_chooses_among_sets_first_equally_many_experts_are_kept_in_each() -> None:
    four = Grouping(torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 1, 2, 3]))
    criterion_E = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert keep_highest(four, criterion_E).dominant.tolist() == [0, 1, 2, 5]
    kept = keep_highest(four, criterion_E, sets=2)
    assert kept.dominant.tolist() == [0, 1, 4, 5]
    kept.validate("layer")
    assert keep_highest(GROUPING, criterion_E, sets=2).dominant.tolist() == [0, 1, 2]  # 3 do not divide


# -- task-specific ---------------------------------------------------------------------------------------------------
def test_usage_is_an_exponential_average_that_starts_with_the_first_step() -> None:
    usage = UsageAverage(decay=0.75)
    assert usage.update({"a": torch.tensor([6, 2, 0, 0])}) == pytest.approx(0.5 + 0.0 + 0.25 + 0.25)
    assert usage.update({"a": torch.tensor([0, 0, 0, 0])}) == 0.0
    assert usage.update({"a": torch.tensor([0, 0, 5, 5])}) == pytest.approx(2.0)
    expected = 0.75 * torch.tensor([0.75, 0.25, 0, 0]) + 0.25 * torch.tensor([0, 0, 0.5, 0.5])
    assert torch.allclose(usage.frequency["a"], expected.double())
    again = UsageAverage(decay=0.75)
    again.load_state_dict(usage.state_dict())
    step = {"a": torch.tensor([1, 2, 3, 4])}
    assert again.update(step) == usage.update(step)
    with pytest.raises(ValueError, match=r"'a'.*3 experts|'a'.*shape \(3,\)"):
        usage.update({"a": torch.tensor([1, 2, 3])})


def test_experts_die_below_their_share_and_never_come_back() -> None:
    pruner = TaskSpecificPruner(threshold=0.5, minimum=2)
    alive = pruner.prune({"a": torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])})["a"]
    assert alive.tolist() == [True, True, True, True, False]  # the threshold is 0.1: equal to it stays
    # 0.45 of the tokens go to the dead expert; among the living the shares are .45/.55, .05/.55, .05/.55 and 0.
    alive = pruner.prune({"a": torch.tensor([0.45, 0.05, 0.05, 0.0, 0.45])})["a"]
    assert alive.tolist() == [True, True, False, False, False]  # only one reaches 1/8: the two most used stay
    assert pruner.dropped("a").tolist() == [False, False, True, True, True]
    again = TaskSpecificPruner(threshold=0.5, minimum=2)
    again.load_state_dict(pruner.state_dict())
    assert again.prune({"a": torch.tensor([0.0, 0.1, 0.3, 0.3, 0.3])})["a"].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(ValueError, match=r"'a': 2 experts are alive, the minimum is 3"):
        TaskSpecificPruner(minimum=3).prune({"a": torch.tensor([0.5, 0.5])})


def test_to_the_minimum_only_the_most_used_stay_and_ties_go_to_the_lower_index() -> None:
    pruner = TaskSpecificPruner(threshold=0.0, minimum=2)
    assert pruner.prune({"a": torch.tensor([0.2, 0.4, 0.2, 0.2])}, to_minimum=True)["a"].tolist() == [
        *(True, True, False, False)
    ]


def test_the_living_lead_groups_of_their_own() -> None:
    alive_E = torch.tensor([False, True, False, True, True, False])
    grouping = living_grouping(alive_E, FREQUENCY)
    grouping.validate("x")
    assert grouping.dominant.tolist() == [1, 3, 4]
    assert grouping.expert_to_group.tolist() == [0, 0, 0, 1, 2, 0]
    merged = METHODS["drop"](_inputs(experts(), grouping=grouping))
    assert merged.dropped_E is not None
    assert torch.equal(merged.dropped_E, ~alive_E)
