"""The laws every adapter obeys, for NLLB-MoE: two choices, a capacity over the whole batch, output masking, biases."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits, seq2seq_batch
from tiny_models import model as tiny
from torch import Tensor, nn

import mcsmoe
from mcsmoe import modules
from mcsmoe.adapters.base import Adapter
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.types import ExpertWeights, LowRankFactors, Role

ENCODER = ["model.encoder.layers.1.ffn", "model.encoder.layers.3.ffn"]
LAYERS = [*ENCODER, *(f"model.decoder.layers.{index}.ffn" for index in range(3))]
TABLE = torch.tensor([0, 1, 0, 2, 1, 0])
# Logits of this model are of size 1 to 10 (its embeddings are its output matrix).
TOLERANCE = 2e-5
pytestmark = pytest.mark.filterwarnings("ignore:transformers 5.23 lets experts 0 and 1")


def opened(**changes: Any) -> tuple[nn.Module, Adapter]:
    made = tiny("nllb_moe", **changes)
    return made, adapter_for(made)


def average(weights: ExpertWeights) -> ExpertWeights:
    groups = [weights.select((group == TABLE).nonzero()[:, 0]) for group in range(3)]
    return weights.map(lambda name, _: torch.stack([group.tensors[name].mean(0) for group in groups]))


def compressed(made: nn.Module, adapter: Adapter, rank: int, keep: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for layer in LAYERS:
        weights, table = adapter.read_experts(made, layer), adapter.expert_to_group(made, layer)
        parts = {}
        for name in ("fc1", "fc2"):
            u, s, vh = torch.linalg.svd(weights.tensors[name], full_matrices=False)
            u, v = u[..., :rank] * s[:, None, :rank], vh[:, :rank]
            residual = weights.tensors[name] - u @ v
            residual[torch.rand(residual.shape[:2], generator=generator) > keep] = 0
            parts[name] = LowRankFactors(u, v, residual)
        biases = {name: weights.tensors[name] for name in ("fc1_bias", "fc2_bias")}
        adapter.write_compressed(made, layer, parts, biases, table)
    return made


def test_structure() -> None:
    made, adapter = opened()
    assert adapter.layers(made) == LAYERS
    assert {adapter.num_experts(made, layer) for layer in LAYERS} == {6}
    weights = adapter.read_experts(made, LAYERS[0])
    assert (weights.num_experts, weights.width, weights.d_model) == (6, 20, 16)
    assert weights.roles == {
        "fc1": Role.INPUT,
        "fc2": Role.OUTPUT,
        "fc1_bias": Role.INPUT_BIAS,
        "fc2_bias": Role.OUTPUT_BIAS,
    }
    assert adapter.read_router(made, LAYERS[0]).weight_ED.shape == (6, 16)
    names = {name for name, _ in made.named_parameters() if ".router." in name}
    assert set(adapter.router_parameters(made)) == names


def test_the_library_ignores_all_experts_but_two_and_the_repair_is_announced_once() -> None:
    made, inputs = tiny("nllb_moe"), seq2seq_batch()
    layer = made.get_submodule(LAYERS[0])
    plain, state = logits(made, inputs), copy.deepcopy(made.state_dict())

    def without_the_last_four() -> Tensor:
        for expert in range(2, 6):
            layer.experts[f"expert_{expert}"].fc2.weight.data.zero_()
        after = logits(made, inputs)
        made.load_state_dict(state)
        return after

    # If this fails the library was corrected: then the repair can go.
    assert torch.equal(without_the_last_four(), plain)
    with pytest.warns(UserWarning, match="dispatches as published"):
        adapter_for(made)
    repaired = logits(made, inputs)
    assert not torch.equal(repaired, plain)
    assert not torch.equal(without_the_last_four(), repaired)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter_for(made)


def _published(experts: Any, hidden_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """Every expert on every token, weighted; the scale is that of output masking in evaluation."""
    every_ETD = torch.stack([experts[f"expert_{e}"](hidden_TD) for e in range(6)])
    return (1 - experts.moe_token_dropout) * torch.einsum("te,etd->td", weights_TE, every_ETD)


@pytest.mark.parametrize("form", ["stock", "redirected"])
@pytest.mark.parametrize("fraction", [1.0, 0.15])
def test_experts_compute_the_published_sum(form: str, fraction: float) -> None:
    made, adapter = opened(moe_eval_capacity_token_fraction=fraction)
    made.double()
    layer, seen = LAYERS[-1], []
    stock = made.get_submodule(layer).experts
    if form == "redirected":
        adapter.write_experts(made, layer, adapter.read_experts(made, layer), torch.arange(6))
    hook = made.get_submodule(layer).experts.register_forward_hook(lambda _m, i, o: seen.append((i[0], i[2], o)))
    logits(made, seq2seq_batch())
    hook.remove()
    hidden_TD, weights_TE, output_TD = seen[0]
    assert ((weights_TE != 0).sum(dim=1) < 2).any() == (fraction < 1)
    with torch.no_grad():
        assert (output_TD - _published(stock, hidden_TD, weights_TE)).abs().max() < 1e-12


def test_read_then_write_changes_no_logit() -> None:
    (made, adapter), inputs = opened(), seq2seq_batch()
    before = logits(made, inputs)
    stock = {layer: adapter.read_experts(made, layer) for layer in LAYERS}
    for layer in LAYERS:
        adapter.write_experts(made, layer, stock[layer].map(lambda _, t: torch.zeros_like(t)))
    assert (logits(made, inputs) - before).abs().max() > 0.1
    for layer in LAYERS:
        adapter.write_experts(made, layer, stock[layer])
    assert torch.equal(logits(made, inputs), before)
    for layer in LAYERS:
        adapter.write_experts(made, layer, stock[layer], torch.arange(6))
        back = adapter.read_experts(made, layer)
        assert all(torch.equal(back.tensors[name], stock[layer].tensors[name]) for name in back.tensors)
    assert (logits(made, inputs) - before).abs().max() < TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, 1e-12)])
def test_permuting_neurons_changes_no_logit(dtype: torch.dtype, tolerance: float) -> None:
    (made, adapter), inputs = opened(router_dtype="float32"), seq2seq_batch()
    made.to(dtype)
    before = logits(made, inputs)
    for layer in LAYERS:
        weights = adapter.read_experts(made, layer)
        order = torch.randperm(weights.width, generator=torch.Generator().manual_seed(1))
        moved = weights.map(
            lambda name, t, w=weights, o=order: t if (a := w.neuron_axis(name)) is None else t.index_select(a, o)
        )
        adapter.write_experts(made, layer, moved)
    after = logits(made, inputs)
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < tolerance


def test_merging_identical_experts_changes_no_logit() -> None:
    (made, adapter), inputs = opened(), seq2seq_batch()
    leaders = torch.tensor([0, 1, 3])
    for layer in LAYERS:
        adapter.write_experts(made, layer, adapter.read_experts(made, layer).select(leaders).select(TABLE))
    before = logits(made, inputs)
    for layer in LAYERS:
        adapter.write_experts(made, layer, adapter.read_experts(made, layer).select(leaders), TABLE)
        assert torch.equal(adapter.expert_to_group(made, layer), TABLE)
        assert adapter.num_experts(made, layer) == 6
    with adapter_for(made).capture(made) as captured:
        assert (logits(made, inputs) - before).abs().max() < TOLERANCE
    groups = TABLE[torch.cat([captured.batches[layer].wanted_TK for layer in LAYERS])]
    assert (groups[:, 0] == groups[:, 1]).any()


@pytest.mark.parametrize("policy", ["all", "random", "sampling"])
@pytest.mark.parametrize("fraction", [1.0, 0.15])
def test_counts_sum_to_dispatched_tokens_times_choices(policy: str, fraction: float) -> None:
    made, adapter = opened(moe_eval_capacity_token_fraction=fraction, second_expert_policy=policy)
    inputs = seq2seq_batch()
    computed: dict[str, Tensor] = {}
    hooks = [
        made.get_submodule(f"{layer}.experts").register_forward_pre_hook(
            lambda _m, i, layer=layer: computed.update({layer: (i[2] != 0).sum(dim=0)})
        )
        for layer in LAYERS
    ]
    torch.manual_seed(0)
    with adapter.capture(made) as captured:
        logits(made, inputs)
    for hook in hooks:
        hook.remove()
    assert list(captured.batches) == LAYERS
    real = {
        layer: int((inputs["attention_mask"] if "encoder" in layer else inputs["labels"] != -100).sum())
        for layer in LAYERS
    }
    for layer, routed in captured.batches.items():
        assert int(routed.valid_T.sum()) == real[layer]
        all_chosen = routed.chosen_TK[routed.chosen_TK >= 0]
        assert torch.equal(torch.bincount(all_chosen, minlength=6), computed[layer])
        seen = routed.only_valid()
        dropped = int((seen.chosen_TK < 0).sum())
        counted = torch.bincount(seen.chosen_TK[seen.chosen_TK >= 0], minlength=6).sum()
        assert int(counted) + dropped == 2 * real[layer]
        assert (dropped > 0) == (fraction < 1 or policy == "random")
        if fraction < 1:  # the decoder routes its unlabelled positions too
            tokens = routed.valid_T.shape[0]
            assert computed[layer].max() <= -(-tokens * 15 // 100)
        router = adapter.read_router(made, layer)
        assert (routed.inputs_TD @ router.weight_ED.T - routed.logits_TE).abs().max() < 1e-5
        assert torch.equal(routed.wanted_TK[:, 0], routed.logits_TE.argmax(dim=1))
        if policy != "sampling":
            assert torch.equal(routed.wanted_TK, routed.logits_TE.topk(2, dim=1).indices)
        assert (routed.wanted_TK[:, 0] != routed.wanted_TK[:, 1]).all()
        assert torch.equal(routed.weights_TK != 0, routed.chosen_TK >= 0)


def test_padding_is_not_routed() -> None:
    (made, adapter), inputs = opened(), seq2seq_batch()
    with adapter.capture(made) as captured:
        logits(made, inputs)
    for layer in ENCODER:
        routed = captured.batches[layer]
        assert (routed.chosen_TK[~routed.valid_T] == -1).all()
        assert (routed.chosen_TK[routed.valid_T] >= 0).all()


def test_a_dropped_expert_is_never_chosen_and_stays_so_after_loading(tmp_path: Path) -> None:
    (made, adapter), inputs = opened(), seq2seq_batch()
    adapter.write_experts(made, LAYERS[0], average(adapter.read_experts(made, LAYERS[0])), TABLE)
    adapter.mask_router(made, LAYERS[1], torch.arange(6) < 3)
    mcsmoe.save(made, tmp_path / "out")
    for one in (made, mcsmoe.load(tmp_path / "out")):
        with adapter.capture(one) as captured:
            logits(one, inputs)
        assert captured.batches[LAYERS[1]].wanted_TK.min() == 3
        assert captured.batches[LAYERS[0]].wanted_TK.min() == 0
    with pytest.raises(ValueError, match="fewer than 2 experts are kept"):
        adapter.mask_router(made, LAYERS[1], torch.arange(6) < 5)


@pytest.mark.parametrize("form", ["merged", "compressed"])
def test_an_exact_form_changes_no_logit_generates_trains_and_runs_in_bfloat16(form: str) -> None:
    (made, adapter), inputs = opened(), seq2seq_batch()
    before = logits(made, inputs)
    for layer in LAYERS:
        adapter.write_experts(made, layer, adapter.read_experts(made, layer), torch.arange(6))
    if form == "compressed":
        compressed(made, adapter, 4)
        assert (logits(made, inputs) - before).abs().max() < TOLERANCE
        modules.pack(made)
    assert (logits(made, inputs) - before).abs().max() < TOLERANCE
    prompt = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    with adapter.capture(made) as captured, torch.no_grad():
        text = made.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert captured.batches[LAYERS[-1]].valid_T.tolist() == [True]
        again = made(**prompt, decoder_input_ids=text[:, :-1]).logits.argmax(dim=-1)
    assert torch.equal(again[0, 1:3], text[0, 2:4])
    made.train()
    # Enough tokens for every expert, and the stock capacity of training.
    loss = made(**seq2seq_batch(rows=9, length=24, labels=20)).loss
    loss.backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is None] == []
    low = made.to(torch.bfloat16).eval()
    assert (logits(low, inputs) - before).abs().max() < 0.3


def test_output_masking_scales_in_evaluation_and_drops_in_training() -> None:
    made, adapter = opened(moe_token_dropout=0.5)
    layer = LAYERS[0]
    adapter.write_experts(made, layer, average(adapter.read_experts(made, layer)), TABLE)
    experts, weights = made.get_submodule(layer).experts, adapter.read_experts(made, layer)
    hidden = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    share = torch.zeros(400, 6)
    share[:, 4] = 1.0
    fc1 = (hidden @ weights.tensors["fc1"][1].T + weights.tensors["fc1_bias"][1]).relu()
    plain = fc1 @ weights.tensors["fc2"][1].T + weights.tensors["fc2_bias"][1]
    with torch.no_grad():
        assert (experts(hidden, share, share) - 0.5 * plain).abs().max() < 1e-5
        experts.train()
        torch.manual_seed(0)
        ratio = experts(hidden, share, share) / plain
    kept = ratio.abs() > 1e-3
    assert (ratio[kept] - 2).abs().max() < 1e-2
    assert 0.45 < kept.float().mean() < 0.55


@pytest.mark.parametrize("form", ["merged", "trainable", "packed"])
def test_gradients_agree_with_finite_differences(form: str) -> None:
    made, adapter = opened()
    made.double()
    for layer in LAYERS:
        adapter.write_experts(made, layer, average(adapter.read_experts(made, layer)), TABLE)
    if form != "merged":
        compressed(made, adapter, 3, keep=0.5)
    if form == "packed":
        modules.pack(made)
    experts = made.get_submodule(LAYERS[-1]).experts.requires_grad_(True)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(4, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    places = (torch.arange(4)[:, None].expand(4, 2), torch.tensor([[0, 2], [1, 3], [5, 4], [2, 5]]))
    weights = torch.rand(4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in experts.named_parameters()]

    def run(hidden: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        share = torch.zeros(4, 6, dtype=torch.float64).index_put(places, weights)
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (hidden, share, share))

    assert torch.autograd.gradcheck(run, (hidden, weights, *experts.parameters()), fast_mode=True)


@pytest.mark.parametrize("form", ["stock", "merged", "compressed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_then_load_gives_the_same_bits(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    (made, adapter), inputs = opened(), seq2seq_batch()
    if form != "stock":
        for layer in LAYERS:
            adapter.write_experts(made, layer, average(adapter.read_experts(made, layer)), TABLE)
    if form == "compressed":
        modules.pack(compressed(made, adapter, 3, keep=0.4))
    made.to(dtype)
    before = logits(made, inputs)
    mcsmoe.save(made, tmp_path / "out")
    back = mcsmoe.load(tmp_path / "out")
    assert torch.equal(logits(back, inputs), before)


def test_weights_that_do_not_fit_are_refused() -> None:
    made, adapter = opened()
    weights = adapter.read_experts(made, LAYERS[0])
    with pytest.raises(ValueError, match=rf"{LAYERS[0]}.*1 experts for 6"):
        adapter.write_experts(made, LAYERS[0], weights.select(torch.tensor([0])))
    with pytest.raises(ValueError, match=r"'fc1' is \(20, 16\).*needs \(24, 16\)"):
        adapter.write_experts(made, LAYERS[-1], weights)
    with pytest.raises(ValueError, match=r"nowhere.*not a sparse layer"):
        adapter.read_experts(made, "nowhere")
