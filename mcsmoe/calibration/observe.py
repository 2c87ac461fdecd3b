"""See what every expert of a layer gives while the model runs: statistics of outputs cost no second computation.

The experts module of the layer goes on computing what it always did. Experts that are modules of their own, and the
run-time experts after merging, are listened to. Experts that are stacked in one tensor are computed here with the
family's own matrices, biases and gate, since the library's products of all experts at once show no single output; the
sum over a token's experts is taken as the library takes it. Where a family scales what experts read and not what they
give, that output counts with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mcsmoe.adapters.fused_layout import FamilyActivation, Layout, is_stacked_experts, scales_inputs
from mcsmoe.adapters.places import experts_of
from mcsmoe.modules import RedirectedExperts, ScaledInputRedirectedExperts
from mcsmoe.statistics.outputs import ChosenOutputs
from mcsmoe.types import LayerId, RoutedBatch

_COMBINED = 1024  # tokens whose outputs are weighted and summed at once


class Observation:
    """What the experts of one layer gave in the forward pass that ran last."""

    def __init__(self, layer: LayerId, num_experts: int, scale: float, table_E: Tensor | None) -> None:
        self.layer, self.num_experts, self.scale, self.table_E = layer, num_experts, scale, table_E
        self.whole_TKD: Tensor | None = None
        self.all_ETD: Tensor | None = None
        self.parts: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget the last pass."""
        self.whole_TKD = self.all_ETD = None
        self.parts = {}

    def take(self, batch: RoutedBatch) -> ChosenOutputs:
        """The outputs that belong to ``batch``; they are forgotten here.

        Raises:
            ValueError: experts computed other tokens than the router sent them; names the layer.
        """
        weights_TK = batch.weights_TK * self.scale if self.scale != 1 else batch.weights_TK
        whole_TKD, all_ETD, parts = self.whole_TKD, self.all_ETD, self.parts
        self.clear()
        if all_ETD is not None:
            # The weight is in what these experts read, so their outputs are summed as they are.
            token_T1 = torch.arange(all_ETD.shape[1], device=all_ETD.device)[:, None]
            return ChosenOutputs(all_ETD[batch.chosen_TK.clamp(min=0), token_T1], torch.ones_like(weights_TK))
        if whole_TKD is None:
            whole_TKD = self._assembled(parts, batch)
        return ChosenOutputs(whole_TKD, weights_TK, self.scale)

    def _assembled(self, parts: dict[int, Tensor], batch: RoutedBatch) -> Tensor:
        """[T, K, D] from the outputs of each expert (or group), which come in the order of their tokens."""
        tokens, width = batch.inputs_TD.shape
        chosen_TK = batch.chosen_TK
        units = self.num_experts if self.table_E is None else int(self.table_E.max()) + 1
        unit_TK = chosen_TK.clamp(min=0)
        if self.table_E is not None:
            unit_TK = self.table_E.to(chosen_TK.device)[unit_TK]
        unit_TK = torch.where(chosen_TK < 0, units, unit_TK)
        present_TU = torch.zeros(tokens, units + 1, dtype=torch.bool, device=chosen_TK.device)
        present_TU = present_TU.scatter_(1, unit_TK, True)[:, :units]
        counts = present_TU.sum(dim=0).tolist()
        given = [parts[unit].shape[0] if unit in parts else 0 for unit in range(units)]
        if counts != given:
            raise ValueError(
                f"layer {self.layer!r}: its router sent {counts} tokens to its experts, which computed {given}; such a "
                "family cannot be treated exactly"
            )
        if not parts:
            return batch.inputs_TD.new_zeros(*chosen_TK.shape, width)
        rows_ND = torch.cat([parts[unit] for unit in sorted(parts)])
        # Rows come expert by expert, tokens in order.
        row_TU = (present_TU.t().flatten().cumsum(0) - 1).view(units, tokens).t().clamp(min=0)
        row_TK = row_TU.gather(1, unit_TK.clamp(max=units - 1))
        return rows_ND[row_TK.flatten()].view(*chosen_TK.shape, width)


