"""The nouns of the library: layers, expert weights, routed batches, groupings.

Shape legend used in tensor names everywhere: ``T`` tokens, ``E`` experts, ``G`` groups, ``K`` experts per token,
``D`` model width, ``F`` expert hidden width, ``R`` rank, ``V`` vocabulary (``logits_TE``, ``wi_EFD``).

This module imports torch and nothing else: no model class, no file, no device choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

LayerId = str
"""Module path of a sparse layer inside its model, e.g. ``encoder.block.1.layer.1.mlp``; the name in every table."""

ExpertActivation = Callable[[Mapping[str, Tensor]], Tensor]
"""Maps the outputs of the input projections, by tensor name and each [..., F], to the hidden activation [..., F]."""


Batch = dict[str, Tensor]
"""Arguments of a forward pass by name, each [rows, positions]."""

IGNORED = -100
"""Label of a position that does not count, as in transformers."""


class Role(StrEnum):
    """What a stacked expert tensor is, and with it its canonical shape."""

    INPUT = "input"  # [E, F, D], a row is a hidden neuron
    OUTPUT = "output"  # [E, D, F], a column is a hidden neuron
    INPUT_BIAS = "input_bias"  # [E, F]
    OUTPUT_BIAS = "output_bias"  # [E, D], not indexed by neurons


NEURON_AXIS: dict[Role, int | None] = {Role.INPUT: 1, Role.OUTPUT: 2, Role.INPUT_BIAS: 1, Role.OUTPUT_BIAS: None}
"""Axis of a stacked tensor that indexes hidden neurons: permutation symmetry declared as data."""

_NDIM = {Role.INPUT: 3, Role.OUTPUT: 3, Role.INPUT_BIAS: 2, Role.OUTPUT_BIAS: 2}


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer, stacked, in canonical orientation whatever the family stores.

    ``tensors`` maps a name (``wi``, ``wo``; ``gate``, ``up``, ``down``; ``..._bias``) to a tensor whose first axis is the
    expert (or, once merged, the group) and whose other axes follow from its ``roles`` entry.
    """

    tensors: dict[str, Tensor]
    roles: dict[str, Role]

    def __post_init__(self) -> None:
        if set(self.tensors) != set(self.roles):
            raise ValueError(f"roles {sorted(self.roles)} do not name the tensors {sorted(self.tensors)}")
        for name, tensor in self.tensors.items():
            if tensor.ndim != _NDIM[self.roles[name]]:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, which is not a {self.roles[name]}")
            if tensor.shape[0] != self.num_experts:
                raise ValueError(f"tensor {name!r} stacks {tensor.shape[0]} experts, others {self.num_experts}")
            axis = NEURON_AXIS[self.roles[name]]
            if axis is not None and tensor.shape[axis] != self.width:
                raise ValueError(f"tensor {name!r} has {tensor.shape[axis]} hidden neurons, others {self.width}")

    def _first(self, role: Role) -> Tensor:
        for name, this in self.roles.items():
            if this is role:
                return self.tensors[name]
        raise ValueError(f"no {role} projection among {sorted(self.tensors)}")

    @property
    def num_experts(self) -> int:
        """E: how many experts (or groups, once merged) are stacked."""
        return next(iter(self.tensors.values())).shape[0]

    @property
    def width(self) -> int:
        """F: hidden neurons per expert."""
        return self._first(Role.INPUT).shape[1]

    @property
    def d_model(self) -> int:
        """D: model width."""
        return self._first(Role.INPUT).shape[2]

    def names(self, *roles: Role) -> list[str]:
        """Names of the tensors that have one of ``roles``, in storage order; all names when none is given."""
        return [name for name, role in self.roles.items() if not roles or role in roles]

    def neuron_axis(self, name: str) -> int | None:
        """Axis of ``tensors[name]`` that indexes hidden neurons, or None."""
        return NEURON_AXIS[self.roles[name]]

    def map(self, function: Callable[[str, Tensor], Tensor]) -> ExpertWeights:
        """New weights with ``function(name, tensor)`` in the place of each tensor."""
        return ExpertWeights({name: function(name, t) for name, t in self.tensors.items()}, dict(self.roles))

    def select(self, experts: Tensor) -> ExpertWeights:
        """The given experts (int64 indices), in that order."""
        return self.map(lambda _, tensor: tensor.index_select(0, experts.to(tensor.device)))

    def flatten(self) -> Tensor:
        """[E, P]: all parameters of each expert in one row."""
        return torch.cat([tensor.flatten(1) for tensor in self.tensors.values()], dim=1)

    def preactivations(self, expert: int, inputs_TD: Tensor) -> dict[str, Tensor]:
        """By input projection, [T, F]: what one expert makes of ``inputs_TD`` before its activation, biases included."""
        return {name: self._project(name, expert, inputs_TD) for name in self.names(Role.INPUT)}

    def hidden(self, expert: int, inputs_TD: Tensor, activation: ExpertActivation) -> Tensor:
        """[T, F]: hidden activations of one expert."""
        return activation(self.preactivations(expert, inputs_TD))

    def output(self, expert: int, hidden_TF: Tensor) -> Tensor:
        """[T, D]: what one expert gives for its hidden activations."""
        (name,) = self.names(Role.OUTPUT)
        return self._project(name, expert, hidden_TF)

    def _project(self, name: str, expert: int, inputs_Ti: Tensor) -> Tensor:
        matrix_oi, bias_Eo = self.tensors[name][expert], self.tensors.get(f"{name}_bias")
        return linear(inputs_Ti.to(matrix_oi), matrix_oi, None if bias_Eo is None else bias_Eo[expert])

    def require_finite(self, layer: LayerId) -> None:
        """Raise ValueError naming layer, tensor and expert if any weight is NaN or infinite."""
        for name, tensor in self.tensors.items():
            bad_E = ~torch.isfinite(tensor).flatten(1).all(dim=1)
            if bad_E.any():
                expert = int(bad_E.nonzero()[0])
                raise ValueError(
                    f"layer {layer!r}: tensor {name!r} of expert {expert} has non-finite weights; "
                    "the checkpoint is damaged or its training diverged"
                )


