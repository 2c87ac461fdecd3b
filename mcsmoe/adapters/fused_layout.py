"""How a family stacks its experts, found from the module itself: gate beside up or between, transposed, biased.

Also says, by name and with the reason, what cannot be treated exactly.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.redirecting import ExpertShape
from mcsmoe.modules import RedirectedExperts
from mcsmoe.types import ExpertWeights, Role

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_FLAT = ("w1", "v1", "w2")  # gate, up and down of all experts, one below the other


@dataclass(frozen=True)
class Layout:
    """Where the matrices of an experts module are: the flags of transformers' own experts interface."""

    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool

    @classmethod
    def of(cls, experts: Any) -> Layout:
        if flat_matrices(experts) is not None:
            return FlatLayout(gated=True, biased=False, transposed=False, interleaved=False)
        flags = {name: getattr(experts, name, None) for name in _FLAGS}
        if None in flags.values():  # a family that does not use the interface: gate before up, without biases
            first, down = experts.gate_up_proj.shape, experts.down_proj.shape
            transposed = first[1] == down[2] and first[2] == 2 * down[1]
            flags = {"has_gate": True, "has_bias": False, "is_transposed": transposed, "is_concatenated": True}
        gated = bool(flags["has_gate"])
        return cls(gated, bool(flags["has_bias"]), bool(flags["is_transposed"]), gated and not flags["is_concatenated"])

    @property
    def first(self) -> str:
        """Name of the parameter that holds the input projections."""
        return "gate_up_proj" if self.gated else "up_proj"

    def dimensions(self, experts: Any) -> tuple[int, int]:
        """(E, D): how many experts the router chooses among, and the width they read."""
        first = getattr(experts, self.first)
        return first.shape[0], first.shape[1 if self.transposed else 2]

    def activation(self, experts: Any) -> Any:
        """The function of the gate, or of the input projection where there is none."""
        return experts.act_fn

    def views(self, experts: Any) -> dict[str, Tensor]:
        """Canonical views [E, F, D], [E, D, F], [E, F], [E, D] into the module's own parameters, by tensor name."""
        made: dict[str, Tensor] = {}
        first, down = getattr(experts, self.first), experts.down_proj
        if self.transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        made |= self._split(first, "") | {"down": down}
        if self.biased:
            made |= self._split(getattr(experts, f"{self.first}_bias"), "_bias") | {"down_bias": experts.down_proj_bias}
        return {name: tensor.detach() for name, tensor in made.items()}

    def _split(self, joined: Tensor, suffix: str) -> dict[str, Tensor]:
        """Axis 1 of ``joined`` holds gate and up, or up alone."""
        if not self.gated:
            return {f"up{suffix}": joined}
        if self.interleaved:
            return {f"gate{suffix}": joined[:, ::2], f"up{suffix}": joined[:, 1::2]}
        width = joined.shape[1] // 2
        return {f"gate{suffix}": joined[:, :width], f"up{suffix}": joined[:, width:]}

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """[..., 2F]: outputs of gate and up as the family's own ``_apply_gate`` expects them."""
        if self.interleaved:
            return torch.stack([gate, up], dim=-1).flatten(-2)
        return torch.cat([gate, up], dim=-1)

    def shape(self, experts: Any) -> ExpertShape:
        """Shapes and roles of one expert."""
        views = self.views(experts)
        roles: dict[str, Role] = {name: Role.INPUT for name in ("gate", "up") if name in views} | {"down": Role.OUTPUT}
        matrices = {name: (views[name].shape[1], views[name].shape[2]) for name in roles}
        return ExpertShape(matrices, roles, tuple(roles) if self.biased else ())

    def read(self, experts: Any) -> ExpertWeights:
        """Detached copies in canonical orientation."""
        return self.view(experts).map(lambda _, tensor: tensor.clone(memory_format=torch.contiguous_format))

    def view(self, experts: Any) -> ExpertWeights:
        """The layer's own numbers in canonical orientation, detached."""
        return ExpertWeights(self.views(experts), self.shape(experts).all_roles())


class FlatLayout(Layout):
    """Matrices [E * F, D] of all experts one below the other, the output projection too (DBRX)."""

    def dimensions(self, experts: Any) -> tuple[int, int]:
        inside: Any = flat_matrices(experts)
        return int(experts.num_experts), int(inside.w1.shape[1])

    def activation(self, experts: Any) -> Any:
        return flat_matrices(experts).activation_fn  # type: ignore[union-attr]

    def views(self, experts: Any) -> dict[str, Tensor]:
        inside: Any = flat_matrices(experts)
        gate, up, down = (getattr(inside, name).detach().unflatten(0, (experts.num_experts, -1)) for name in _FLAT)
        return {"gate": gate, "up": up, "down": down.transpose(1, 2)}


def flat_matrices(experts: nn.Module) -> nn.Module | None:
    """The child of ``experts`` that holds the matrices of all experts one below the other, if that is how they are kept."""
    for child in experts.children():
        own = child._parameters
        if set(own) >= set(_FLAT) and hasattr(experts, "num_experts"):
            shapes = {tuple(tensor.shape) for name in _FLAT if (tensor := own[name]) is not None}
            if len(shapes) == 1 and len(next(iter(shapes))) == 2:
                return child
    return None


def scales_inputs(experts: nn.Module) -> bool:
    """Whether ``experts`` are called with every token for every expert, scaled by its score beforehand (Llama-4)."""
    if flat_matrices(experts) is not None or not is_stacked_experts(experts):
        return False
    arguments = [name for name in inspect.signature(type(experts).forward).parameters if name != "self"]
    return arguments == ["hidden_states"] and not hasattr(experts, "_apply_gate")


