"""What every merge method takes and gives, and the weighted average most of them are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcsmoe.align import is_finite
from mcsmoe.types import ExpertActivation, ExpertWeights, Grouping, LayerId, RouterWeights, check_per_expert

if TYPE_CHECKING:
    from mcsmoe.statistics.layer import LayerStatistics


@dataclass(frozen=True)
class MergeInputs:
    """One layer to be merged: what each method needs of it; a method says in its docstring which fields it reads."""

    layer: LayerId
    weights: ExpertWeights  # E stacked experts
    grouping: Grouping
    frequency_E: Tensor  # shares of the calibration tokens; sums to 1, or to 0 where nothing was routed
    fisher: ExpertWeights | None = None  # diagonal Fisher information, shaped like the weights
    statistics: LayerStatistics | None = None
    tokens: Sequence[Tensor] | None = None  # per expert, inputs [T_e, D] routed to it
    gates: Sequence[Tensor] | None = None  # per expert, combine weights [T_e] of those tokens
    activation: ExpertActivation | None = None
    router: RouterWeights | None = None
    saliency_E: Tensor | None = None  # criterion of methods that prune by one
    expert_sets: int = 1  # sets of consecutive experts among which the router chooses first
    seed: int = 0
    workers: int = 1  # threads for assignments

    def check(self) -> None:
        """Raise ValueError, naming layer, expert and value, for inputs that do not belong together."""
        experts = self.weights.num_experts
        if self.grouping.expert_to_group.shape != (experts,):
            raise ValueError(
                f"layer {self.layer!r}: the grouping is of {self.grouping.num_experts} experts, the layer has {experts}"
            )
        self.grouping.validate(self.layer)
        if self.statistics is not None:
            self.statistics.check_against(self.layer, experts, self.weights.d_model)
        check_per_expert(self.layer, "frequency", self.frequency_E, experts)
        if self.saliency_E is not None:
            check_per_expert(self.layer, "saliency", self.saliency_E, experts)
        for what, listed in (("tokens", self.tokens), ("combine weights", self.gates)):
            if listed is not None and len(listed) != experts:
                raise ValueError(
                    f"layer {self.layer!r}: {what} are of {len(listed)} experts, the layer has {experts}; "
                    "they were collected from another model"
                )
        for expert, inputs_TD in enumerate(self.tokens or ()):
            if inputs_TD.ndim != 2 or inputs_TD.shape[1] != self.weights.d_model:
                raise ValueError(
                    f"layer {self.layer!r}: tokens of expert {expert} have shape {tuple(inputs_TD.shape)}, the layer "
                    f"takes width {self.weights.d_model}; they were collected from another model"
                )
        if self.fisher is not None:
            check_same_shape(self.layer, "Fisher information", self.fisher, self.weights)

    def require_tokens(self, method: str) -> tuple[Sequence[Tensor], ExpertActivation]:
        """Tokens and activation.

        Raises:
            ValueError: one of them was not given.
        """
        if self.tokens is None or self.activation is None:
            raise ValueError(
                f"layer {self.layer!r}: {method} compares activations and needs tokens; "
                "collect routing statistics with a reservoir"
            )
        return self.tokens, self.activation


@dataclass(frozen=True)
class Merged:
    """A merged layer: G experts that answer for E."""

    weights: ExpertWeights  # G stacked
    expert_to_group: Tensor  # int64 [E]: the redirect table
    share_E: Tensor  # float64: each expert's part in its group; sums to 1 in a group
    dominant: Tensor  # int64 [G]: the expert that leads each group
    dropped_E: Tensor | None = None  # bool: experts that the router may never choose; None: it may choose all

    @property
    def router_bias_E(self) -> Tensor | None:
        """What to add to the router's logits: 0, or -inf where the expert is dropped. None: nothing."""
        if self.dropped_E is None:
            return None
        return torch.zeros(self.dropped_E.shape[0]).masked_fill(self.dropped_E, float("-inf"))

    @property
    def grouping(self) -> Grouping:
        """The groups as they came out; pruning by saliency may lead them otherwise than they came in."""
        return Grouping(self.expert_to_group, self.dominant)


def grouping_members(grouping: Grouping) -> list[Tensor]:
    """For each group the int64 indices of its experts, ascending."""
    return [(grouping.expert_to_group == group).nonzero()[:, 0] for group in range(grouping.num_groups)]


@torch.no_grad()
def weighted_average(
    weights: ExpertWeights,
    grouping: Grouping,
    share_E: Tensor,
    layer: LayerId,
    permutation_EF: Tensor | None = None,
) -> ExpertWeights:
    """W_g = sum over the group of share_e W_e, for G stacked groups (equation 2).

    Reads every weight once and writes every merged weight; nothing else is made but, of one expert at a time, an
    accumulator where weights are stored in half precision and a permuted copy where ``permutation_EF`` [E, F] aligns
    the experts. A group of one expert that is not permuted is copied bit by bit.

    Raises:
        ValueError: non-finite weights, naming layer, tensor and expert.
    """
    share = share_E.tolist()
    members_G = [members.tolist() for members in grouping_members(grouping)]

    def average(name: str, tensor: Tensor) -> Tensor:
        made, axis = tensor.new_empty(grouping.num_groups, *tensor.shape[1:]), weights.neuron_axis(name)
        narrow = tensor.dtype in (torch.float16, torch.bfloat16)
        scratch = torch.empty_like(made[0], dtype=torch.float32) if narrow else None
        for group, members in enumerate(members_G):
            target = made[group] if scratch is None or len(members) == 1 else scratch
            for place, expert in enumerate(members):
                source = tensor[expert]
                if axis is not None and permutation_EF is not None:
                    source = source.index_select(axis - 1, permutation_EF[expert].to(source.device))
                if len(members) == 1:
                    target.copy_(source)
                elif place > 0:
                    target.add_(source, alpha=share[expert])
                elif scratch is None:
                    torch.mul(source, share[expert], out=target)
                else:
                    # torch.mul would round to the type of its input first.
                    target.copy_(source).mul_(share[expert])
            # Nothing turns a NaN or an infinity finite again, not even a share of zero, so the experts need no pass of
            # their own.
            if not is_finite(target):
                weights.require_finite(layer)
            if target is scratch:
                made[group].copy_(target)
        return made

    return weights.map(average)


def check_same_shape(layer: LayerId, what: str, given: ExpertWeights, weights: ExpertWeights) -> None:
    """Raise ValueError naming layer and tensor unless ``given`` has the tensors of ``weights``."""
    if set(given.tensors) != set(weights.tensors):
        raise ValueError(
            f"layer {layer!r}: {what} is of {sorted(given.tensors)}, the weights {sorted(weights.tensors)}"
        )
    for name, tensor in weights.tensors.items():
        if given.tensors[name].shape != tensor.shape:
            raise ValueError(
                f"layer {layer!r}: {what} of {name!r} has shape {tuple(given.tensors[name].shape)}, "
                f"the weights {tuple(tensor.shape)}; it was collected from another model"
            )
