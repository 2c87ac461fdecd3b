"""The laws every adapter obeys, for the families that stack their experts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from fused_forms import apart, biases, double, factors, merge, one_token, opened, table_of
from tiny_models import CHOICES, DECODERS, DENSE_LAYERS, batch, logits
from torch import Tensor

import mcsmoe
from mcsmoe import modules
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.types import ExpertWeights, LayerSpec, Role

FAMILIES = list(DECODERS)
# Logits of these models are of size 0.1 to 1: another order of the same float32 sums moves them by some 1e-7.
TOLERANCE = 2e-6
# In float64 the experts differ by 1e-16, and the norms of these families round even that away to float32 bits.
TOLERANCE_64 = 1e-12


# -- structure ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_layers_are_found_and_dense_ones_passed_over(family: str) -> None:
    made, adapter, layers = opened(family)
    block = "block_sparse_moe" if family == "granitemoe" else "mlp"
    sparse = [index for index in range(3) if index not in DENSE_LAYERS.get(family, set())]
    assert layers == [f"model.layers.{index}.{block}" for index in sparse]
    experts = 8 if family == "deepseek_v3" else 6
    assert {adapter.num_experts(made, layer) for layer in layers} == {experts}
    weights = adapter.read_experts(made, layers[0])
    assert (weights.num_experts, weights.width, weights.d_model) == (experts, 24, 16)
    matrices = {"gate": Role.INPUT, "up": Role.INPUT, "down": Role.OUTPUT}
    bias = {"gate_bias": Role.INPUT_BIAS, "up_bias": Role.INPUT_BIAS, "down_bias": Role.OUTPUT_BIAS}
    assert weights.roles == (matrices | bias if family == "gpt_oss" else matrices)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["stock", "merged", "compressed"])
def test_experts_compute_what_the_raw_state_dict_says_token_by_token(family: str, form: str) -> None:
    """Catches gate and up in each other's place, a transposed or interleaved matrix and a bias left out."""
    made, adapter, layers = opened(family)
    double(made)
    layer, state = layers[-1], {name: tensor.clone() for name, tensor in made.state_dict().items()}
    experts = adapter.num_experts(made, layer)
    weights = adapter.read_experts(made, layer)
    for expert in range(experts):
        alone = apart(family, state, layer, expert)
        assert all(torch.equal(weights.tensors[name][expert], alone[name]) for name in weights.tensors)
    if form == "merged":
        adapter.write_experts(made, layer, weights, torch.arange(experts))
    elif form == "compressed":
        adapter.write_compressed(made, layer, factors(weights, 4), biases(weights), torch.arange(experts))
        modules.pack(made)
    outputs: list[Tensor] = []
    hook = made.get_submodule(f"{layer}.experts").register_forward_hook(lambda *a: outputs.append(a[2]))
    with adapter.capture(made) as captured:
        logits(made, batch(rows=2))
    hook.remove()
    routed = captured.batches[layer]
    expected = torch.stack(
        [
            sum(
                weight * one_token(family, apart(family, state, layer, int(expert)), x)
                for expert, weight in zip(chosen, weights_K, strict=True)
            )
            for x, chosen, weights_K in zip(routed.inputs_TD, routed.chosen_TK, routed.weights_TK, strict=True)
        ]
    )
    assert expected.abs().max() > 0.05
    assert (outputs[0] - expected).abs().max() < (1e-6 if routed.weights_TK.dtype == torch.float32 else 1e-12)
    if form == "stock" and family != "gpt_oss":
        other = {"gate": "up", "up": "gate", "down": "down"}
        swapped = weights.map(lambda name, _: weights.tensors[other[name]])
        adapter.write_experts(made, layer, swapped)
        outputs.clear()
        hook = made.get_submodule(f"{layer}.experts").register_forward_hook(lambda *a: outputs.append(a[2]))
        logits(made, batch(rows=2))
        hook.remove()
        assert (outputs[0] - expected).abs().max() > 1e-3


