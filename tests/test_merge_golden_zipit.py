"""ZipIt and pruning against the recordings of the published implementation.

Where ours differs on purpose the published order of operations is rebuilt here from our own parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_switch import LOGIT_TOLERANCE, MERGE_TOLERANCE, Golden, difference
from safetensors.torch import load_file
from tiny_switch import logits
from torch import Tensor

from mcsmoe.align import (
    correlation,
)
from mcsmoe.merge import METHODS
from mcsmoe.merge.base import Merged, grouping_members
from mcsmoe.merge.zipit import ALPHA, Joined, Rule, inner_products, pair_up
from mcsmoe.train.usage import TaskSpecificPruner, UsageAverage
from mcsmoe.types import ExpertWeights

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    torch.set_num_threads(1)
    return Golden(shared / "golden")


# -- ZipIt -----------------------------------------------------------------------------------------------------------
def _published_penalty(joined: Joined) -> Any:
    """A tenth of the smaller similarity whatever its sign, which draws opposed neurons together."""
    return np.float32(ALPHA) * np.minimum(joined.first_N, joined.second_N)


def _averaged(joined: Joined) -> Any:
    """Inner products of the mean of two neurons, by linearity; the published code multiplies them out again."""
    return (joined.first * joined.first_N + joined.second * joined.second_N) / (joined.first + joined.second)


def _published_zip(members: ExpertWeights, similarity_NN: Tensor, coefficient_E: Tensor, rule: Rule) -> ExpertWeights:
    """Rows and columns of a slot averaged alike, where ours sums the columns with the experts' shares."""
    coefficient_N = coefficient_E.double().repeat_interleave(members.width)
    slot_N = pair_up(similarity_NN, members.width, coefficient_N, rule)
    total_F = torch.zeros(members.width, dtype=torch.float64).index_add_(0, slot_N, coefficient_N)

    def zipped(name: str, tensor: Tensor) -> Tensor:
        rows = tensor.transpose(1, 2) if name == "wo" else tensor
        rows_NP = rows.reshape(len(slot_N), -1).double() * (coefficient_N / total_F[slot_N])[:, None]
        made_FP = torch.zeros(members.width, rows_NP.shape[1], dtype=torch.float64).index_add_(0, slot_N, rows_NP)
        return (made_FP.t() if name == "wo" else made_FP)[None].float()

    return members.map(zipped)


def _zip_tokens(
    golden: Golden, layer: str, members: ExpertWeights, coefficient_E: Tensor, experts: list[int]
) -> ExpertWeights:
    inputs_TD = torch.cat([golden.tokens[layer][expert] for expert in experts])
    activation = golden.activation[layer]
    hidden_TN = torch.cat([members.hidden(e, inputs_TD, activation) for e in range(members.num_experts)], dim=1)
    return _published_zip(members, correlation(hidden_TN, hidden_TN), coefficient_E, _published_penalty)


def _join(*parts: ExpertWeights) -> ExpertWeights:
    return ExpertWeights({n: torch.cat([p.tensors[n] for p in parts]) for n in parts[0].tensors}, dict(parts[0].roles))


ZIPIT = (
    "freq_normal_zipit_weight_avg3",
    "zipit_activation_avg3",
    "zipit_activation_usage_avg3",
    "zipit_activation_dominant_avg3",
    "zipit_activation_dominant_usage_avg3",
    "noncore_zipit_avg3",
    "noncore_to_one_zipit_avg3",
)


@pytest.mark.parametrize("variant", ZIPIT)
def test_zipit_rebuilt_in_the_published_order_of_operations(golden: Golden, variant: str) -> None:
    made: dict[str, tuple[ExpertWeights, Tensor]] = {}
    for layer in golden.layers:
        inputs = golden.merge_inputs(variant, layer)
        grouping, frequency_E = inputs.grouping, inputs.frequency_E
        weighted = "usage" in variant or "freq" in variant
        parts = []
        for group, members in enumerate(grouping_members(grouping)):
            experts = members.tolist()
            weights, coefficient_E = inputs.weights.select(members), torch.ones(len(experts))
            if weighted:
                coefficient_E = frequency_E[members]
            if len(experts) == 1:
                parts.append(weights)
            elif "weight" in variant:
                parts.append(_published_zip(weights, inner_products(weights), coefficient_E, _averaged))
            elif "dominant" in variant:
                core = int(grouping.dominant[group])
                others = [expert for expert in experts if expert != core]
                other_E = coefficient_E[[experts.index(expert) for expert in others]]
                first = inputs.weights.select(torch.tensor(others))
                first = first if len(others) == 1 else _zip_tokens(golden, layer, first, other_E, others)
                pair = _join(first, inputs.weights.select(torch.tensor([core])))
                pair_E = torch.ones(2)
                if weighted:
                    pair_E = torch.stack([other_E.sum(), frequency_E[core]])
                parts.append(_zip_tokens(golden, layer, pair, pair_E, experts))
            else:
                parts.append(_zip_tokens(golden, layer, weights, coefficient_E, experts))
        rebuilt = _join(*parts)
        # Weighted by usage, each of up to 64 successive merges is divided by (sum + 1e-7).
        assert difference(rebuilt, golden.recorded(variant, layer)) < (1e-5 if weighted else MERGE_TOLERANCE)
        made[layer] = (rebuilt, grouping.expert_to_group)
    golden.check_logits(variant, made)


