"""What the adapters of gated and biased experts share: experts written, merged and compressed behind a redirect table.

A family says how its own experts store their weights; everything that comes after merging is the same for all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters import dropping
from mcsmoe.adapters.base import Adapter, Capture
from mcsmoe.adapters.dropping import NEVER, Place
from mcsmoe.modules import (
    LowRankProjection,
    NoviceBank,
    Projection,
    RedirectedExperts,
    check_redirect,
    dense_projections,
    empty_projections,
)
from mcsmoe.types import ExpertWeights, LayerId, LayerSpec, LowRankFactors, Novices, Role

__all__ = ["NEVER", "ExpertShape", "Place", "RedirectingAdapter", "newest_positions"]


@dataclass(frozen=True)
class ExpertShape:
    """One expert of a layer: (o, i) and role of each matrix by tensor name, and which matrices have a bias."""

    matrices: dict[str, tuple[int, int]]
    roles: dict[str, Role]
    biased: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape per expert of every tensor, biases included."""
        return self.matrices | {f"{name}_bias": self.matrices[name][:1] for name in self.biased}

    def all_roles(self) -> dict[str, Role]:
        """Role of every tensor, biases included."""
        bias = {Role.INPUT: Role.INPUT_BIAS, Role.OUTPUT: Role.OUTPUT_BIAS}
        return self.roles | {f"{name}_bias": bias[self.roles[name]] for name in self.biased}


