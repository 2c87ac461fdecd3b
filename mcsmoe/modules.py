"""Run-time layers: experts stored once per group, dense or as low-rank factors plus a row-sparse residual.

The router keeps its E outputs; a redirect table sends expert e to group ``expert_to_group[e]``, so merging changes no
routing decision. Groups are computed one after another, each on its own tokens: one pass over the groups present, no
loop over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mcsmoe.projections import DenseProjection, LowRankProjection, PackedProjection, Projection, parameter
from mcsmoe.types import (
    CompressionSpec,
    ExpertActivation,
    ExpertWeights,
    LayerId,
    LayerSpec,
    Novices,
    NoviceSpec,
    Role,
)

_BIAS_ROLE = {Role.INPUT: Role.INPUT_BIAS, Role.OUTPUT: Role.OUTPUT_BIAS}


class NoviceBank(nn.Module):
    """N novices, stacked: ``constant_ND``, and ``u_NDR`` and ``v_NRD`` where they follow the input."""

    def __init__(self, novices: Novices) -> None:
        super().__init__()
        self.constant_ND = parameter(novices.constant_ND)
        self.u_NDR = None if novices.u_NDR is None else parameter(novices.u_NDR)
        self.v_NRD = None if novices.v_NRD is None else parameter(novices.v_NRD)

    @classmethod
    def empty(cls, spec: NoviceSpec, width: int, device: torch.device, dtype: torch.dtype) -> NoviceBank:
        """Uninitialised novices of a structure."""

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, device=device, dtype=dtype)

        count, rank = spec.count, spec.rank
        factors = (empty(count, width, rank), empty(count, rank, width)) if rank else (None, None)
        return cls(Novices(empty(count, width), *factors))

    @property
    def novices(self) -> Novices:
        """What they compute."""
        return Novices(self.constant_ND, self.u_NDR, self.v_NRD)

    def __len__(self) -> int:
        return self.constant_ND.shape[0]

    def forward(self, novice: int, inputs_TD: Tensor) -> Tensor:
        return self.novices.output(novice, inputs_TD)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over the experts of a token are kept in."""
    return torch.promote_types(dtype, torch.float32)