# -- pruning ---------------------------------------------------------------------------------------------------------
def test_dropped_experts_are_never_chosen_and_logits_are_the_published_ones(golden: Golden) -> None:
    variant = "prune_drop_avg3"
    bias: dict[str, Tensor] = {}
    handles = []
    try:
        for layer in golden.layers:
            grouping = golden.grouping("prune_replace_avg3", layer)
            merged: Merged = METHODS["drop"](golden.merge_inputs("prune_replace_avg3", layer, grouping=grouping))
            assert difference(merged.weights, golden.weights[layer].select(grouping.dominant)) == 0.0
            bias_E = merged.router_bias_E
            assert bias_E is not None
            bias[layer] = bias_E
            golden.adapter.write_experts(golden.model, layer, merged.weights, merged.expert_to_group)
            classifier = golden.model.get_submodule(layer).router.classifier
            handles.append(classifier.register_forward_hook(lambda _m, _a, out, added=bias_E: out + added))
        for kind in ("full", "pad"):
            with golden.adapter.capture(golden.model) as captured:
                found = logits(golden.model, golden.inputs(kind, 16))
            assert (found - golden.logits[f"{variant}.{kind}"]).abs().max() < LOGIT_TOLERANCE
            for layer, routed in captured.batches.items():
                assert not torch.isinf(bias[layer])[routed.wanted_TK].any()
    finally:
        for handle in handles:
            handle.remove()
        for layer in golden.layers:
            golden.adapter.write_experts(golden.model, layer, golden.weights[layer], torch.arange(8))


def test_usage_average_and_living_experts_are_the_published_ones(golden: Golden) -> None:
    recorded = load_file(golden.folder / "task_specific.safetensors")
    expected = json.loads((golden.folder / "task_specific.json").read_text())
    usage = UsageAverage(decay=0.6)
    errors = []
    for start in (0, 16, 32):
        batch = {name: value[start : start + 16] for name, value in golden.inputs("full").items()}
        with golden.adapter.capture(golden.model) as captured:
            logits(golden.model, batch)
        counts = {
            layer: torch.bincount(routed.chosen_TK[:, 0], minlength=8) for layer, routed in captured.batches.items()
        }
        errors.append(usage.update(counts))
    assert errors == pytest.approx(expected["tracker"]["l1_errors"], abs=1e-5)
    for layer in golden.layers:
        assert (usage.frequency[layer] - recorded[f"ema.{layer}"]).abs().max() < 1e-6
    pruner = TaskSpecificPruner(threshold=0.5, minimum=3)
    alive = pruner.prune(usage.frequency)
    assert {layer: alive[layer].tolist() for layer in alive} == expected["alive_after_threshold"]
    alive = pruner.prune(usage.frequency, to_minimum=True)
    assert {layer: alive[layer].tolist() for layer in alive} == expected["alive_after_minimum"]


def test_the_published_factor_lets_dead_experts_win_and_our_bias_does_not(golden: Golden) -> None:
    """Rebuilt with logits multiplied by -1e6 the recorded logits come out; half the tokens then go to dead experts."""
    recorded = load_file(golden.folder / "task_specific.safetensors")
    alive = json.loads((golden.folder / "task_specific.json").read_text())["alive_after_threshold"]
    pruner = TaskSpecificPruner()
    pruner.load_state_dict({layer: torch.tensor(living) for layer, living in alive.items()})
    for published in (True, False):
        handles = []
        for layer in golden.layers:
            dead_E = pruner.dropped(layer)
            factor_E = torch.where(dead_E, -1e6, 1.0) if published else torch.ones(8)
            bias_E = torch.zeros(8) if published else torch.zeros(8).masked_fill(dead_E, float("-inf"))
            classifier = golden.model.get_submodule(layer).router.classifier
            handles.append(
                classifier.register_forward_hook(lambda _m, _a, out, f=factor_E, b=bias_E: out * f + b)  # type: ignore[misc]
            )
        with golden.adapter.capture(golden.model) as captured:
            found = logits(golden.model, golden.inputs("full", 16))
        for handle in handles:
            handle.remove()
        to_dead = [pruner.dropped(layer)[routed.wanted_TK].float().mean() for layer, routed in captured.batches.items()]
        if published:
            assert (found - recorded["logits.after_threshold"]).abs().max() < LOGIT_TOLERANCE
            assert min(to_dead) > 0.1
        else:
            assert max(to_dead) == 0.0