class RedirectingAdapter(Adapter):
    """Everything about merged experts; a family adds how to find, read and fill its own."""

    # -- what a family adds --------------------------------------------------------------------------------------
    @abstractmethod
    def _experts_name(self, model: nn.Module, layer: LayerId) -> str:
        """Attribute of the sparse block that holds its experts; ValueError naming the layer if there is none."""

    @abstractmethod
    def _stock_shape(self, experts: nn.Module) -> ExpertShape: ...

    @abstractmethod
    def _stock_read(self, experts: nn.Module) -> ExpertWeights: ...

    @abstractmethod
    def _stock_write(self, experts: nn.Module, weights: ExpertWeights) -> None: ...

    @abstractmethod
    def _redirected(
        self, experts: nn.Module, projections: Mapping[str, Projection], roles: dict[str, Role], table: Tensor
    ) -> RedirectedExperts:
        """The run-time module that takes the place of ``experts``, which may be stock or redirected already."""

    @abstractmethod
    def _place(self, model: nn.Module, layer: LayerId) -> Place:
        """Where the sparse block keeps its experts and its router; ValueError naming the layer if that is not clear."""

    # -- structure -----------------------------------------------------------------------------------------------
    def _experts(self, model: nn.Module, layer: LayerId) -> nn.Module:
        name = self._experts_name(model, layer)
        return getattr(model.get_submodule(layer), name)

    def experts_path(self, model: nn.Module, layer: LayerId) -> str:
        return f"{layer}.{self._experts_name(model, layer)}"

    def _shape(self, model: nn.Module, layer: LayerId) -> ExpertShape:
        experts = self._experts(model, layer)
        if not isinstance(experts, RedirectedExperts):
            return self._stock_shape(experts)
        projections = {name: experts.projection(name) for name in experts.roles}
        return ExpertShape(
            {name: projection.shape[1:] for name, projection in projections.items()},
            dict(experts.roles),
            tuple(name for name, projection in projections.items() if projection.bias_Go is not None),
        )

    def expert_to_group(self, model: nn.Module, layer: LayerId) -> Tensor:
        experts = self._experts(model, layer)
        if isinstance(experts, RedirectedExperts):
            return experts.expert_to_group.detach().cpu().clone()
        return torch.arange(self.num_experts(model, layer), device="cpu")

    # -- weights -------------------------------------------------------------------------------------------------
    def read_experts(self, model: nn.Module, layer: LayerId) -> ExpertWeights:
        experts = self._experts(model, layer)
        return experts.weights() if isinstance(experts, RedirectedExperts) else self._stock_read(experts)

    def write_experts(
        self, model: nn.Module, layer: LayerId, weights: ExpertWeights, expert_to_group: Tensor | None = None
    ) -> None:
        self._check_shapes(model, layer, weights)
        if expert_to_group is None:
            self._write_values(model, layer, weights)
            return
        self._check_table(model, layer, expert_to_group, weights.num_experts)
        device, dtype = self._placement(model, layer)
        copies = weights.map(lambda _, tensor: tensor.detach().to(device=device, dtype=dtype, copy=True))
        self._replace(model, layer, dense_projections(copies), expert_to_group)

    @torch.no_grad()
    def _write_values(self, model: nn.Module, layer: LayerId, weights: ExpertWeights) -> None:
        experts = self._experts(model, layer)
        room = experts.num_groups if isinstance(experts, RedirectedExperts) else self.num_experts(model, layer)
        if weights.num_experts != room:
            raise ValueError(
                f"layer {layer!r}: {weights.num_experts} experts for {room}; give expert_to_group to merge them"
            )
        if not isinstance(experts, RedirectedExperts):
            self._stock_write(experts, weights)
            return
        for name in experts.roles:
            projection = experts.projection(name)
            target = getattr(projection, "weight_Goi", None)
            if target is None:
                raise ValueError(
                    f"layer {layer!r} is compressed; write dense experts with their redirect table, or use "
                    "write_compressed"
                )
            target.copy_(weights.tensors[name])
            if projection.bias_Go is not None:
                projection.bias_Go.copy_(weights.tensors[f"{name}_bias"])

    def write_compressed(
        self,
        model: nn.Module,
        layer: LayerId,
        factors: Mapping[str, LowRankFactors],
        biases: Mapping[str, Tensor],
        expert_to_group: Tensor,
    ) -> None:
        shape = self._shape(model, layer)
        needed = {f"{name}_bias" for name in shape.biased}
        if set(factors) != set(shape.matrices) or set(biases) != needed:
            raise ValueError(
                f"layer {layer!r}: factors for {sorted(shape.matrices)} and biases {sorted(needed)} are needed, got "
                f"{sorted(factors)} and {sorted(biases)}"
            )
        for name, parts in factors.items():
            if tuple(parts.residual_Goi.shape[1:]) != shape.matrices[name]:
                raise ValueError(
                    f"layer {layer!r}: the residual of {name!r} is {tuple(parts.residual_Goi.shape[1:])}, "
                    f"the layer needs {shape.matrices[name]}"
                )
        groups = {parts.residual_Goi.shape[0] for parts in factors.values()} | {t.shape[0] for t in biases.values()}
        if len(groups) != 1:
            raise ValueError(f"layer {layer!r}: {sorted(groups)} groups are stacked; all tensors need the same")
        self._check_table(model, layer, expert_to_group, groups.pop())
        device, dtype = self._placement(model, layer)

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device=device, dtype=dtype, copy=True)

        projections: dict[str, Projection] = {}
        for name in shape.matrices:
            parts, bias = factors[name], biases.get(f"{name}_bias")
            copies = LowRankFactors(copy(parts.u_GoR), copy(parts.v_GRi), copy(parts.residual_Goi))
            projections[name] = LowRankProjection(copies, None if bias is None else copy(bias))
        self._replace(model, layer, projections, expert_to_group)

    # -- fewer experts -------------------------------------------------------------------------------------------
    def expert_sets(self, model: nn.Module, layer: LayerId) -> int:
        return dropping.expert_sets(model.get_submodule(layer).get_submodule(self._place(model, layer).router))

    def check_dropping(self, model: nn.Module, layer: LayerId, kept: int) -> None:
        experts, sets = self.num_experts(model, layer), self.expert_sets(model, layer)
        if kept >= experts:
            return
        # The best there is: as many in each set, or full sets where the number does not divide.
        each = kept // sets if kept % sets == 0 else experts // sets
        rank_E = torch.arange(experts) % (experts // sets)
        kept_E = rank_E < each
        kept_E &= kept_E.cumsum(dim=0) <= kept
        self._droppable(model, layer, kept_E)

    def _droppable(self, model: nn.Module, layer: LayerId, kept_E: Tensor) -> bool:
        """Whether ``layer`` is left with a router of fewer rows; False where its router is masked instead."""
        place, block = self._place(model, layer), model.get_submodule(layer)
        why = dropping.problem(model, block, place, kept_E)
        if why is not None:
            raise ValueError(f"layer {layer!r}: {why}")
        kept = kept_E.nonzero()[:, 0]
        whole = not isinstance(self._experts(model, layer), RedirectedExperts)
        try:
            if whole and dropping.slicing_is_exact(model, layer, place, len(kept_E), kept):
                return True
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error
        if not self._can_mask(model, layer):
            sets = self.expert_sets(model, layer)
            why = (
                f"its router first chooses among {sets} sets of experts, and {int(kept_E.sum())} are not kept equally in "
                f"each; keep a multiple of {sets}"
                if sets > 1
                else "it is merged already, and its router has no bias to keep it from choosing an expert"
            )
            raise ValueError(f"layer {layer!r}: {why}, or prune with a redirect (merge method 'prune')")
        return False

    def _can_mask(self, model: nn.Module, layer: LayerId) -> bool:
        return True

    def drop_experts(
        self, model: nn.Module, layer: LayerId, weights: ExpertWeights, expert_to_group: Tensor, dropped_E: Tensor
    ) -> None:
        self._check_shapes(model, layer, weights)
        if not self._droppable(model, layer, ~dropped_E):
            super().drop_experts(model, layer, weights, expert_to_group, dropped_E)
            return
        kept = (~dropped_E).nonzero()[:, 0]
        self._slice(model, layer, kept)
        self._write_values(model, layer, weights.select(expert_to_group[kept]))

    def slices(self, model: nn.Module, layer: LayerId, kept: Tensor) -> dropping.Slices | None:
        experts = self.num_experts(model, layer)
        kept_E = torch.zeros(experts, dtype=torch.bool).index_fill_(0, kept, True)
        if not self._droppable(model, layer, kept_E):
            return None
        return dropping.slices(model, layer, self._place(model, layer), experts, kept)

    def leave(self, model: nn.Module, layer: LayerId, kept: Tensor) -> None:
        self._slice(model, layer, kept)

    def _slice(self, model: nn.Module, layer: LayerId, kept: Tensor) -> None:
        dropping.slice_layer(model, layer, self._place(model, layer), self.num_experts(model, layer), kept)

    def install(self, model: nn.Module, layer: LayerId, spec: LayerSpec) -> None:
        if spec.num_experts is not None and spec.num_experts < self.num_experts(model, layer):
            self._slice(model, layer, torch.arange(spec.num_experts, device="cpu"))
        if not spec.merged:
            return
        table = torch.tensor(spec.expert_to_group, dtype=torch.int64, device="cpu")
        slots = spec.num_groups + (0 if spec.novices is None else spec.novices.count)
        check_redirect(layer, table, self.num_experts(model, layer), slots)
        shape = self._shape(model, layer)
        if spec.compression is not None and set(spec.compression.kept_rows) != set(shape.matrices):
            raise ValueError(
                f"layer {layer!r}: compressed tensors {sorted(spec.compression.kept_rows)} described, "
                f"{sorted(shape.matrices)} needed"
            )
        device, dtype = self._placement(model, layer)
        projections = empty_projections(spec, shape.matrices, shape.biased, device=device, dtype=dtype)
        bank = None
        if spec.novices is not None:
            width = next(shape.matrices[name][0] for name, role in shape.roles.items() if role is Role.OUTPUT)
            bank = NoviceBank.empty(spec.novices, width, device, dtype)
        self._replace(model, layer, projections, table, bank)

    def write_novices(
        self, model: nn.Module, layer: LayerId, weights: ExpertWeights, expert_to_group: Tensor, novices: Novices
    ) -> None:
        self._check_shapes(model, layer, weights)
        slots = weights.num_experts + novices.spec.count
        check_redirect(layer, expert_to_group, self.num_experts(model, layer), slots)
        device, dtype = self._placement(model, layer)

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device=device, dtype=dtype, copy=True)

        factors = (None if factor is None else copy(factor) for factor in (novices.u_NDR, novices.v_NRD))
        bank = NoviceBank(Novices(copy(novices.constant_ND), *factors))
        copies = weights.map(lambda _, tensor: copy(tensor))
        self._replace(model, layer, dense_projections(copies), expert_to_group, bank)

    def read_novices(self, model: nn.Module, layer: LayerId) -> Novices | None:
        experts = self._experts(model, layer)
        if not isinstance(experts, RedirectedExperts) or experts.novices is None:
            return None
        held = experts.novices.novices
        factors = (None if factor is None else factor.detach().clone() for factor in (held.u_NDR, held.v_NRD))
        return Novices(held.constant_ND.detach().clone(), *factors)

    def _check_table(self, model: nn.Module, layer: LayerId, table: Tensor, groups: int) -> None:
        """Raise ValueError unless ``table`` sends every expert to one of ``groups`` or to a novice that is there."""
        old = self._experts(model, layer)
        refers = isinstance(old, RedirectedExperts) and old.novices is not None and int(table.max()) >= groups
        slots = groups + (len(old.novices) if refers else 0)  # type: ignore[arg-type]
        check_redirect(layer, table, self.num_experts(model, layer), slots)

    def _replace(
        self,
        model: nn.Module,
        layer: LayerId,
        projections: Mapping[str, Projection],
        table: Tensor,
        novices: NoviceBank | None = None,
    ) -> None:
        name, device = self._experts_name(model, layer), self._placement(model, layer)[0]
        old = self._experts(model, layer)
        # On meta the table still holds its numbers: they are structure, and nothing would fill them in later.
        table = table if device.type == "meta" else table.to(device)
        made = self._redirected(old, projections, self._shape(model, layer).roles, table)
        # Novices that the table still names stay: experts may be written anew around them.
        held = old.novices if isinstance(old, RedirectedExperts) and int(table.max()) >= made.num_groups else None
        made.novices = held if novices is None else novices
        setattr(model.get_submodule(layer), name, made.train(old.training))

    def _placement(self, model: nn.Module, layer: LayerId) -> tuple[torch.device, torch.dtype]:
        parameter = next(self._experts(model, layer).parameters())
        return parameter.device, parameter.dtype

    def _check_shapes(self, model: nn.Module, layer: LayerId, weights: ExpertWeights) -> None:
        shapes = self._shape(model, layer).tensors
        if set(weights.tensors) != set(shapes):
            raise ValueError(f"layer {layer!r}: tensors {sorted(weights.tensors)} given, {sorted(shapes)} needed")
        for name, shape in shapes.items():
            if tuple(weights.tensors[name].shape[1:]) != shape:
                raise ValueError(
                    f"layer {layer!r}: tensor {name!r} is {tuple(weights.tensors[name].shape[1:])} per expert, "
                    f"the layer needs {shape}"
                )


