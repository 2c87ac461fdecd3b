"""Merged and compressed stacked experts at work: gradients, training, generation, copies and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_forms import biases, cast, compress, double, factors, merge, one_token, opened
from tiny_models import DECODERS, batch, logits
from torch import Tensor, nn

import mcsmoe
from mcsmoe import modules
from mcsmoe.adapters.base import Adapter
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.types import ExpertWeights, Role

FAMILIES = list(DECODERS)
# Logits of these models are of size 0.1 to 1: another order of the same float32 sums moves them by some 1e-7.
TOLERANCE = 2e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["merged", "compressed"])
def test_generation_with_a_cache_agrees_with_one_pass(family: str, form: str) -> None:
    made, adapter, layers = opened(family)
    merge(made, adapter, layers)
    if form == "compressed":
        compress(made, adapter, layers)
        modules.pack(made)
    prompt = batch(rows=1, length=6)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with adapter.capture(made) as captured, torch.no_grad():
        text = made.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert captured.batches[layers[0]].valid_T.tolist() == [True]
        step = made(text).logits
    assert torch.equal(step[0, 5:9].argmax(dim=1), text[0, 6:10])


# -- run-time layers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_decomposition_changes_no_logit_trainable_or_packed(family: str) -> None:
    made, adapter, layers = opened(family)
    inputs = batch()
    before = logits(made, inputs)
    for layer in layers:
        weights = adapter.read_experts(made, layer)
        experts = torch.arange(weights.num_experts)
        adapter.write_compressed(made, layer, factors(weights, 4), biases(weights), experts)
        back = adapter.read_experts(made, layer)
        assert back.roles == weights.roles
        assert all((back.tensors[n] - weights.tensors[n]).abs().max() < 1e-6 for n in back.tensors)
    assert (logits(made, inputs) - before).abs().max() < TOLERANCE
    assert len(modules.residuals(made)) == 3 * len(layers)
    modules.pack(made)
    assert (logits(made, inputs) - before).abs().max() < TOLERANCE
    assert not modules.residuals(made)


def _layer(family: str, form: str) -> tuple[Any, Adapter, nn.Module, str]:
    made, adapter, layers = opened(family)
    double(made)
    merge(made, adapter, layers)
    if form != "merged":
        compress(made, adapter, layers)
    if form == "packed":
        modules.pack(made)
    return made.get_submodule(f"{layers[0]}.experts"), adapter, made, layers[0]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", ["merged", "trainable", "packed"])
def test_gradients_agree_with_finite_differences_and_with_the_dense_equivalent(family: str, form: str) -> None:
    experts, adapter, made, layer = _layer(family, form)
    experts.requires_grad_(True)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(5, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1, 3], [0, 2, 5], [4, 1, 2], [3, 5, 0], [5, 4, 3]])  # rows 1 to 4 have doubled groups
    names = [name for name, _ in experts.named_parameters()]

    def run(hidden: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, values, (hidden, index, weights))

    inputs = (hidden, weights, *experts.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    # Dense equivalent: every group on every token, weighted by the sum over the token's experts.
    dense = adapter.read_experts(made, layer)
    table = adapter.expert_to_group(made, layer)
    share_TG = torch.zeros(5, 3, dtype=torch.float64).index_put(
        (torch.arange(5)[:, None].expand(5, 3), table[index]), weights, accumulate=True
    )
    parts = [{name: t[group] for name, t in dense.tensors.items()} for group in range(3)]
    expected = torch.stack(
        [sum(share_TG[t, g] * one_token(family, parts[g], hidden[t]) for g in range(3)) for t in range(5)]
    )
    output = experts(hidden, index, weights)
    assert (output - expected).abs().max() < 1e-12
    probe = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((output * probe).sum(), (hidden, weights))
    theirs = torch.autograd.grad((expected * probe).sum(), (hidden, weights))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_a_group_chosen_twice_by_a_token_is_computed_once() -> None:
    experts, *_ = _layer("mixtral", "merged")
    rows: list[int] = []
    plain = experts._expert
    experts._expert = lambda group, inputs: rows.append(len(inputs)) or plain(group, inputs)
    hidden = torch.randn(4, 16, dtype=torch.float64)
    experts(hidden, torch.tensor([[0, 2], [0, 5], [1, 4], [0, 1]]), torch.ones(4, 2, dtype=torch.float64))
    assert rows == [3, 2]


def test_half_precision_sums_the_experts_of_a_token_before_it_rounds() -> None:
    """Independent truth: the outputs of the experts that a token chose, as they are in bfloat16, summed in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, experts, chosen = 64, 16, 8, 6
    weights = ExpertWeights(
        {
            "up": torch.randn(4, 24, width, generator=generator, dtype=torch.float64),
            "down": torch.randn(4, width, 24, generator=generator, dtype=torch.float64),
        },
        {"up": Role.INPUT, "down": Role.OUTPUT},
    ).map(lambda _, tensor: tensor.bfloat16())
    table = torch.arange(experts) % 4
    layer = modules.RedirectedExperts(
        modules.dense_projections(weights), weights.roles, lambda outputs: torch.relu(outputs["up"]), table
    )
    hidden_TD = torch.randn(tokens, width, generator=generator).bfloat16()
    expert_TK = torch.rand(tokens, experts, generator=generator).topk(chosen, dim=1).indices
    weight_TK = torch.rand(tokens, chosen, generator=generator).softmax(dim=1).bfloat16()
    hidden_TGF = torch.relu(torch.einsum("gfd,td->tgf", weights.tensors["up"], hidden_TD))
    output_TGD = torch.einsum("gdf,tgf->tgd", weights.tensors["down"], hidden_TGF).double()
    scale_TG = torch.zeros(tokens, 4, dtype=torch.float64).scatter_add(1, table[expert_TK], weight_TK.double())
    exact_TD = torch.einsum("tg,tgd->td", scale_TG, output_TGD)
    given_TD = layer(hidden_TD, expert_TK, weight_TK)
    # A unit in the last place of bfloat16 is 2^-8 of the value; summing in bfloat16 is off by several of them. An
    # output of an expert may be rounded otherwise by another kernel, so its scale counts where a sum cancels.
    allowed_TD = 2**-8 * exact_TD.abs() + 2**-9 * torch.einsum("tg,tgd->td", scale_TG, output_TGD.abs())
    assert given_TD.dtype is torch.bfloat16
    assert ((given_TD.double() - exact_TD).abs() <= allowed_TD).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["merged", "compressed"])