@dataclass(frozen=True)
class RouterWeights:
    """The linear router of a layer: logits_TE = inputs_TD @ weight_ED.T + bias_E."""

    weight_ED: Tensor
    bias_E: Tensor | None = None


@dataclass(frozen=True)
class RoutedBatch:
    """What one forward pass did in one layer, over all token positions (padding included: see ``valid_T``)."""

    inputs_TD: Tensor  # what the router and the experts saw
    logits_TE: Tensor  # raw router logits, before softmax
    wanted_TK: Tensor  # int64, the experts the router chose
    chosen_TK: Tensor  # int64, the experts that computed the token: equal to wanted_TK, or -1 where over capacity
    weights_TK: Tensor  # combine weights
    valid_T: Tensor  # bool: real tokens (attention mask 1; decoder positions with a label)
    scale_TK: Tensor | None = (
        None  # what a chosen expert's input is multiplied by before it reads it (Llama-4); None: 1
    )

    def only_valid(self) -> RoutedBatch:
        """The same batch with padding and unlabelled positions removed."""
        return self._each(lambda tensor: tensor[self.valid_T])

    def detached(self) -> RoutedBatch:
        """The same batch without its graph."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> RoutedBatch:
        return replace(self, **{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})


@dataclass(frozen=True)
class Grouping:
    """Which experts of one layer are merged into which group."""

    expert_to_group: Tensor  # int64 [E], values 0..G-1, every group present
    dominant: Tensor  # int64 [G], the expert that leads each group and belongs to it

    @property
    def num_experts(self) -> int:
        return self.expert_to_group.shape[0]

    @property
    def num_groups(self) -> int:
        return self.dominant.shape[0]

    def leads(self) -> Tensor:
        """[E] bool: the expert leads its group."""
        leads_E = torch.zeros(self.num_experts, dtype=torch.bool)
        leads_E[self.dominant] = True
        return leads_E

    def rows(self, layer: LayerId, share_E: Tensor) -> list[dict[str, Any]]:
        """Rows of table ``groups``, where ``share_E`` [E] is each expert's share of its group."""
        columns = (self.expert_to_group.tolist(), self.leads().tolist(), share_E.double().tolist())
        return [
            {"layer": layer, "expert": expert, "group": group, "dominant": leads, "weight": share}
            for expert, (group, leads, share) in enumerate(zip(*columns, strict=True))
        ]

    def validate(self, layer: LayerId) -> None:
        """Raise ValueError naming layer and expert unless every expert is in exactly one led group."""
        groups = self.num_groups
        for expert, group in enumerate(self.expert_to_group.tolist()):
            if not 0 <= group < groups:
                raise ValueError(
                    f"layer {layer!r}: expert {expert} is in group {group}, but groups are 0..{groups - 1}"
                )
        for group, leader in enumerate(self.dominant.tolist()):
            if not 0 <= leader < self.num_experts or int(self.expert_to_group[leader]) != group:
                raise ValueError(f"layer {layer!r}: group {group} is led by expert {leader}, which is not its member")