class RedirectedExperts(nn.Module):
    """G stacked experts that answer for E: called with (hidden_TD, expert_TK, weights_TK).

    ``expert_TK`` holds experts 0..E-1, or -1 where a token is not computed (its output is zero). Two experts of a token
    that fall into one group are computed once, with the summed weight.

    Args:
        projections: by tensor name, input projections and exactly one output projection.
        roles: of the projections (INPUT or OUTPUT).
        activation: from the outputs of the input projections to the hidden activation.
        expert_to_group: int64 [E], values 0..G-1.
        dropout: probability, on the hidden activation, in training only.
    """

    expert_to_group: Tensor

    def __init__(
        self,
        projections: Mapping[str, Projection],
        roles: Mapping[str, Role],
        activation: ExpertActivation,
        expert_to_group: Tensor,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(projections)
        self.roles = {name: Role(roles[name]) for name in projections}
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.inputs = [name for name, role in self.roles.items() if role is Role.INPUT]
        (self.output,) = [name for name, role in self.roles.items() if role is Role.OUTPUT]
        # Part of the structure, which the checkpoint keeps in its configuration: not a weight.
        self.register_buffer("expert_to_group", expert_to_group.to(torch.int64), persistent=False)
        self.novices: NoviceBank | None = None

    def projection(self, name: str) -> Projection:
        return self.projections[name]  # type: ignore[return-value]

    @property
    def num_groups(self) -> int:
        return self.projection(self.output).shape[0]

    @property
    def num_slots(self) -> int:
        """Groups and novices: what an expert of the router can be sent to."""
        return self.num_groups + (0 if self.novices is None else len(self.novices))

    def spec(self) -> LayerSpec:
        """What ``empty_projections`` needs to build the same structure.

        Raises:
            ValueError: the residual is still dense; ``pack`` the model first.
        """
        kept: dict[str, list[int]] = {}
        rank = 0
        for name in self.roles:
            projection = self.projection(name)
            if isinstance(projection, LowRankProjection):
                raise ValueError(
                    f"projection {name!r} still stores its residual dense; call mcsmoe.modules.pack(model) first"
                )
            if isinstance(projection, PackedProjection):
                kept[name], rank = list(projection.kept_rows), projection.u_GoR.shape[2]
        return LayerSpec(
            self.num_groups,
            self.expert_to_group.tolist(),
            CompressionSpec(rank, kept) if kept else None,
            novices=None if self.novices is None else self.novices.novices.spec,
        )

    def weights(self) -> ExpertWeights:
        """Detached copies of the dense equivalent, G stacked."""
        tensors: dict[str, Tensor] = {}
        roles: dict[str, Role] = {}
        for name, role in self.roles.items():
            projection = self.projection(name)
            tensors[name], roles[name] = projection.dense().clone(), role
            if projection.bias_Go is not None:
                tensors[f"{name}_bias"], roles[f"{name}_bias"] = projection.bias_Go.detach().clone(), _BIAS_ROLE[role]
        return ExpertWeights(tensors, roles)

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor, weights_TK: Tensor) -> Tensor:
        shape, hidden_TD = hidden_TD.shape, hidden_TD.reshape(-1, hidden_TD.shape[-1])
        tokens, groups = hidden_TD.shape[0], self.num_slots
        group_TK = torch.where(expert_TK < 0, groups, self.expert_to_group[expert_TK.clamp(min=0)])
        # Column G collects what is not computed.
        present_TG = torch.zeros(tokens, groups + 1, dtype=torch.bool, device=hidden_TD.device)
        present_TG = present_TG.scatter_(1, group_TK, True)[:, :groups]
        weights_TK = weights_TK.to(_sum_dtype(weights_TK.dtype))
        weight_TG = weights_TK.new_zeros(tokens, groups + 1).scatter_add(1, group_TK, weights_TK)
        return self._combine(hidden_TD, present_TG, weight_TG).reshape(shape)

    def _combine(self, hidden_TD: Tensor, present_TG: Tensor, weight_TG: Tensor) -> Tensor:
        """[T, D]: every group on the tokens that are present there, weighted and summed; one pass over the groups.

        Half precision is summed in float32 and rounded once, as the library's grouped kernel does, so that the order of
        the groups and how many experts of a token fall into one make no difference.
        """
        pair_group, pair_token = present_TG.t().nonzero(as_tuple=True)
        pair_weight = weight_TG[pair_token, pair_group, None]
        counts = present_TG.sum(dim=0).tolist()
        inputs_ND = hidden_TD[pair_token]
        output_TD = torch.zeros_like(hidden_TD, dtype=_sum_dtype(hidden_TD.dtype))
        start = 0
        for group, count in enumerate(counts):
            if count == 0:
                continue
            here = slice(start, start + count)
            start += count
            outputs = self._expert(group, inputs_ND[here]) * pair_weight[here]
            output_TD.index_add_(0, pair_token[here], outputs.to(output_TD.dtype))
        return output_TD.to(hidden_TD.dtype)

    def _expert(self, group: int, inputs_ND: Tensor) -> Tensor:
        if self.novices is not None and group >= self.num_groups:
            return self.novices(group - self.num_groups, inputs_ND)  # type: ignore[no-any-return]
        hidden_NF = self.activation({name: self.projection(name)(group, inputs_ND) for name in self.inputs})
        return self.projection(self.output)(group, self.dropout(hidden_NF))


class OneHotRedirectedExperts(RedirectedExperts):
    """The same, called as Switch calls its experts: (hidden_TD, one-hot dispatch [T, 1, E], weights [T, 1]).

    A token over its expert's capacity has an all-zero dispatch row and gets a zero output.
    """

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor, weights_TK: Tensor) -> Tensor:
        dispatch_TE = expert_TK[:, 0]
        expert_T = torch.where(dispatch_TE.any(dim=1), dispatch_TE.argmax(dim=1), -1)
        return super().forward(hidden_TD, expert_T[:, None], weights_TK)