def _number_of(experts: Any) -> int:
    if isinstance(experts, RedirectedExperts):
        return experts.expert_to_group.shape[0]
    return Layout.of(experts).dimensions(experts)[0]


@contextmanager
def observing(layer: LayerId, block: nn.Module) -> Iterator[Observation]:
    """Observe the experts of the sparse layer ``block`` during forward passes inside the context.

    Raises:
        ValueError: its experts cannot be observed; names the layer.
    """
    experts: Any = experts_of(block)
    if experts is None:
        raise ValueError(f"layer {layer!r}: no experts were found in it whose outputs could be seen")
    with ExitStack() as stack:
        if isinstance(experts, ScaledInputRedirectedExperts) or scales_inputs(experts):
            made = Observation(layer, _number_of(experts), 1.0, None)

            def all_seen(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                made.all_ETD = output.detach().reshape(made.num_experts, -1, output.shape[-1])

            stack.callback(experts.register_forward_hook(all_seen).remove)
        elif isinstance(experts, RedirectedExperts):
            masking = getattr(experts, "masking", None)
            table_E = experts.expert_to_group
            made = Observation(layer, table_E.shape[0], 1 - masking.p if masking is not None else 1.0, table_E)
            stack.enter_context(_replaced(experts, "_expert", _listening(experts, made)))
        elif is_stacked_experts(experts):
            made = Observation(layer, _number_of(experts), 1.0, None)
            stack.enter_context(_replaced(experts, "forward", _stacked(experts, made)))
        else:
            members = [
                (int(name.rpartition("_")[2]), child)
                for name, child in experts.named_children()
                if name.startswith("expert_")
            ]
            made = Observation(layer, len(members), 1 - getattr(experts, "moe_token_dropout", 0.0), None)
            for expert, child in members:

                def seen(_module: nn.Module, _inputs: Any, output: Tensor, expert: int = expert) -> None:
                    made.parts[expert] = output.detach().reshape(-1, output.shape[-1])

                stack.callback(child.register_forward_hook(seen).remove)
        yield made


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """``function`` in the place of a method of ``module`` alone."""
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)


def _listening(experts: RedirectedExperts, made: Observation) -> Callable[[int, Tensor], Tensor]:
    usual = experts._expert

    def expert(group: int, inputs_ND: Tensor) -> Tensor:
        outputs_ND = usual(group, inputs_ND)
        seen_ND = outputs_ND.detach()
        made.parts[group] = seen_ND / made.scale if made.scale != 1 else seen_ND
        return outputs_ND

    return expert


def _stacked(experts: Any, made: Observation) -> Callable[..., Tensor]:
    layout, activation = Layout.of(experts), FamilyActivation(experts)
    names = layout.shape(experts).matrices
    *inputs, output = names

    def forward(hidden: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        views = layout.views(experts)

        def linear(name: str, expert: int, rows_Ni: Tensor) -> Tensor:
            bias = views.get(f"{name}_bias")
            return functional.linear(rows_Ni, views[name][expert], None if bias is None else bias[expert])

        tokens, choices = index_TK.shape
        order_N = torch.argsort(index_TK.flatten(), stable=True)
        counts = torch.bincount(index_TK.flatten(), minlength=made.num_experts).tolist()
        outputs_ND = hidden_TD.new_empty(tokens * choices, hidden_TD.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if count:
                place_N = order_N[start : start + count]
                inputs_ND = hidden_TD[place_N.div(choices, rounding_mode="floor")]
                inner_NF = activation({name: linear(name, expert, inputs_ND) for name in inputs})
                outputs_ND.index_copy_(0, place_N, linear(output, expert, inner_NF))
                start += count
        made.whole_TKD = outputs_TKD = outputs_ND.view(tokens, choices, -1)
        result_TD = torch.empty_like(hidden_TD)
        for begin in range(0, tokens, _COMBINED):
            part = slice(begin, begin + _COMBINED)
            result_TD[part] = (outputs_TKD[part] * weights_TK[part, :, None]).sum(dim=1)
        return result_TD.view(hidden.shape)

    return forward