@dataclass(frozen=True)
class LowRankFactors:
    """W_Goi ~ u_GoR @ v_GRi + residual_Goi, rows of the residual being output features (MC-SMoE, section 3.2)."""

    u_GoR: Tensor
    v_GRi: Tensor
    residual_Goi: Tensor


@dataclass(frozen=True)
class NoviceSpec:
    """How many novices a layer has, and of what rank; 0 for constant ones."""

    count: int
    rank: int


@dataclass(frozen=True)
class Novices:
    """N stand-ins for dropped experts: for an input x each gives ``constant + u @ (v @ x)``, or its constant alone."""

    constant_ND: Tensor
    u_NDR: Tensor | None = None
    v_NRD: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.u_NDR is None) != (self.v_NRD is None):
            raise ValueError("a novice of low rank needs both of its factors")

    @property
    def spec(self) -> NoviceSpec:
        """How many there are, and of what rank."""
        return NoviceSpec(len(self.constant_ND), 0 if self.u_NDR is None else self.u_NDR.shape[2])

    def select(self, chosen: Tensor) -> Novices:
        """The novices of the given indices, in that order."""
        if self.u_NDR is None or self.v_NRD is None:
            return Novices(self.constant_ND[chosen])
        return Novices(self.constant_ND[chosen], self.u_NDR[chosen], self.v_NRD[chosen])

    def output(self, novice: int, inputs_TD: Tensor) -> Tensor:
        """[T, D]: what one novice answers."""
        constant_D = self.constant_ND[novice]
        if self.u_NDR is None or self.v_NRD is None:
            return constant_D.expand(len(inputs_TD), -1)
        return constant_D + inputs_TD.to(constant_D) @ self.v_NRD[novice].T @ self.u_NDR[novice].T


@dataclass(frozen=True)
class CompressionSpec:
    """How the matrices of a layer are stored: rank, and per tensor name and group the number of residual rows kept."""

    rank: int
    kept_rows: dict[str, list[int]]


@dataclass(frozen=True)
class LayerSpec:
    """The structure of a merged layer in a compact checkpoint: enough to build the empty run-time module.

    ``expert_to_group`` is 0..G-1 for the groups of experts, and G..G+N-1 for novices where there are some.
    """

    num_groups: int
    expert_to_group: list[int]
    compression: CompressionSpec | None = None
    num_experts: int | None = None  # rows of the router, where the configuration says another number
    merged: bool = True  # False: the experts are the family's own module, only fewer
    novices: NoviceSpec | None = None


def check_per_expert(layer: LayerId, what: str, values_E: Tensor, experts: int) -> None:
    """Raise ValueError naming layer, expert and value unless there is one finite, non-negative value per expert."""
    if values_E.shape != (experts,):
        raise ValueError(
            f"layer {layer!r}: {what} has shape {tuple(values_E.shape)}, the layer has {experts} experts; "
            "it was collected from another model"
        )
    bad_E = ~torch.isfinite(values_E) | (values_E < 0)
    if bad_E.any():
        expert = int(bad_E.nonzero()[0])
        raise ValueError(f"layer {layer!r}: {what} of expert {expert} is {float(values_E[expert])}")


def chosen_layers(layers: Sequence[LayerId], excluded: Sequence[LayerId]) -> list[LayerId]:
    """The layers that are not left out.

    Raises:
        ValueError: a layer is left out that the model does not have; names it.
    """
    unknown = sorted(set(excluded) - set(layers))
    if unknown:
        raise ValueError(f"merge.exclude_layers names {unknown[0]!r}; the model has {list(layers)}")
    return [layer for layer in layers if layer not in excluded]
