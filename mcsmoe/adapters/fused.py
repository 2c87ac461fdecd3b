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

from mcsmoe.adapters import dropping
from mcsmoe.adapters.base import Capture
from mcsmoe.adapters.fused_layout import (
    FamilyActivation,
    Layout,
    RouterPlace,
    expert_children,
    experts_problem,
    find_router,
    is_stacked_experts,
    scales_inputs,
)
from mcsmoe.adapters.redirecting import (
    NEVER,
    ExpertShape,
    Place,
    RedirectingAdapter,
    newest_positions,
    recording,
)
from mcsmoe.modules import Projection, RedirectedExperts, ScaledInputRedirectedExperts
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId, Role, RoutedBatch, RouterWeights


class FusedAdapter(RedirectingAdapter):
    """Decoder-only models with stacked experts, gated or not, with or without biases."""

    name: ClassVar[str] = "stacked experts (gate_up_proj, down_proj)"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(expert_children(block) for block in model.modules()) and cls.refusal(model) is None

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        """Why a model that has stacked experts is not treated, naming the layer; None if it has none or is treated."""
        owners: dict[int, str] = {}
        for path, block in model.named_modules():
            found = expert_children(block)
            if not found:
                continue
            problem = cls._problem(block)
            if problem is not None:
                return f"layer {path!r}: {problem}"
            first = next(found[0][1].parameters(), None)
            owner = path if first is None else owners.setdefault(id(first), path)
            if owner != path:
                return f"layer {path!r}: its experts are those of {owner!r}, so what is done to one is done to both"
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

    def view_experts(self, model: nn.Module, layer: LayerId) -> ExpertWeights:
        experts = self._experts(model, layer)
        return (
            self.read_experts(model, layer)
            if isinstance(experts, RedirectedExperts)
            else Layout.of(experts).view(experts)
        )

    def _stock_write(self, experts: nn.Module, weights: ExpertWeights) -> None:
        for name, view in Layout.of(experts).views(experts).items():
            view.copy_(weights.tensors[name])

    def _redirected(
        self, experts: nn.Module, projections: Mapping[str, Projection], roles: dict[str, Role], table: Tensor
    ) -> RedirectedExperts:
        if isinstance(experts, RedirectedExperts):
            return type(experts)(projections, roles, experts.activation, table)
        kind = ScaledInputRedirectedExperts if scales_inputs(experts) else RedirectedExperts
        return kind(projections, roles, FamilyActivation(experts), table)

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
        experts = self.num_experts(model, layer)
        return RouterWeights(
            linear.weight.detach()[:experts].clone(), None if bias is None else bias.detach()[:experts].clone()
        )

    def _place(self, model: nn.Module, layer: LayerId) -> Place:
        place = self._router(model, layer)
        return Place(self._experts_name(model, layer), place.path, place.linear)

    def _mask(self, model: nn.Module, layer: LayerId) -> Tensor | None:
        """The bias that a mask can be written to: of the router's logits (gpt-oss), or of its choice (DeepSeek)."""
        place, block = self._place(model, layer), model.get_submodule(layer)
        bias_E = getattr(block.get_submodule(_dotted(place.router, place.linear)), "bias", None)
        if bias_E is not None:
            return bias_E
        correction = dropping.correction_of(block, place, self.num_experts(model, layer))
        return None if correction is None else correction.tensor

    def _can_mask(self, model: nn.Module, layer: LayerId) -> bool:
        return self._mask(model, layer) is not None

    @torch.no_grad()
    def mask_router(self, model: nn.Module, layer: LayerId, dropped_E: Tensor) -> None:
        """Uses what the stock router has: the bias of its logits or of its choice."""
        why = dropping.problem(model, model.get_submodule(layer), self._place(model, layer), ~dropped_E)
        if why is not None:
            raise ValueError(f"layer {layer!r}: {why}")
        bias_E = self._mask(model, layer)
        if bias_E is None:
            super().mask_router(model, layer, dropped_E)
        else:
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

        def record(
            layer: LayerId,
            routing: _Routing,
            hidden: Tensor,
            index_TK: Tensor,
            weights_TK: Tensor,
            scale_TK: Tensor | None = None,
        ) -> None:
            inputs_TD = hidden.reshape(-1, hidden.shape[-1])
            valid_T = newest_positions(_mask(call), layer, inputs_TD)
            batch = routing.batch(inputs_TD, index_TK, weights_TK, valid_T, scale_TK)
            captured.batches[layer] = batch.detached() if detach else batch

        for layer in self.layers(model):
            place, experts = self._router(model, layer), self._experts(model, layer)
            router: Any = model.get_submodule(_dotted(layer, place.path))
            linear = model.get_submodule(_dotted(layer, place.path, place.linear))
            routing = _Routing(layer, linear, self.num_experts(model, layer), place.plain)
            scaled = isinstance(experts, ScaledInputRedirectedExperts) or scales_inputs(experts)

            def route(
                module: Any,
                inputs: Any,
                result: Any,
                layer: LayerId = layer,
                routing: Any = routing,
                scaled: bool = scaled,
            ) -> None:
                routing.routed(inputs[0], result)
                if scaled:  # its experts are called with every token, scaled: what they give is summed as it is
                    scale_TK, index_TK = result[0].topk(module.top_k, dim=-1)
                    record(layer, routing, inputs[0], index_TK, torch.ones_like(scale_TK), scale_TK)

            def dispatch(_module: Any, inputs: Any, layer: LayerId = layer, routing: Any = routing) -> None:
                record(layer, routing, *inputs[:3])

            if linear is not router:
                hooks.append(
                    linear.register_forward_pre_hook(lambda _, inputs, routing=routing: routing.read(inputs[0]))
                )
            hooks.append(router.register_forward_hook(route))
            if not scaled:
                hooks.append(experts.register_forward_pre_hook(dispatch))
        with recording(model, hooks, captured, call):
            yield captured