def test_training_reaches_every_parameter_and_bfloat16_runs(family: str, form: str) -> None:
    made, adapter, layers = opened(family)
    merge(made, adapter, layers)
    if form == "compressed":
        compress(made, adapter, layers)
    inputs = batch(rows=8)
    made.train()
    before = made(**inputs, labels=inputs["input_ids"]).loss
    before.backward()
    silent = [name for name, parameter in made.named_parameters() if parameter.grad is None]
    assert silent == []
    assert all(made.get_submodule(f"{layer}.experts").training for layer in layers)
    made.zero_grad()
    low = made.to(torch.bfloat16)
    loss = low(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite()
    assert abs(loss.item() - before.item()) < 0.1
    with adapter.capture(low) as captured:
        logits(low, inputs)
    assert captured.batches[layers[0]].logits_TE.shape[0] == 88


def test_models_with_redirected_layers_can_be_copied_and_keep_no_stock_weights() -> None:
    for family in ("mixtral", "gpt_oss"):
        made, adapter, layers = opened(family)
        before = sum(p.numel() for p in made.get_submodule(f"{layers[0]}.experts").parameters())
        merge(made, adapter, layers)
        experts = made.get_submodule(f"{layers[0]}.experts")
        assert sum(p.numel() for p in experts.parameters()) * 2 == before
        assert not list(experts.activation.module.parameters())
        again = copy.deepcopy(made)
        assert torch.equal(logits(again, batch()), logits(made, batch()))


# -- checkpoints -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["stock", "merged", "compressed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_then_load_gives_the_same_bits(family: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made, adapter, layers = opened(family)
    cast(made, dtype)
    if form != "stock":
        merge(made, adapter, layers[1:])
    if form == "compressed":
        compress(made, adapter, layers[1:])
        modules.pack(made)
    inputs = batch()
    before = logits(made, inputs)
    mcsmoe.save(made, tmp_path / "out")
    back = mcsmoe.load(tmp_path / "out")
    assert type(back) is type(made)
    assert torch.equal(logits(back, inputs), before)
    if form != "stock":
        assert {n: p.dtype for n, p in back.named_parameters()} == {n: p.dtype for n, p in made.named_parameters()}
        assert set(adapter_for(back).layers(back)) == set(layers)
        mcsmoe.save(back, tmp_path / "again")
        name = "model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