class ScaledInputRedirectedExperts(RedirectedExperts):
    """The same, called as Llama-4 calls its experts: with the tokens of all experts, one below the other [E * T, D].

    A token is scaled by its score before it comes, and is zero for an expert that was not chosen, whose output is then
    zero too. Two experts of a token that fall into one group read it differently scaled, so both are computed.
    """

    def forward(self, hidden_ND: Tensor) -> Tensor:  # type: ignore[override]
        experts = self.expert_to_group.shape[0]
        expert_N = torch.arange(experts, device=hidden_ND.device).repeat_interleave(hidden_ND.shape[0] // experts)
        expert_N = torch.where((hidden_ND != 0).any(dim=1), expert_N, -1)
        return super().forward(hidden_ND, expert_N[:, None], hidden_ND.new_ones(hidden_ND.shape[0], 1))


class TopTwoRedirectedExperts(RedirectedExperts):
    """The same, called as NLLB-MoE calls its experts: (hidden_TD, dispatch of the first choice, weights_TE).

    A token is computed by every expert whose weight for it is not zero, so one over capacity is not. ``masking`` is the
    probability of expert output masking: outputs are dropped in training and scaled by 1 - ``masking`` otherwise.
    """

    def __init__(
        self,
        projections: Mapping[str, Projection],
        roles: Mapping[str, Role],
        activation: ExpertActivation,
        expert_to_group: Tensor,
        dropout: float = 0.0,
        masking: float = 0.0,
    ) -> None:
        super().__init__(projections, roles, activation, expert_to_group, dropout)
        self.masking = nn.Dropout(masking)

    def forward(self, hidden_TD: Tensor, _first_TE: Tensor, weights_TE: Tensor) -> Tensor:
        weights_TE = weights_TE.to(_sum_dtype(weights_TE.dtype))
        empty_TG = weights_TE.new_zeros(hidden_TD.shape[0], self.num_slots)
        weight_TG = empty_TG.index_add(1, self.expert_to_group, weights_TE)
        present_TG = empty_TG.detach().index_add(1, self.expert_to_group, (weights_TE != 0).to(weights_TE.dtype)) > 0
        return self._combine(hidden_TD, present_TG, weight_TG)

    def _expert(self, group: int, inputs_ND: Tensor) -> Tensor:
        outputs_ND = super()._expert(group, inputs_ND)
        return self.masking(outputs_ND) if self.training else outputs_ND * (1 - self.masking.p)


def dense_projections(weights: ExpertWeights) -> dict[str, Projection]:
    """One dense projection per matrix of ``weights``, its bias (``<name>_bias``) with it."""
    return {
        name: DenseProjection(weights.tensors[name], weights.tensors.get(f"{name}_bias"))
        for name in weights.names(Role.INPUT, Role.OUTPUT)
    }


def empty_projections(
    spec: LayerSpec,
    shapes: Mapping[str, tuple[int, int]],
    biased: Sequence[str] = (),
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Projection]:
    """Uninitialised projections of the structure ``spec``; ``shapes`` gives (o, i) by tensor name."""

    def empty(*size: int) -> Tensor:
        return torch.empty(*size, device=device, dtype=dtype)

    made: dict[str, Projection] = {}
    for name, (out, inner) in shapes.items():
        bias = empty(spec.num_groups, out) if name in biased else None
        if spec.compression is None:
            made[name] = DenseProjection(empty(spec.num_groups, out, inner), bias)
        else:
            rank, kept = spec.compression.rank, spec.compression.kept_rows[name]
            rows = sum(kept)
            index = torch.empty(rows, device=device, dtype=torch.int32)
            factors = empty(spec.num_groups, out, rank), empty(spec.num_groups, rank, inner)
            made[name] = PackedProjection(*factors, empty(rows, inner), index, kept, bias)
    return made


def check_redirect(layer: LayerId, expert_to_group: Tensor, num_experts: int, num_groups: int) -> None:
    """Raise ValueError naming layer and expert unless all experts are redirected and no group is idle."""
    if expert_to_group.shape != (num_experts,):
        raise ValueError(
            f"layer {layer!r}: the redirect table has shape {tuple(expert_to_group.shape)}, not ({num_experts},)"
        )
    for expert, group in enumerate(expert_to_group.tolist()):
        if not 0 <= group < num_groups:
            raise ValueError(
                f"layer {layer!r}: expert {expert} goes to group {group}, but groups are 0..{num_groups - 1}"
            )
    missing = sorted(set(range(num_groups)) - set(expert_to_group.tolist()))
    if missing:
        raise ValueError(f"layer {layer!r}: no expert is redirected to group {missing[0]}; leave it out")


def residuals(model: nn.Module) -> dict[str, nn.Parameter]:
    """Dense trainable residuals [G, o, i] by parameter name, for a ``ResidualPruner``; empty once packed."""
    return {
        f"{path}.residual_Goi": module.residual_Goi
        for path, module in model.named_modules()
        if isinstance(module, LowRankProjection)
    }


def pack(model: nn.Module) -> nn.Module:
    """Replace every dense residual in ``model`` by its live rows, in place; the function computed stays the same."""
    for module in list(model.modules()):
        if isinstance(module, RedirectedExperts):
            for name in module.roles:
                projection = module.projection(name)
                if isinstance(projection, LowRankProjection):
                    module.projections[name] = projection.packed().train(projection.training)
    return model
