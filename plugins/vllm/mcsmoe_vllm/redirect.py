"""Layers whose router chooses among more experts than are stored: choices go through a table, many to one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

from mcsmoe_vllm.config import Layer, number_of

_PROJECTIONS = ("gate", "down", "up")  # in the order of the names that the factory takes


class RedirectingRouter(BaseRouter):
    """The choice of ``router`` among E experts, each told as the stored expert that answers for it.

    Two experts of a token may be one stored expert: it then answers twice, each time with the weight of that choice.
    """

    def __init__(self, router: BaseRouter, layer: Layer) -> None:
        super().__init__(router.top_k, layer.groups)
        self.router = router
        self.table_E = torch.tensor(layer.table, dtype=torch.int32)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        # A kernel that routes by itself would not know the table: none offers this kind.
        return RoutingMethodType.Custom

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        weights_TK, chosen_TK = self.router._compute_routing(hidden_states, router_logits, indices_type, **more)
        return weights_TK, self.table_E[chosen_TK.long()].to(chosen_TK.dtype)


@dataclass
class Redirected:
    """What was made of the merged layers of one model: where they are, and what their matrices are called."""

    layers: Mapping[int, Layer]
    places: dict[int, str] = field(default_factory=dict)  # module path in vLLM, by block
    names: dict[int, tuple[str, str, str]] = field(default_factory=dict)  # of gate, down and up, by block

    def factory(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's factory of experts, which makes as many as are stored where a layer is merged."""
        signature = inspect.signature(original)
        routing = set(inspect.signature(create_fused_moe_router).parameters)

        def make(*positional: Any, **named: Any) -> Any:
            bound = signature.bind(*positional, **named)
            bound.apply_defaults()
            given = bound.arguments
            number = number_of(given["prefix"])
            layer = self.layers.get(number)
            if layer is None:
                return original(**given)
            if given["enable_eplb"]:
                raise ValueError("mcsmoe: merged layers are not balanced over processes; leave enable_eplb out")
            options = {name: value for name, value in given.items() if name in routing}
            # The runner multiplies the output by the scale where the family asks for that.
            options["routed_scaling_factor"] = (
                1.0 if given["apply_routed_scale_to_output"] else given["routed_scaling_factor"]
            )
            _fit(given.get("gate"), given.get("e_score_correction_bias"), layer)
            router = create_fused_moe_router(**options, global_num_experts=len(layer.table))
            if given["use_grouped_topk"] and (given["num_expert_group"] or 1) > 1:
                # Groups of the router's outputs are no groups of the stored experts.
                given |= {"num_expert_group": 1, "topk_group": 1}
            given |= {"num_experts": layer.groups, "router": RedirectingRouter(router, layer)}
            made = original(**given)
            if made.routed_experts.quant_method.is_monolithic:
                raise ValueError(
                    f"mcsmoe: {given['prefix']}: this kernel of vLLM chooses experts by itself and knows no redirect table; "
                    "choose another one (--moe-backend triton), or use mcsmoe export --form dense"
                )
            self.places[number] = given["prefix"].removesuffix(".experts")
            self.names[number] = given["ckpt_names"]
            return made

        return make

    def published(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors under the names that the base architecture loads."""
        inside = {f"{layer.name}.": number for number, layer in self.layers.items() if number in self.places}
        for name, tensor in weights:
            number = next((number for prefix, number in inside.items() if name.startswith(prefix)), None)
            if number is None:
                yield name, tensor
                continue
            layer, place = self.layers[number], self.places[number]
            rest = name.removeprefix(f"{layer.name}.")
            if not rest.startswith("experts.projections."):
                yield f"{place}.{rest}", tensor
                continue
            _, _, projection, kind = rest.split(".")
            matrix = self.names[number][_PROJECTIONS.index(projection)]
            for group in range(layer.groups):
                yield f"{place}.experts.{group}.{matrix}.{kind.partition('_')[0]}", tensor[group]


def _fit(gate: Any, correction: Any, layer: Layer) -> None:
    """Give the gate as many rows as this layer's router has outputs, where layers have different numbers."""
    rows = len(layer.table)
    for owner in (gate, correction):
        parameters = owner.named_parameters(recurse=False) if isinstance(owner, torch.nn.Module) else [("", owner)]
        for _, parameter in parameters:
            if parameter is not None and len(parameter) != rows:
                parameter.data = parameter.data.new_empty((rows, *parameter.shape[1:]))


@contextmanager
def redirected(module: ModuleType, layers: Mapping[int, Layer]) -> Iterator[Redirected]:
    """Inside, models of ``module`` are built with the merged ``layers``."""
    made, original = Redirected(layers), module.FusedMoEFactory
    module.FusedMoEFactory = made.factory(original)  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        module.FusedMoEFactory = original  # type: ignore[attr-defined]