@contextmanager
def recording(model: nn.Module, hooks: list[Any], captured: Capture, call: dict[str, Any]) -> Iterator[Capture]:
    """Yields ``captured``; it is emptied and ``call`` filled with the model's arguments at every forward pass."""
    import inspect

    signature = inspect.signature(model.forward)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.batches.clear()
        call.clear()
        call.update(signature.bind_partial(*args, **kwargs).arguments)

    hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def newest_positions(mask_BS: Tensor | None, layer: LayerId, inputs_TD: Tensor) -> Tensor:
    """bool [T]: ``mask_BS`` at the positions that pass through the layer; all of them if there is no mask.

    With a cache the mask also covers earlier positions; only the newest ones pass through.

    Raises:
        ValueError: the mask is not [rows, positions], or the layer sees other tokens than it covers; names the layer.
    """
    tokens = inputs_TD.shape[0]
    if mask_BS is None:
        return torch.ones(tokens, dtype=torch.bool, device=inputs_TD.device)
    if not isinstance(mask_BS, Tensor) or mask_BS.ndim != 2:
        found = tuple(mask_BS.shape) if isinstance(mask_BS, Tensor) else type(mask_BS).__name__
        raise ValueError(f"layer {layer!r}: the attention mask is {found}; give the tokenizer's, rows x tokens")
    rows, length = mask_BS.shape
    if tokens % rows or tokens // rows > length:
        raise ValueError(f"layer {layer!r} sees {tokens} tokens, which is not what a mask of {rows} x {length} covers")
    return mask_BS.to(device=inputs_TD.device, dtype=torch.bool)[:, length - tokens // rows :].reshape(-1)
