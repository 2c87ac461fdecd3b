"""Families of transformers 5.23 that stack their experts: Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss and their kin.

They are found by structure: a block whose experts module stores ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` for
all experts and is called with (hidden_states, top_k_index, top_k_weights), beside a router that is one linear map.
Tensors are named ``gate``, ``up`` and ``down``, with ``_bias`` where the family has biases. Shared experts are part of
the block and stay as they are; layers with a dense feed-forward network have no such block and are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mcsmoe.adapters.base import Capture
from mcsmoe.adapters.fused_layout import (
    FamilyActivation,
    Layout,
    RouterPlace,
    expert_children,
    experts_problem,
    find_router,
    is_stacked_experts,
)
from mcsmoe.adapters.redirecting import NEVER, ExpertShape, RedirectingAdapter, detached, newest_positions, recording
from mcsmoe.modules import Projection, RedirectedExperts
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId, Role, RoutedBatch, RouterWeights


class FusedAdapter(RedirectingAdapter):
    """Decoder-only models with stacked experts, gated or not, with or without biases."""

    name: ClassVar[str] = "stacked experts (gate_up_proj, down_proj)"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        blocks = [block for block in model.modules() if expert_children(block)]
        return bool(blocks) and all(cls._problem(block) is None for block in blocks)

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        """Why a model that has stacked experts is not treated, naming the layer; None if it has none or is treated."""
        for path, block in model.named_modules():
            if expert_children(block):
                problem = cls._problem(block)
                if problem is not None:
                    return f"layer {path!r}: {problem}"
        return None

    @staticmethod
    def _problem(block: nn.Module) -> str | None:
        found = expert_children(block)
        if len(found) != 1:
            return f"it has {len(found)} expert modules {[name for name, _ in found]} in one block"
        experts = found[0][1]
        if is_stacked_experts(experts):
            problem = experts_problem(experts)
            if problem is not None:
                return problem
        place = find_router(block, experts, *_dimensions(experts))
        return place if isinstance(place, str) else None

    # -- structure -----------------------------------------------------------------------------------------------
    def layers(self, model: nn.Module) -> list[LayerId]:
        return [path for path, block in model.named_modules() if expert_children(block)]

    def _experts_name(self, model: nn.Module, layer: LayerId) -> str:
        try:
            found = expert_children(model.get_submodule(layer))
        except AttributeError:
            found = []
        if len(found) != 1:
            raise ValueError(f"layer {layer!r} is not a sparse layer of this model; it has {self.layers(model)}")
        return found[0][0]

    def _router(self, model: nn.Module, layer: LayerId) -> RouterPlace:
        experts = self._experts(model, layer)
        place = find_router(model.get_submodule(layer), experts, *_dimensions(experts))
        if isinstance(place, str):
            raise ValueError(f"layer {layer!r}: {place}")
        return place

    def num_experts(self, model: nn.Module, layer: LayerId) -> int:
        return _dimensions(self._experts(model, layer))[0]

    def activation(self, model: nn.Module, layer: LayerId) -> ExpertActivation:
        experts = self._experts(model, layer)
        return experts.activation if isinstance(experts, RedirectedExperts) else FamilyActivation(experts)

    # -- stock experts -------------------------------------------------------------------------------------------
    def _stock_shape(self, experts: nn.Module) -> ExpertShape:
        return Layout.of(experts).shape(experts)

    def _stock_read(self, experts: nn.Module) -> ExpertWeights:
        return Layout.of(experts).read(experts)

    def _stock_write(self, experts: nn.Module, weights: ExpertWeights) -> None:
        for name, view in Layout.of(experts).views(experts).items():
            view.copy_(weights.tensors[name])

    def _redirected(
        self, experts: nn.Module, projections: Mapping[str, Projection], roles: dict[str, Role], table: Tensor
    ) -> RedirectedExperts:
        activation = experts.activation if isinstance(experts, RedirectedExperts) else FamilyActivation(experts)
        return RedirectedExperts(projections, roles, activation, table)

    # -- router --------------------------------------------------------------------------------------------------
    def read_router(self, model: nn.Module, layer: LayerId) -> RouterWeights:
        """The linear map to the raw logits.

        What a family does with them afterwards (DeepSeek's correction bias and groups of experts, soft caps, sigmoid
        or softmax) decides the choice, not the logits; it stays in the model and is untouched by merging.
        """
        place = self._router(model, layer)
        linear: Any = model.get_submodule(_dotted(layer, place.path, place.linear))
        bias = getattr(linear, "bias", None)
        if linear.weight is None:
            raise ValueError(f"layer {layer!r}: the router {place.path!r} has no weight")
        return RouterWeights(linear.weight.detach().clone(), None if bias is None else bias.detach().clone())

    @torch.no_grad()
    def mask_router(self, model: nn.Module, layer: LayerId, dropped_E: Tensor) -> None:
        """Uses what the stock router has: the bias of its logits (gpt-oss) or of its choice (DeepSeek and kin)."""
        place, block = self._router(model, layer), model.get_submodule(layer)
        router: Any = block.get_submodule(place.path)
        _check_choice(layer, router, dropped_E)
        bias_E = getattr(block.get_submodule(_dotted(place.path, place.linear)), "bias", None)
        if bias_E is None:
            owners = [*router.named_parameters(), *router.named_buffers()]
            owners += [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
            found = [tensor for name, tensor in owners if "bias" in name and tensor.numel() == dropped_E.numel()]
            if len(found) != 1:
                super().mask_router(model, layer, dropped_E)
            bias_E = found[0]
        bias_E.masked_fill_(dropped_E.to(bias_E.device).reshape(bias_E.shape), NEVER)

    def router_parameters(self, model: nn.Module) -> list[str]:
        """Parameters of the routers and, where the block holds it, of the correction of their choice."""
        names: list[str] = []
        for layer in self.layers(model):
            path, block = self._router(model, layer).path, model.get_submodule(layer)
            names += [f"{layer}.{path}.{name}" for name, _ in block.get_submodule(path).named_parameters()]
            names += [f"{layer}.{name}" for name, _ in block.named_parameters(recurse=False) if "bias" in name]
        return names

    # -- capture -------------------------------------------------------------------------------------------------
    @contextmanager
    def capture(self, model: nn.Module, detach: bool = True) -> Iterator[Capture]:
        captured, call, hooks = Capture(), {}, []  # type: ignore[var-annotated]
        seen: dict[LayerId, _Routing] = {}
        for layer in self.layers(model):
            place = self._router(model, layer)
            routing = seen[layer] = _Routing(layer, model.get_submodule(_dotted(layer, place.path, place.linear)))

            def route(_module: nn.Module, inputs: Any, result: Any, routing: _Routing = routing) -> None:
                routing.routed(inputs[0], result)

            def dispatch(_module: nn.Module, inputs: Any, layer: LayerId = layer, routing: _Routing = routing) -> None:
                valid_T = newest_positions(_mask(call), layer, inputs[0])
                batch = routing.batch(inputs[0], inputs[1], inputs[2], valid_T)
                captured.batches[layer] = detached(batch) if detach else batch

            hooks.append(model.get_submodule(_dotted(layer, place.path)).register_forward_hook(route))
            hooks.append(self._experts(model, layer).register_forward_pre_hook(dispatch))
        with recording(model, hooks, captured, call):
            yield captured


class _Routing:
    """What the router of one layer did, until its experts are called; checks once that the logits are the raw ones."""

    def __init__(self, layer: LayerId, linear: Any) -> None:
        self.layer, self.linear = layer, linear
        self.returned: bool | None = None
        self.inputs_TD = self.logits_TE = torch.empty(0)

    def routed(self, hidden: Tensor, result: Any) -> None:
        self.inputs_TD = hidden.reshape(-1, hidden.shape[-1])
        first = result[0]
        if self.returned is None:
            own_TE = self._own()
            scale = float(own_TE.detach().abs().max()) if own_TE.numel() else 0.0
            tolerance = 2 * torch.finfo(hidden.dtype).eps * (scale + 1) * 8
            self.returned = (
                first.shape == own_TE.shape and float((first.detach() - own_TE.detach()).abs().max()) < tolerance
                if own_TE.numel()
                else None
            )
        # A family may return capped logits or probabilities in their place.
        self.logits_TE = first if self.returned else self._own()

    def _own(self) -> Tensor:
        weight, bias = self.linear.weight, getattr(self.linear, "bias", None)
        return functional.linear(self.inputs_TD.float(), weight.float(), None if bias is None else bias.float())

    def batch(self, inputs_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, valid_T: Tensor) -> RoutedBatch:
        if inputs_TD.shape != self.inputs_TD.shape:
            raise ValueError(
                f"layer {self.layer!r}: the experts see {tuple(inputs_TD.shape)}, their router "
                f"{tuple(self.inputs_TD.shape)}; such a family cannot be treated exactly"
            )
        wanted_TK = index_TK.to(torch.int64)
        return RoutedBatch(inputs_TD, self.logits_TE, wanted_TK, wanted_TK, weights_TK, valid_T)


def _check_choice(layer: LayerId, router: Any, dropped_E: Tensor) -> None:
    """Raise ValueError if ``router`` would have to choose a dropped expert for want of others."""
    kept_E, choices = (~dropped_E).cpu(), int(getattr(router, "top_k", 1))
    room = int(kept_E.sum())
    groups, taken = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    if groups and taken:
        # A group of experts is scored by its best two, so one with fewer kept is never taken.
        kept_G = kept_E.reshape(groups, -1).sum(dim=1)
        usable = kept_G[kept_G >= min(2, kept_E.numel() // groups)].sort().values
        room = int(usable[:taken].sum()) if len(usable) >= taken else 0
    if room < choices:
        raise ValueError(
            f"layer {layer!r}: with {int(dropped_E.sum())} of {len(dropped_E)} experts dropped the router can be left with "
            f"{room} to choose {choices} from; drop fewer, or prune with a redirect (merge method 'prune')"
        )


def _dimensions(experts: nn.Module) -> tuple[int, int]:
    """(E, D): how many experts the router chooses among, and the width they read."""
    if isinstance(experts, RedirectedExperts):
        return experts.expert_to_group.shape[0], experts.projection(experts.output).shape[1]
    layout = Layout.of(experts)
    first = getattr(experts, layout.first)
    return first.shape[0], first.shape[1 if layout.transposed else 2]


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _mask(call: Mapping[str, Any]) -> Any:
    return call.get("attention_mask", call.get("kwargs", {}).get("attention_mask"))
