"""Models of stacked experts in their merged and compressed forms, and one token through one expert by hand."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import model
from torch import Tensor, nn
from torch.nn import functional

from mcsmoe.adapters.base import Adapter
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.types import ExpertWeights, LowRankFactors, Role


def opened(family: str, **changes: Any) -> tuple[nn.Module, Adapter, list[str]]:
    made = model(family, **changes)
    adapter = adapter_for(made)
    return made, adapter, adapter.layers(made)


def double(made: Any) -> None:
    """float64 everywhere; the grouped matrix product of torch has no float64."""
    made.double()
    made.set_experts_implementation("eager")


def cast(made: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In ``dtype`` as it is after loading: what no file holds, such as rotary frequencies, stays in float32, and what the
    family keeps there, such as the correction of a router's choice."""
    wide = set(getattr(made, "_keep_in_fp32_modules_strict", None) or ())
    kept = {
        (module, name): buffer
        for module in made.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set or name in wide
    }
    made.to(dtype)
    for (module, name), buffer in kept.items():
        setattr(module, name, buffer)
    return made


def factors(weights: ExpertWeights, rank: int) -> dict[str, LowRankFactors]:
    made = {}
    for name in weights.names(Role.INPUT, Role.OUTPUT):
        matrix = weights.tensors[name]
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        u, v = u[..., :rank] * s[:, None, :rank], vh[:, :rank]
        made[name] = LowRankFactors(u.to(matrix), v.to(matrix), (matrix.double() - u @ v).to(matrix))
    return made


def biases(weights: ExpertWeights) -> dict[str, Tensor]:
    return {name: weights.tensors[name] for name in weights.names(Role.INPUT_BIAS, Role.OUTPUT_BIAS)}


def table_of(experts: int) -> Tensor:
    return torch.tensor([0, 1, 0, 2, 1, 0, 2, 1][:experts])


def merge(made: nn.Module, adapter: Adapter, layers: list[str]) -> None:
    """Averages of unlike experts, so that a wrong redirect shows."""
    for layer in layers:
        weights, table = adapter.read_experts(made, layer), table_of(adapter.num_experts(made, layer))
        groups = [
            weights.select((table == group).nonzero()[:, 0]).map(lambda _, t: t.mean(0, keepdim=True))
            for group in range(3)
        ]
        adapter.write_experts(
            made, layer, weights.map(lambda name, _, g=groups: torch.cat([one.tensors[name] for one in g])), table
        )


def compress(made: nn.Module, adapter: Adapter, layers: list[str], rank: int = 3) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        weights, table = adapter.read_experts(made, layer), adapter.expert_to_group(made, layer)
        parts = factors(weights, rank)
        for one in parts.values():
            one.residual_Goi[torch.rand(one.residual_Goi.shape[:2], generator=generator) < 0.7] = 0
        adapter.write_compressed(made, layer, parts, biases(weights), table)


def apart(family: str, state: dict[str, Tensor], layer: str, expert: int) -> dict[str, Tensor]:
    """The matrices of one expert straight from the state dict, by what each family's own code does with them."""
    first, down = state[f"{layer}.experts.gate_up_proj"][expert], state[f"{layer}.experts.down_proj"][expert]
    if family == "gpt_oss":  # x @ W, even columns are the gate
        first_bias = state[f"{layer}.experts.gate_up_proj_bias"][expert]
        return {
            "gate": first[:, 0::2].T,
            "up": first[:, 1::2].T,
            "down": down.T,
            "gate_bias": first_bias[0::2],
            "up_bias": first_bias[1::2],
            "down_bias": state[f"{layer}.experts.down_proj_bias"][expert],
        }
    return {"gate": first[:24], "up": first[24:], "down": down}


def one_token(family: str, parts: dict[str, Tensor], x: Tensor) -> Tensor:
    if family == "gpt_oss":
        gate = (parts["gate"] @ x + parts["gate_bias"]).clamp(max=0.5)
        up = (parts["up"] @ x + parts["up_bias"]).clamp(-0.5, 0.5)
        return parts["down"] @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + parts["down_bias"]
    return parts["down"] @ (functional.silu(parts["gate"] @ x) * (parts["up"] @ x))
