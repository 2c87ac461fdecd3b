"""The paper's parameter counts from real run-time modules, and files, memory and gradients that agree with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_switch
import torch
from torch import Tensor, nn

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.compress.lowrank import factored_parameters
from mcsmoe.modules import LowRankProjection, PackedProjection, RedirectedExperts, dense_projections
from mcsmoe.types import CompressionSpec, ExpertWeights, LayerSpec, LowRankFactors, Role

BASE_32 = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_ff": 3072,
    "d_kv": 64,
    "num_heads": 12,
    "num_experts": 32,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
}
# The same depth, experts and proportions at a quarter of the width.
SCALED = BASE_32 | {"vocab_size": 2008, "d_model": 192, "d_ff": 768, "d_kv": 16}


def empty(shape: dict[str, int], groups: int, rank: int = 0, device: str = "meta") -> nn.Module:
    """A model whose first sparse layer is stock and whose others have ``groups`` groups (and, with ``rank``, a tenth
    of their residual's rows)."""
    from transformers import SwitchTransformersForConditionalGeneration
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        made = SwitchTransformersForConditionalGeneration(tiny_switch.config(**shape))
    made.tie_weights()
    adapter = adapter_for(made)
    experts = shape["num_experts"]
    for layer in adapter.layers(made)[1:] if groups < experts or rank else []:
        kept = {"wi": [round(shape["d_ff"] / 10)] * groups, "wo": [round(shape["d_model"] / 10)] * groups}
        compression = CompressionSpec(rank, kept) if rank else None
        adapter.install(made, layer, LayerSpec(groups, [expert % groups for expert in range(experts)], compression))
    return made


def parameters(made: nn.Module) -> int:
    return sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize(
    ("millions", "groups", "rank"),
    [(1978.5, 32, 0), (732.8, 8, 0), (380.7, 8, 32), (570.2, 32, 32)],
    ids=["full", "merged", "merged and compressed", "compressed alone"],
)
def test_parameters_of_switch_base_32_are_the_papers(millions: float, groups: int, rank: int) -> None:
    counted = parameters(empty(BASE_32, groups, rank)) / 1e6
    assert counted == pytest.approx(millions, rel=1e-3)
    # Closed form: what is no expert, one full layer, and eleven of the form in question.
    one = 2 * 768 * 3072
    if rank:
        one = factored_parameters(3072, 768, rank, 0.1) + factored_parameters(768, 3072, rank, 0.1)
    outside = 1978.5e6 - 12 * 32 * 2 * 768 * 3072
    assert counted == pytest.approx((outside + 32 * 2 * 768 * 3072 + 11 * groups * one) / 1e6, rel=1e-3)


def fill(made: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and row numbers that are in range."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    for module in made.modules():
        if isinstance(module, PackedProjection):
            out = module.shape[1]
            rows = [torch.randperm(out, generator=generator)[:kept].sort()[0] for kept in module.kept_rows]
            module.row_index_N.copy_(torch.cat(rows))
    return made


@pytest.mark.parametrize(
    ("groups", "rank", "dtype"),
    [
        (32, 0, torch.float32),
        (8, 0, torch.float32),
        (8, 8, torch.float32),
        (8, 8, torch.bfloat16),
        (32, 8, torch.bfloat16),
    ],
)
def test_files_are_the_parameters_and_nothing_more(groups: int, rank: int, dtype: torch.dtype, tmp_path: Path) -> None:
    made = fill(empty(SCALED, groups, rank, device="cpu")).to(dtype)
    mcsmoe.save(made, tmp_path / "out")
    promised = parameters(made) * dtype.itemsize
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert stored == pytest.approx(promised, rel=0.01)


_RESIDENT = """
import sys, re
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
from transformers import SwitchTransformersForConditionalGeneration
import mcsmoe.checkpoint, mcsmoe.adapters.registry
mcsmoe.adapters.registry.adapters()

def resident():
    status = Path("/proc/self/status").read_text()
    return [int(re.search(rf"^{name}:\\s+(\\d+) kB", status, re.M)[1]) * 1024 for name in ("VmRSS", "VmHWM")]

mcsmoe.load(sys.argv[1])  # a tiny one: what libraries take the first time is not the model's
before = resident()[0]
model = mcsmoe.load(sys.argv[2])
after, peak = resident()
print(before, after, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("rank", [0, 8])
def test_a_loaded_model_is_as_large_in_memory_as_on_disk(rank: int, tmp_path: Path) -> None:
    tiny = SCALED | {"d_model": 16, "d_ff": 24, "vocab_size": 96}
    mcsmoe.save(fill(empty(tiny, 8, 2 if rank else 0, device="cpu")), tmp_path / "tiny")
    mcsmoe.save(fill(empty(SCALED, 8, rank, device="cpu")), tmp_path / "out")
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    line = [sys.executable, "-c", _RESIDENT, str(tmp_path / "tiny"), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    before, after, peak = (int(word) for word in done.stdout.split())
    assert after <= 1.1 * (stored + before)
    # Stricter: the model's own share is its files, and loading never holds it twice.
    assert after - before <= 1.1 * stored
    assert peak - before <= 1.2 * stored


# -- gradients ---------------------------------------------------------------------------------------------------
D, F, G, E, T = 5, 6, 3, 5, 7
TABLE = torch.tensor([0, 1, 2, 1, 0])
GATED = {"gate": Role.INPUT, "up": Role.INPUT, "down": Role.OUTPUT}
PLAIN = {"wi": Role.INPUT, "wo": Role.OUTPUT}


def silu_gate(outputs: dict[str, Tensor]) -> Tensor:
    return nn.functional.silu(outputs["gate"]) * outputs["up"]


def gelu(outputs: dict[str, Tensor]) -> Tensor:
    return nn.functional.gelu(outputs["wi"])


ACTIVATIONS = {"gated": (GATED, silu_gate), "plain": (PLAIN, gelu)}


def experts(kind: str, form: str) -> RedirectedExperts:
    generator = torch.Generator().manual_seed(2)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    roles, activation = ACTIVATIONS[kind]
    shapes = {name: (F, D) if role is Role.INPUT else (D, F) for name, role in roles.items()}
    if form == "dense":
        tensors = {name: draw(G, *shape) for name, shape in shapes.items()}
        all_roles = dict(roles)
        for name, shape in shapes.items():  # biases as some families have them
            tensors[f"{name}_bias"] = draw(G, shape[0])
            all_roles[f"{name}_bias"] = Role.INPUT_BIAS if roles[name] is Role.INPUT else Role.OUTPUT_BIAS
        projections = dense_projections(ExpertWeights(tensors, all_roles))
    else:
        projections = {}
        for name, (out, inner) in shapes.items():
            residual_Goi = draw(G, out, inner)
            residual_Goi[0, ::2] = 0
            residual_Goi[1] = 0
            made = LowRankProjection(LowRankFactors(draw(G, out, 2), draw(G, 2, inner), residual_Goi), draw(G, out))
            projections[name] = made.packed() if form == "packed" else made
    return RedirectedExperts(projections, roles, activation, TABLE)


def plain_sum(module: RedirectedExperts, hidden_TD: Tensor, expert_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The definition, token by token, from differentiable dense weights."""

    def dense(name: str) -> Tensor:
        projection = module.projection(name)
        if hasattr(projection, "weight_Goi"):
            return projection.weight_Goi
        made = projection.u_GoR @ projection.v_GRi
        if hasattr(projection, "residual_Goi"):
            return made + projection.residual_Goi
        groups = torch.repeat_interleave(torch.arange(G), torch.tensor(projection.kept_rows))
        return made.index_put((groups, projection.row_index_N.long()), projection.residual_rows_Ni, accumulate=True)

    rows = []
    for token in range(T):
        total = torch.zeros(D, dtype=torch.float64)
        for choice in range(expert_TK.shape[1]):
            if expert_TK[token, choice] < 0:
                continue
            group = TABLE[expert_TK[token, choice]]
            outputs = {
                name: dense(name)[group] @ hidden_TD[token] + module.projection(name).bias_Go[group]
                for name in module.inputs
            }
            hidden_F = module.activation(outputs)
            output_D = dense(module.output)[group] @ hidden_F + module.projection(module.output).bias_Go[group]
            total = total + weights_TK[token, choice] * output_D
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["dense", "trainable", "packed"])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_gradients_are_those_of_the_dense_equivalent(kind: str, form: str) -> None:
    module = experts(kind, form)
    generator = torch.Generator().manual_seed(4)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(T, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    # Token 0 chooses two experts of one group, token 1 is over capacity once, token 2 twice.
    expert_TK = torch.tensor([[0, 4], [-1, 2], [-1, -1], [1, 3], [2, 0], [4, 1], [3, 2]])
    inputs = [hidden_TD, weights_TK, *module.parameters()]
    assert torch.allclose(module(hidden_TD, expert_TK, weights_TK), plain_sum(module, hidden_TD, expert_TK, weights_TK))

    def run(hidden: Tensor, weights: Tensor, *_parameters: Tensor) -> Tensor:
        return module(hidden, expert_TK, weights)

    assert torch.autograd.gradcheck(run, inputs)
    seed_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((run(*inputs) * seed_TD).sum(), inputs)
    want = torch.autograd.grad((plain_sum(module, hidden_TD, expert_TK, weights_TK) * seed_TD).sum(), inputs)
    for one, two in zip(got, want, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_half_precision_runs_forward_and_backward(form: str, dtype: torch.dtype) -> None:
    module = experts("gated", form)
    generator = torch.Generator().manual_seed(4)
    hidden_TD, weights_TK = (torch.rand(T, n, generator=generator, dtype=torch.float64) for n in (D, 2))
    expert_TK = torch.tensor([[0, 4], [1, 2], [2, 1], [1, 3], [2, 0], [4, 1], [3, 2]])
    exact = module(hidden_TD, expert_TK, weights_TK)
    module = module.to(dtype)
    found = module(hidden_TD.to(dtype), expert_TK, weights_TK.to(dtype))
    assert found.dtype is dtype
    assert (found.double() - exact).abs().max() < 0.05 * exact.abs().max()
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_merging_halves_no_choice_of_a_real_gated_model() -> None:
    """Two of a token's experts in one group: computed once, with the summed weight, as the family would."""
    made = tiny_models.model("mixtral")
    adapter = adapter_for(made)
    layer = adapter.layers(made)[0]
    weights = adapter.read_experts(made, layer).select(torch.tensor([0, 0, 2, 2, 4, 4]))
    adapter.write_experts(made, layer, weights)
    ids = {"input_ids": torch.arange(2, 20).view(2, 9)}
    before = tiny_switch.logits(made, ids)
    adapter.write_experts(made, layer, weights.select(torch.tensor([0, 2, 4])), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert (tiny_switch.logits(made, ids) - before).abs().max() < 1e-6