# -- the four laws -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_read_then_write_changes_no_logit(family: str) -> None:
    made, adapter, layers = opened(family)
    inputs = batch()
    before = logits(made, inputs)
    stock = {layer: adapter.read_experts(made, layer) for layer in layers}
    for layer in layers:
        adapter.read_experts(made, layer).map(lambda _, t: t.zero_())
        adapter.write_experts(made, layer, stock[layer].map(lambda _, t: torch.zeros_like(t)))
    assert (logits(made, inputs) - before).abs().max() > 1e-2  # the experts matter
    for layer in layers:
        adapter.write_experts(made, layer, stock[layer])
    assert torch.equal(logits(made, inputs), before)
    for layer in layers:
        adapter.write_experts(made, layer, stock[layer], torch.arange(adapter.num_experts(made, layer)))
    redirected = logits(made, inputs)
    assert (redirected - before).abs().max() < TOLERANCE
    for layer in layers:
        back = adapter.read_experts(made, layer)
        assert back.roles == stock[layer].roles
        assert all(torch.equal(back.tensors[name], stock[layer].tensors[name]) for name in back.tensors)
        adapter.write_experts(made, layer, back)
    assert torch.equal(logits(made, inputs), redirected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permuting_neurons_changes_no_logit(family: str, dtype: torch.dtype) -> None:
    made, adapter, layers = opened(family)
    if dtype is torch.float64:
        double(made)
    inputs = batch()
    before = logits(made, inputs)
    for layer in layers:
        weights = adapter.read_experts(made, layer)
        orders = [
            torch.randperm(24, generator=torch.Generator().manual_seed(expert)) for expert in range(weights.num_experts)
        ]

        def permuted(name: str, tensor: Tensor, weights: ExpertWeights = weights, orders: list = orders) -> Tensor:
            axis = weights.neuron_axis(name)
            if axis is None:
                return tensor
            return torch.stack([one.index_select(axis - 1, o) for one, o in zip(tensor, orders, strict=True)])

        adapter.write_experts(made, layer, weights.map(permuted))
    after = logits(made, inputs)
    assert dtype is torch.float64 or not torch.equal(after, before)
    assert (after - before).abs().max() < (TOLERANCE if dtype is torch.float32 else TOLERANCE_64)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_identical_experts_changes_no_logit(family: str) -> None:
    made, adapter, layers = opened(family)
    inputs = batch()
    table, leaders = table_of(adapter.num_experts(made, layers[0])), torch.tensor([0, 1, 3])
    for layer in layers:
        adapter.write_experts(made, layer, adapter.read_experts(made, layer).select(leaders).select(table))
    before = logits(made, inputs)
    with adapter.capture(made) as stock:
        logits(made, inputs)
    for layer in layers:
        adapter.write_experts(made, layer, adapter.read_experts(made, layer).select(leaders), table)
        assert torch.equal(adapter.expert_to_group(made, layer), table)
        assert adapter.num_experts(made, layer) == len(table)
        assert adapter.read_experts(made, layer).num_experts == 3
    assert adapter_for(made).layers(made) == layers
    with adapter.capture(made) as merged:
        after = logits(made, inputs)
    assert (after - before).abs().max() < TOLERANCE
    shared = 0
    for layer in layers:
        assert torch.equal(merged.batches[layer].wanted_TK, stock.batches[layer].wanted_TK)
        groups = table[merged.batches[layer].wanted_TK].sort(dim=1).values
        shared += int((groups[:, 1:] == groups[:, :-1]).sum())
    assert shared > 0  # some token had two experts in one group


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_sum_to_valid_tokens_times_choices(family: str) -> None:
    made, adapter, layers = opened(family)
    inputs, choices = batch(), CHOICES.get(family, 3)
    with adapter.capture(made) as captured:
        logits(made, inputs)
    assert list(captured.batches) == layers
    for layer, routed in captured.batches.items():
        seen = routed.only_valid()
        assert torch.equal(routed.valid_T, inputs["attention_mask"].bool().flatten())
        experts = adapter.num_experts(made, layer)
        assert torch.bincount(seen.chosen_TK.flatten(), minlength=experts).sum() == 45 * choices
        assert routed.logits_TE.shape == (55, experts)
        router = adapter.read_router(made, layer)
        bias = 0 if router.bias_E is None else router.bias_E
        assert (router.bias_E is not None) == (family == "gpt_oss")
        assert (routed.inputs_TD @ router.weight_ED.T + bias - routed.logits_TE).abs().max() < 1e-5
        if family != "deepseek_v3":
            assert torch.equal(routed.wanted_TK, routed.logits_TE.topk(choices, dim=1).indices)


# -- routing -----------------------------------------------------------------------------------------------------
def test_deepseek_chooses_by_corrected_scores_within_the_best_groups_of_experts() -> None:
    made, adapter, layers = opened("deepseek_v3")
    with adapter.capture(made) as captured:
        logits(made, batch())
    for layer in layers:
        routed = captured.batches[layer]
        scores = routed.logits_TE.sigmoid() + made.get_submodule(layer).gate.e_score_correction_bias
        best = scores.reshape(-1, 4, 2).sum(dim=2).topk(2, dim=1).indices
        allowed = torch.zeros(55, 4, dtype=torch.bool).scatter_(1, best, True).repeat_interleave(2, dim=1)
        expected = scores.masked_fill(~allowed, -torch.inf).topk(3, dim=1).indices
        assert torch.equal(routed.wanted_TK.sort(dim=1).values, expected.sort(dim=1).values)
        assert not torch.equal(expected.sort(dim=1).values, routed.logits_TE.topk(3, dim=1).indices.sort(dim=1).values)


@pytest.mark.parametrize("family", FAMILIES)
def test_router_parameters_are_named(family: str) -> None:
    made, adapter, layers = opened(family)
    names = adapter.router_parameters(made)
    assert set(names) <= {name for name, _ in made.named_parameters()}
    assert len(names) == len(layers) * (2 if family == "gpt_oss" else 1)
    merge(made, adapter, layers)
    assert adapter.router_parameters(made) == names


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_dropped_expert_is_never_chosen_and_stays_so_after_loading(family: str, tmp_path: Path) -> None:
    made, adapter, layers = opened(family)
    dropped = torch.arange(adapter.num_experts(made, layers[0])) == 2
    if (
        family == "deepseek_v3"
    ):  # a group of two experts with one dropped is not taken any more: too few groups are left
        adapter.mask_router(made, layers[0], dropped)
        everything = torch.arange(8) % 2 == 0
        with pytest.raises(ValueError, match=rf"{layers[0]}.*left with 0 to choose 3"):
            adapter.mask_router(made, layers[0], everything)
    else:
        adapter.mask_router(made, layers[0], dropped)
        with pytest.raises(ValueError, match=r"left with 2 to choose 3"):
            adapter.mask_router(made, layers[0], torch.arange(6) > 1)
    merge(made, adapter, layers[1:])
    mcsmoe.save(made, tmp_path / "out")
    for one in (made, mcsmoe.load(tmp_path / "out")):
        with adapter.capture(one) as captured:
            logits(one, batch())
        assert (captured.batches[layers[0]].wanted_TK != 2).all()


def test_a_router_without_a_bias_cannot_be_kept_from_choosing_an_expert() -> None:
    made, adapter, layers = opened("mixtral")
    with pytest.raises(ValueError, match=rf"{layers[0]}.*redirect instead"):
        adapter.mask_router(made, layers[0], torch.arange(6) == 0)


def test_capped_router_logits_are_not_taken_for_raw_ones() -> None:
    made, adapter, layers = opened("laguna")
    with adapter.capture(made) as captured:
        logits(made, batch())
    for layer in layers:
        routed, router = captured.batches[layer], adapter.read_router(made, layer)
        assert routed.logits_TE.abs().max() > 1  # above the cap of this model
        assert (routed.inputs_TD @ router.weight_ED.T - routed.logits_TE).abs().max() < 1e-5


def test_capture_keeps_the_graph_of_logits_on_request_and_forgets_the_last_batch() -> None:
    made, adapter, layers = opened("olmoe")
    with adapter.capture(made, detach=False) as captured:
        made(**batch())
        captured.batches[layers[0]].logits_TE.sum().backward()
        assert made.get_submodule(layers[0]).gate.weight.grad.abs().sum() > 0
        made(**batch(rows=2))
        assert captured.batches[layers[0]].inputs_TD.shape[0] == 2 * 11
    with torch.no_grad():
        made(**batch())
    assert captured.batches[layers[0]].inputs_TD.shape[0] == 2 * 11


def test_without_a_mask_all_positions_count_and_a_mask_of_other_shape_is_refused() -> None:
    made, adapter, layers = opened("mixtral")
    inputs = batch()
    with adapter.capture(made) as captured, torch.no_grad():
        made(inputs["input_ids"])
        assert captured.batches[layers[0]].valid_T.sum() == 55
        with pytest.raises(ValueError, match=rf"{layers[0]}.*\(5, 1, 11, 11\).*rows x tokens"):
            made(inputs["input_ids"], attention_mask=torch.ones(5, 1, 11, 11, dtype=torch.bool))


# -- refusals ----------------------------------------------------------------------------------------------------
REFUSED = {
    "longcat_flash": ("LongcatFlashConfig", "LongcatFlashForCausalLM", "256 of its experts have no weights"),
    "zaya": ("ZayaConfig", "ZayaForCausalLM", "not one linear map"),
    "jetmoe": ("JetMoeConfig", "JetMoeForCausalLM", "JetMoeParallelExperts.*no adapter"),
}


@pytest.mark.parametrize("family", list(REFUSED))
def test_families_that_cannot_be_treated_exactly_are_refused_by_name_with_the_reason(family: str) -> None:
    import transformers
    from transformers.initialization import no_init_weights

    config, cls, message = REFUSED[family]
    with torch.device("meta"), no_init_weights():
        made = getattr(transformers, cls)(getattr(transformers, config)())
    with pytest.raises(ValueError, match=rf"(?s){cls}.*{message}.*supported: switch_transformers"):
        adapter_for(made)


def test_a_model_without_experts_is_told_so() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaForCausalLM(LlamaConfig(**(tiny_models.COMMON | {"intermediate_size": 8, "num_hidden_layers": 1})))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*'llama'.*not a Mixture-of-Experts model.*supported"):
        adapter_for(made)


def test_weights_and_structures_that_do_not_fit_are_refused() -> None:
    made, adapter, layers = opened("gpt_oss")
    weights, layer = adapter.read_experts(made, layers[0]), layers[0]
    with pytest.raises(ValueError, match=rf"{layer}.*1 experts for 6.*expert_to_group"):
        adapter.write_experts(made, layer, weights.select(torch.tensor([0])))
    with pytest.raises(ValueError, match=rf"{layer}.*expert 5 goes to group 7"):
        adapter.write_experts(made, layer, weights, torch.tensor([0, 1, 2, 3, 4, 7]))
    narrow = weights.map(lambda n, t: t.narrow(a, 0, 8) if (a := weights.neuron_axis(n)) is not None else t)
    with pytest.raises(ValueError, match=r"'gate' is \(8, 16\).*needs \(24, 16\)"):
        adapter.write_experts(made, layer, narrow)
    with pytest.raises(ValueError, match=rf"{layer}.*biases \['down_bias', 'gate_bias', 'up_bias'\] are needed"):
        adapter.write_compressed(made, layer, factors(weights, 2), {}, torch.arange(6))
    with pytest.raises(ValueError, match=r"nowhere.*not a sparse layer"):
        adapter.read_experts(made, "nowhere")
    with pytest.raises(ValueError, match=rf"{layer}.*shape \(2,\), not \(6,\)"):
        adapter.install(made, layer, LayerSpec(2, [0, 1]))
    adapter.write_compressed(made, layer, factors(weights, 2), biases(weights), torch.arange(6))
    with pytest.raises(ValueError, match=rf"{layer}.*is compressed"):
        adapter.write_experts(made, layer, weights)