class FamilyActivation:
    """The family's own gate, from the outputs of the input projections; keeps none of the experts' weights alive."""

    def __init__(self, experts: Any) -> None:
        self.layout = Layout.of(experts)
        gate = getattr(type(experts), "_apply_gate", None)
        self.plain = gate is None or gate.__name__ == "_default_apply_gate" or not self.layout.gated
        self.function: Any = self.layout.activation(experts) if self.plain else None
        # The gate may use attributes of the module (limits, activation), so it is kept, emptied of its weights.
        self.module = copy.copy(experts)
        self.module.__dict__["_parameters"] = {}
        self.module.__dict__["_modules"] = {
            name: child for name, child in experts._modules.items() if child is not flat_matrices(experts)
        }

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        if not self.layout.gated:
            return self.function(outputs["up"])
        if self.function is not None:
            return self.function(outputs["gate"]) * outputs["up"]
        return self.module._apply_gate(self.layout.join(outputs["gate"], outputs["up"]))


@dataclass(frozen=True)
class RouterPlace:
    """Where the linear map of a router is: its module inside the block, and the module that holds weight and bias."""

    path: str
    linear: str
    plain: bool = True  # False: it has further parameters, so what it returns must be seen to be the logits


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether ``module`` itself stores stacked ``down_proj`` with ``gate_up_proj``, or with ``up_proj`` and no gate."""
    if flat_matrices(module) is not None:
        return True
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    first = "up_proj" if getattr(module, "has_gate", None) is False else "gate_up_proj"
    return all(name in own and own[name].ndim == 3 for name in (first, "down_proj"))


def experts_problem(experts: Any) -> str | None:
    """Why these stacked experts cannot be treated exactly, or None."""
    arguments = [p for p in inspect.signature(type(experts).forward).parameters if p not in ("self", "kwargs")]
    flat, scaled = flat_matrices(experts), scales_inputs(experts)
    flagged = all(hasattr(experts, name) for name in _FLAGS)
    if arguments != ["args"] and len(arguments) != 3 and not scaled:
        return f"its experts are called with ({', '.join(arguments)}), not with the experts chosen for each token"
    if getattr(experts, "zero_expert_num", 0):
        return (
            f"{experts.zero_expert_num} of its experts have no weights and give back their inputs, which a redirect table "
            "cannot say"
        )
    if not flagged and not hasattr(experts, "_apply_gate") and flat is None and not scaled:
        return "its experts say neither how they are laid out nor how they gate"
    if getattr(experts, "has_post_expert_norm", False):
        return "its experts end in a normalisation, so the output is not linear in the output projection"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over devices; load the model without expert parallelism"
    if flat is not None:
        first = flat._parameters["w1"]
        if first is None or first.shape[0] % experts.num_experts:
            return f"its stacked matrices cannot be divided into {experts.num_experts} experts"
        return None if first.is_floating_point() else f"its experts are quantised ({first.dtype})"
    layout = Layout.of(experts)
    first, down = getattr(experts, layout.first), experts.down_proj
    if not first.is_floating_point() or first.element_size() < 2:
        return f"its experts are quantised ({first.dtype}); load them as bfloat16 or float32"
    if first.shape[0] != down.shape[0]:
        return f"it stacks {first.shape[0]} input but {down.shape[0]} output projections (experts without weights)"
    axis = 1 if layout.transposed else 2
    if first.shape[3 - axis] != down.shape[axis] * (1 + layout.gated) or first.shape[axis] != down.shape[3 - axis]:
        return f"its stacked shapes {tuple(first.shape)} and {tuple(down.shape)} do not fit its layout flags"
    if any(True for child in experts.children() for _ in child.parameters()):
        return "its experts share trained parameters outside their matrices"
    return None


def find_router(block: nn.Module, experts: nn.Module, num_experts: int, d_model: int) -> RouterPlace | str:
    """The one linear map from the experts' own inputs to their scores, or why there is none."""
    problems: list[str] = []
    for path, module in block.named_children():
        if module is experts or not (path in ("gate", "router") or "Router" in type(module).__name__):
            continue
        parameters = dict(module.named_parameters())
        matrices = [name for name, tensor in parameters.items() if tensor.ndim == 2 and min(tensor.shape) > 1]
        weight = parameters[matrices[0]] if len(matrices) == 1 else None
        if weight is None:
            problems.append(f"its router {path!r} is not one linear map (it has {matrices})")
        elif weight.shape[1] != d_model or weight.shape[0] - num_experts not in (0, _shared(module)):
            problems.append(
                f"its router {path!r} maps {weight.shape[1]} features to {weight.shape[0]} scores, while "
                f"{num_experts} experts read {d_model} features"
            )
        else:
            linear = matrices[0].rpartition(".")[0]
            bias = f"{linear}.bias" if linear else "bias"
            # A correction of the choice (one number per expert) changes no logit; anything else may.
            extra = sorted(
                other
                for other, tensor in parameters.items()
                if other not in (matrices[0], bias) and (tensor.numel() != num_experts or "bias" not in other)
            )
            if all(parameters[name].ndim <= 1 for name in extra):
                # What a linear map of its own reads can be seen, whatever is done to it before.
                return RouterPlace(path, linear, plain=not extra or bool(linear))
            problems.append(f"its router {path!r} is more than one linear map (it also has {extra})")
    return problems[0] if problems else "no router was found beside its experts"


def _shared(router: nn.Module) -> int:
    """Rows of a router behind those of the routed experts: scores of shared ones."""
    return int(getattr(router, "n_shared_experts", 0) or 0)


def expert_children(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Direct children that are stacked experts, stock or redirected."""
    return [
        (name, child)
        for name, child in block.named_children()
        if isinstance(child, RedirectedExperts) or is_stacked_experts(child)
    ]
