"""Aligned and merged weights and logits against the recordings of the published implementation.

Where ours differs on purpose the published order of operations is rebuilt here from our own parts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_switch import EPSILON, MERGE_TOLERANCE, ROLES, Golden, difference, stack
from safetensors.torch import load_file
from torch import Tensor

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.align import (
    activation_correlation,
    align_by_tokens,
    align_by_weight,
    apply_permutation,
)
from mcsmoe.merge import METHODS
from mcsmoe.merge.base import Merged, grouping_members
from mcsmoe.merge.fisher import FisherMean
from mcsmoe.types import ExpertWeights, Grouping

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    torch.set_num_threads(1)
    return Golden(shared / "golden")


# -- alignment -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["weight_wo1", "weight_wo0", "activation_full"])
def test_permutations_and_aligned_weights_are_the_published_ones(golden: Golden, kind: str) -> None:
    recorded = load_file(golden.folder / "permutation" / "permutations.safetensors")
    stored = load_file(golden.folder / "permutation" / f"aligned_{kind}.safetensors")
    first_E = torch.zeros(8, dtype=torch.int64)
    for layer in golden.layers:
        weights = golden.weights[layer]
        if kind.startswith("weight"):
            found = align_by_weight(weights, first_E, include_output=kind == "weight_wo1")
        else:
            found = align_by_tokens(weights, golden.tokens[layer], golden.activation[layer], first_E)
        assert torch.equal(found.permutation_EF, recorded[f"{kind}.{layer}"])
        assert difference(apply_permutation(weights, found.permutation_EF), stack(stored, layer, list(range(8)))) == 0.0


def test_permutations_by_few_tokens_are_as_good_as_the_published_ones(golden: Golden) -> None:
    """With 8 to 60 tokens some neurons never fire and others are collinear: several orders tie for the optimum, and the
    published one is told apart by the epsilon in its denominators. Both orders must reach the same objective."""
    recorded = load_file(golden.folder / "permutation" / "permutations.safetensors")
    tokens = golden.collect("pad")[0]
    first_E, place_F = torch.zeros(8, dtype=torch.int64), torch.arange(64)
    tied = 0
    for layer in golden.layers:
        arguments = (golden.weights[layer], tokens[layer], golden.activation[layer], first_E)
        found_EF = align_by_tokens(*arguments).permutation_EF
        correlation_EFF = activation_correlation(*arguments).double()
        for expert in range(1, 8):
            published_F = recorded[f"activation_pad.{layer}"][expert]
            ours, theirs = (
                float(correlation_EFF[expert, place_F, order_F].sum()) for order_F in (found_EF[expert], published_F)
            )
            assert ours == pytest.approx(theirs, abs=1e-4)
            tied += int(not torch.equal(found_EF[expert], published_F))
    assert tied <= 4


# -- averages --------------------------------------------------------------------------------------------------------
DIRECT = {
    "freq_normal_avg2": "frequency",
    "freq_normal_avg3": "frequency",
    "freq_normal_avg4": "frequency",
    "freq_normal_uniform3": "frequency",
    "freq_normal_avg3_padbatch": "frequency",
    "freq_normal_avg3_enc3_dec1": "frequency",
    "noncore_freq_avg3": "frequency",
    "noncore_to_one_freq_avg3": "frequency",
    "freq_reversed_avg3": "reversed",
    "average_avg3": "uniform",
    "prune_replace_avg3": "prune",
}


@pytest.mark.parametrize("variant", DIRECT)
def test_merged_weights_and_logits_are_the_published_ones(golden: Golden, variant: str) -> None:
    made: dict[str, tuple[ExpertWeights, Tensor]] = {}
    for layer in golden.layers:
        merged = METHODS[DIRECT[variant]](golden.merge_inputs(variant, layer))
        rebuilt = _divided_with_epsilon(merged, golden, variant, layer)
        assert difference(rebuilt, golden.recorded(variant, layer)) < MERGE_TOLERANCE
        made[layer] = (merged.weights, merged.expert_to_group)
    golden.check_logits(variant, made)


def _divided_with_epsilon(merged: Merged, golden: Golden, variant: str, layer: str) -> ExpertWeights:
    """Shrink averages by usage as the published epsilon does: sum / (sum + eps), which is zero without any usage."""
    if "freq" not in variant:
        return merged.weights
    used_E = golden.merge_inputs(variant, layer).frequency_E
    used_E = 1 - used_E if "reversed" in variant else used_E
    used_G = torch.zeros(merged.weights.num_experts).index_add_(0, merged.expert_to_group, used_E)
    factor_G = used_G / (used_G + EPSILON)
    # Experts the variant leaves out of merging are not divided, groups of one that it does merge are.
    cores = golden.index["freq_normal_avg3"]["core_experts"][layer]
    left_out = cores if "noncore" in variant else range(8) if len(used_G) == 8 else ()
    factor_G[merged.expert_to_group[list(left_out)]] = 1.0
    return merged.weights.map(lambda _, tensor: tensor * factor_G[:, None, None])


def test_aligning_first_then_merging_is_the_published_pipeline(golden: Golden) -> None:
    variant = "freq_normal_aligned_avg3"
    for layer in golden.layers:
        found = align_by_weight(golden.weights[layer], torch.zeros(8, dtype=torch.int64))
        aligned = apply_permutation(golden.weights[layer], found.permutation_EF)
        merged = METHODS["frequency"](golden.merge_inputs(variant, layer, weights=aligned))
        rebuilt = _divided_with_epsilon(merged, golden, variant, layer)
        assert difference(rebuilt, golden.recorded(variant, layer)) < MERGE_TOLERANCE


def _lowest_first(grouping: Grouping) -> Grouping:
    """The published reference of a group: its lowest index, where ours is its dominant expert."""
    return Grouping(grouping.expert_to_group, torch.stack([members[0] for members in grouping_members(grouping)]))


def _published_permutations(golden: Golden, variant: str, layer: str) -> Tensor:
    stored = load_file(golden.folder / "merge" / f"{variant}.perms.safetensors")
    order_EF = torch.arange(64).repeat(8, 1)
    for key, order_F in stored.items():
        if key.startswith(f"{layer}.ref"):
            order_EF[int(key.rsplit("target", 1)[1])] = order_F
    return order_EF


@pytest.mark.parametrize(
    ("variant", "method"),
    [("freq_normal_permute_avg3", "frequency"), ("average_permute_weight_avg3", "git-rebasin")],
)
def test_alignment_within_groups_on_the_published_reference(golden: Golden, variant: str, method: str) -> None:
    made: dict[str, tuple[ExpertWeights, Tensor]] = {}
    dominant_elsewhere = 0
    for layer in golden.layers:
        inputs = golden.merge_inputs(variant, layer)
        grouping = _lowest_first(inputs.grouping)
        dominant_elsewhere += int((grouping.dominant != inputs.grouping.dominant).sum())
        found = align_by_weight(inputs.weights, grouping.dominant[grouping.expert_to_group])
        assert torch.equal(found.permutation_EF, _published_permutations(golden, variant, layer))
        if method == "git-rebasin":
            merged = METHODS[method](golden.merge_inputs(variant, layer, grouping=grouping))
        else:
            aligned = apply_permutation(inputs.weights, found.permutation_EF)
            merged = METHODS[method](golden.merge_inputs(variant, layer, grouping=grouping, weights=aligned))
        rebuilt = _divided_with_epsilon(merged, golden, variant, layer)
        assert difference(rebuilt, golden.recorded(variant, layer)) < MERGE_TOLERANCE
        made[layer] = (merged.weights, merged.expert_to_group)
    golden.check_logits(variant, made)
    assert dominant_elsewhere > 0


def test_what_is_published_as_repair_is_activation_alignment_and_the_mean(golden: Golden) -> None:
    variant = "average_permute_activation_avg3"
    made: dict[str, tuple[ExpertWeights, Tensor]] = {}
    for layer in golden.layers:
        inputs = golden.merge_inputs(variant, layer)
        grouping = _lowest_first(inputs.grouping)
        table = grouping.expert_to_group
        found = align_by_tokens(
            inputs.weights, golden.tokens[layer], golden.activation[layer], grouping.dominant[table], pool_E=table
        )
        assert torch.equal(found.permutation_EF, _published_permutations(golden, variant, layer))
        aligned = apply_permutation(inputs.weights, found.permutation_EF)
        merged = METHODS["uniform"](golden.merge_inputs(variant, layer, weights=aligned))
        assert difference(merged.weights, golden.recorded(variant, layer)) < MERGE_TOLERANCE
        made[layer] = (merged.weights, merged.expert_to_group)
    golden.check_logits(variant, made)


# -- Fisher ----------------------------------------------------------------------------------------------------------
def _fisher(golden: Golden, name: str, layer: str) -> ExpertWeights:
    return stack(load_file(golden.folder / "merge" / f"{name}.safetensors"), layer, list(range(8)))


def _with_epsilon(merged: ExpertWeights, fisher: ExpertWeights, grouping: Grouping) -> ExpertWeights:
    """Shrink our quotient as the published epsilon does: sum / (sum + eps), which is 0 where no Fisher is."""
    total = {
        name: torch.stack([tensor[members].sum(dim=0) for members in grouping_members(grouping)])
        for name, tensor in fisher.tensors.items()
    }
    return merged.map(lambda name, tensor: tensor * (total[name] / (total[name] + EPSILON)))


FISHER = {
    "fisher_empirical_avg3": ("fisher_empirical_first16", False),
    "fisher_exact_avg3": ("fisher_exact_first16_tok0_labels5_9_17", False),
    "fisher_empirical_permute_avg3": ("fisher_empirical_first16", True),
}


@pytest.mark.parametrize("variant", FISHER)
def test_fisher_merging_up_to_the_published_epsilon(golden: Golden, variant: str) -> None:
    name, permuted = FISHER[variant]
    made: dict[str, tuple[ExpertWeights, Tensor]] = {}
    for layer in golden.layers:
        # As published, the Fisher information is not permuted with the weights; ours must be.
        fisher, weights = _fisher(golden, name, layer), golden.weights[layer]
        if permuted:
            weights = apply_permutation(weights, _published_permutations(golden, variant, layer))
        inputs = golden.merge_inputs(variant, layer, weights=weights, fisher=fisher)
        merged = METHODS["fisher"](inputs)
        rebuilt = _with_epsilon(merged.weights, fisher, inputs.grouping)
        recorded = golden.recorded(variant, layer)
        assert difference(rebuilt, recorded) < MERGE_TOLERANCE
        assert difference(merged.weights, recorded) > 0.01  # the shrinking is not a matter of rounding
        made[layer] = (rebuilt, merged.expert_to_group)
    golden.check_logits(variant, made)


def test_exact_fisher_information_from_gradients(golden: Golden) -> None:
    name, labels = "fisher_exact_first16_tok0_labels5_9_17", [5, 9, 17]
    model = golden.model
    found = {layer: FisherMean() for layer in golden.layers}
    stock = type(model)(model.config).eval()
    stock.load_state_dict(load_file(golden.folder / "model" / "model.safetensors"), strict=False)
    stock.tie_weights()
    adapter = adapter_for(stock)
    for row in range(16):
        batch = {key: value[row : row + 1] for key, value in golden.inputs("full", 16).items()}
        log_probability_L = stock(**batch).logits[0, 0, labels].log_softmax(dim=-1)
        for place in range(3):
            stock.zero_grad(set_to_none=False)
            log_probability_L[place].backward(retain_graph=True)
            for layer in golden.layers:
                experts = stock.get_submodule(layer).experts
                gradients = ExpertWeights(
                    {
                        which: torch.stack([_gradient(getattr(experts[f"expert_{e}"], which).weight) for e in range(8)])
                        for which in ROLES
                    },
                    dict(ROLES),
                )
                weight = float(log_probability_L[place].detach().exp())
                found[layer].update(gradients, weight, examples=1.0 if place == 0 else 0.0)
    assert adapter.layers(stock) == golden.layers
    for layer in golden.layers:
        recorded = _fisher(golden, name, layer)
        for which, tensor in found[layer].result().tensors.items():
            scale = float(recorded.tensors[which].max())
            assert (tensor - recorded.tensors[which]).abs().max() < 1e-4 * scale


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