class _Routing:
    """What the router of one layer did, until its experts are called; every batch is checked against its weights.

    Raises:
        ValueError: a router without weights in memory, or one that gives other logits than its weights do, though it
            gave those before, or cannot be seen to give them; names the layer.
    """

    def __init__(self, layer: LayerId, linear: Any, experts: int, plain: bool) -> None:
        self.layer, self.linear, self.experts, self.plain = layer, linear, experts, plain
        self.returned: bool | None = None
        self.read_TD: Tensor | None = None
        self.logits_TE = torch.empty(0)

    def read(self, hidden: Tensor) -> None:
        """What the linear map reads, where it is a module of its own; else it reads what the router does."""
        self.read_TD = hidden.reshape(-1, hidden.shape[-1])

    def routed(self, hidden: Tensor, result: Any) -> None:
        if hidden.is_meta or self.linear.weight.is_meta:
            raise ValueError(f"layer {self.layer!r}: its router ran without its weights; nothing it chose is real")
        inputs_TD = hidden.reshape(-1, hidden.shape[-1]) if self.read_TD is None else self.read_TD
        self.read_TD = None
        first = result if isinstance(result, Tensor) else result[0]
        own_TE = self._own(inputs_TD)
        if own_TE.numel() == 0:
            self.logits_TE = own_TE
            return
        same = first.shape == own_TE.shape and self._near(first.detach(), own_TE.detach(), hidden.dtype)
        if not same and (self.returned or not self.plain):
            raise ValueError(f"layer {self.layer!r}: its router gave other logits than its weights do")
        self.returned = same
        # A family may return capped logits or probabilities in their place.
        self.logits_TE = first if same else own_TE

    def _own(self, inputs_TD: Tensor) -> Tensor:
        weight, bias = self.linear.weight, getattr(self.linear, "bias", None)
        own_TE = functional.linear(inputs_TD.float(), weight.float(), None if bias is None else bias.float())
        return own_TE[:, : self.experts]

    @staticmethod
    def _near(one_TE: Tensor, two_TE: Tensor, dtype: torch.dtype) -> bool:
        tolerance = 2 * torch.finfo(dtype).eps * (float(two_TE.abs().max()) + 1) * 8
        return float((one_TE - two_TE).abs().max()) < tolerance

    def batch(
        self, inputs_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, valid_T: Tensor, scale_TK: Tensor | None = None
    ) -> RoutedBatch:
        if inputs_TD.shape[0] != self.logits_TE.shape[0]:
            raise ValueError(
                f"layer {self.layer!r}: the experts see {inputs_TD.shape[0]} tokens, their router "
                f"{self.logits_TE.shape[0]}; such a family cannot be treated exactly"
            )
        wanted_TK = index_TK.to(torch.int64)
        return RoutedBatch(inputs_TD, self.logits_TE, wanted_TK, wanted_TK, weights_TK, valid_T, scale_TK)


def _dimensions(experts: nn.Module) -> tuple[int, int]:
    """(E, D): how many experts the router chooses among, and the width they read."""
    if isinstance(experts, RedirectedExperts):
        return experts.expert_to_group.shape[0], experts.projection(experts.output).shape[1]
    return Layout.of(experts).dimensions(experts)


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _mask(call: Mapping[str, Any]) -> Any:
    return call.get("attention_mask", call.get("kwargs", {}).get("attention_mask"))
