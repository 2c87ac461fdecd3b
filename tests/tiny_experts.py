"""Small stacked experts of every layout, and what they compute. Not a test module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from mcsmoe.types import ExpertWeights, Role

LAYOUTS = ("plain", "biased", "gated", "gated-biased")


def activation(outputs: Mapping[str, Tensor]) -> Tensor:
    """relu(wi), or silu(gate) * up."""
    return outputs["wi"].relu() if "wi" in outputs else functional.silu(outputs["gate"]) * outputs["up"]


def experts(layout: str = "plain", count: int = 6, width: int = 12, d_model: int = 5, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    inputs, output = (("gate", "up"), "down") if "gated" in layout else (("wi",), "wo")
    shapes: dict[str, tuple[Role, tuple[int, ...]]] = dict.fromkeys(inputs, (Role.INPUT, (width, d_model)))
    shapes[output] = (Role.OUTPUT, (d_model, width))
    if "biased" in layout:
        shapes |= {f"{name}_bias": (Role.INPUT_BIAS, (width,)) for name in inputs}
        shapes[f"{output}_bias"] = (Role.OUTPUT_BIAS, (d_model,))
    return ExpertWeights(
        {name: torch.randn(count, *shape, generator=generator) for name, (_, shape) in shapes.items()},
        {name: role for name, (role, _) in shapes.items()},
    )


def compute(weights: ExpertWeights, expert: int, inputs_TD: Tensor) -> Tensor:
    """[T, D]: output of one expert."""
    (output,) = weights.names(Role.OUTPUT)
    bias = weights.tensors.get(f"{output}_bias")
    hidden_TF = weights.hidden(expert, inputs_TD, activation)
    return functional.linear(hidden_TF, weights.tensors[output][expert], None if bias is None else bias[expert])


def orders(count: int, width: int, seed: int = 0) -> Tensor:
    """[E, F]: a random permutation for each expert."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(width, generator=generator) for _ in range(count)])


def tokens(counts: list[int], d_model: int = 5, seed: int = 0) -> list[Tensor]:
    """For each expert that many inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, d_model, generator=generator) for count in counts]


def difference(first: ExpertWeights, second: ExpertWeights) -> float:
    assert first.roles == second.roles
    return max(float((first.tensors[name] - second.tensors[name]).abs().max()) for name in first.tensors)
