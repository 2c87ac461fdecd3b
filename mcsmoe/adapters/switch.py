"""Switch Transformers: top-1 routing with a per-sequence capacity, experts wi [F, D] and wo [D, F] without biases."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersPreTrainedModel,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from mcsmoe.adapters.base import Adapter, Capture
from mcsmoe.modules import (
    LowRankProjection,
    OneHotRedirectedExperts,
    Projection,
    check_redirect,
    dense_projections,
    empty_projections,
)
from mcsmoe.types import (
    ExpertActivation,
    ExpertWeights,
    LayerId,
    LayerSpec,
    LowRankFactors,
    Role,
    RoutedBatch,
    RouterWeights,
)

ROLES = {"wi": Role.INPUT, "wo": Role.OUTPUT}
_IGNORED_LABEL = -100
_NEVER = -1e9  # a router bias whose probability is exactly zero, and which sums and products keep finite


class _WiActivation:
    """The model's activation function applied to ``wi``; a class so that models stay picklable and copyable."""

    def __init__(self, function: nn.Module) -> None:
        self.function = function

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return cast(Tensor, self.function(outputs["wi"]))


class SwitchAdapter(Adapter):
    """Encoder-decoder and encoder-only Switch models; encoder and decoder may differ in depth and sparse step."""

    name: ClassVar[str] = "switch_transformers"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, SwitchTransformersPreTrainedModel) and any(
            isinstance(module, SwitchTransformersSparseMLP) for module in model.modules()
        )

    # -- structure -----------------------------------------------------------------------------------------------
    def layers(self, model: nn.Module) -> list[LayerId]:
        return [path for path, module in model.named_modules() if isinstance(module, SwitchTransformersSparseMLP)]

    def _mlp(self, model: nn.Module, layer: LayerId) -> SwitchTransformersSparseMLP:
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            module = None
        if not isinstance(module, SwitchTransformersSparseMLP):
            raise ValueError(f"layer {layer!r} is not a sparse layer of this model; it has {self.layers(model)}")
        return module

    def _shapes(self, model: nn.Module, layer: LayerId) -> dict[str, tuple[int, int]]:
        """(o, i) of each matrix of the layer, from what is installed now."""
        experts = self._mlp(model, layer).experts
        if isinstance(experts, OneHotRedirectedExperts):
            return {name: experts.projection(name).shape[1:] for name in ROLES}
        return {name: tuple(getattr(experts["expert_0"], name).weight.shape) for name in ROLES}

    def num_experts(self, model: nn.Module, layer: LayerId) -> int:
        return int(self._mlp(model, layer).router.num_experts)

    def expert_to_group(self, model: nn.Module, layer: LayerId) -> Tensor:
        experts = self._mlp(model, layer).experts
        if isinstance(experts, OneHotRedirectedExperts):
            return experts.expert_to_group.detach().cpu().clone()
        return torch.arange(self.num_experts(model, layer))

    def activation(self, model: nn.Module, layer: LayerId) -> ExpertActivation:
        experts = self._mlp(model, layer).experts
        if isinstance(experts, OneHotRedirectedExperts):
            return experts.activation
        return _WiActivation(experts["expert_0"].act)

    # -- weights -------------------------------------------------------------------------------------------------
    def read_experts(self, model: nn.Module, layer: LayerId) -> ExpertWeights:
        experts = self._mlp(model, layer).experts
        if isinstance(experts, OneHotRedirectedExperts):
            return experts.weights()
        members = [experts[f"expert_{index}"] for index in range(self.num_experts(model, layer))]
        tensors = {name: torch.stack([getattr(one, name).weight.detach() for one in members]) for name in ROLES}
        return ExpertWeights(tensors, dict(ROLES))

    def write_experts(
        self, model: nn.Module, layer: LayerId, weights: ExpertWeights, expert_to_group: Tensor | None = None
    ) -> None:
        self._check_shapes(model, layer, weights)
        if expert_to_group is None:
            self._write_values(model, layer, weights)
            return
        check_redirect(layer, expert_to_group, self.num_experts(model, layer), weights.num_experts)
        device, dtype = self._placement(model, layer)
        copies = weights.map(lambda _, tensor: tensor.detach().to(device=device, dtype=dtype, copy=True))
        self._replace(model, layer, dense_projections(copies), expert_to_group)

    @torch.no_grad()
    def _write_values(self, model: nn.Module, layer: LayerId, weights: ExpertWeights) -> None:
        experts = self._mlp(model, layer).experts
        if isinstance(experts, OneHotRedirectedExperts):
            if weights.num_experts != experts.num_groups:
                raise ValueError(f"layer {layer!r}: {weights.num_experts} experts for {experts.num_groups} groups")
            for name in ROLES:
                target = getattr(experts.projection(name), "weight_Goi", None)
                if target is None:
                    raise ValueError(
                        f"layer {layer!r} is compressed; write dense experts with their redirect table, or use "
                        "write_compressed"
                    )
                target.copy_(weights.tensors[name])
            return
        if weights.num_experts != self.num_experts(model, layer):
            raise ValueError(
                f"layer {layer!r}: {weights.num_experts} experts for {self.num_experts(model, layer)}; "
                "give expert_to_group to install merged experts"
            )
        for name in ROLES:
            for index, matrix in enumerate(weights.tensors[name]):
                getattr(experts[f"expert_{index}"], name).weight.copy_(matrix)

    def write_compressed(
        self,
        model: nn.Module,
        layer: LayerId,
        factors: Mapping[str, LowRankFactors],
        biases: Mapping[str, Tensor],
        expert_to_group: Tensor,
    ) -> None:
        if set(factors) != set(ROLES) or biases:
            raise ValueError(
                f"layer {layer!r}: factors for {sorted(ROLES)} and no biases are needed, got {sorted(factors)}"
            )
        shapes = self._shapes(model, layer)
        for name, parts in factors.items():
            if tuple(parts.residual_Goi.shape[1:]) != shapes[name]:
                raise ValueError(
                    f"layer {layer!r}: the residual of {name!r} is {tuple(parts.residual_Goi.shape[1:])}, "
                    f"the layer needs {shapes[name]}"
                )
        groups = {parts.residual_Goi.shape[0] for parts in factors.values()}
        if len(groups) != 1:
            raise ValueError(f"layer {layer!r}: factors stack {sorted(groups)} groups; all matrices need the same")
        check_redirect(layer, expert_to_group, self.num_experts(model, layer), groups.pop())
        device, dtype = self._placement(model, layer)

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device=device, dtype=dtype, copy=True)

        projections: dict[str, Projection] = {}
        for name in ROLES:
            parts = factors[name]
            projections[name] = LowRankProjection(
                LowRankFactors(copy(parts.u_GoR), copy(parts.v_GRi), copy(parts.residual_Goi))
            )
        self._replace(model, layer, projections, expert_to_group)

    def install(self, model: nn.Module, layer: LayerId, spec: LayerSpec) -> None:
        table = torch.tensor(spec.expert_to_group, dtype=torch.int64, device="cpu")
        check_redirect(layer, table, self.num_experts(model, layer), spec.num_groups)
        device, dtype = self._placement(model, layer)
        projections = empty_projections(spec, self._shapes(model, layer), device=device, dtype=dtype)
        self._replace(model, layer, projections, table)

    def _replace(self, model: nn.Module, layer: LayerId, projections: Mapping[str, Projection], table: Tensor) -> None:
        mlp = self._mlp(model, layer)
        old = mlp.experts
        dropout = old.dropout.p if isinstance(old, OneHotRedirectedExperts) else old["expert_0"].dropout.p
        device, _ = self._placement(model, layer)
        # On meta the table still holds its numbers: they are structure, and nothing would fill them in later.
        table = table if device.type == "meta" else table.to(device)
        made = OneHotRedirectedExperts(projections, ROLES, self.activation(model, layer), table, dropout)
        mlp.experts = made.train(old.training)

    def _placement(self, model: nn.Module, layer: LayerId) -> tuple[torch.device, torch.dtype]:
        parameter = next(self._mlp(model, layer).experts.parameters())
        return parameter.device, parameter.dtype

    def _check_shapes(self, model: nn.Module, layer: LayerId, weights: ExpertWeights) -> None:
        shapes = self._shapes(model, layer)
        if set(weights.tensors) != set(ROLES):
            raise ValueError(f"layer {layer!r}: tensors {sorted(weights.tensors)} given, {sorted(ROLES)} needed")
        for name, shape in shapes.items():
            if tuple(weights.tensors[name].shape[1:]) != shape:
                raise ValueError(
                    f"layer {layer!r}: tensor {name!r} is {tuple(weights.tensors[name].shape[1:])} per expert, "
                    f"the layer needs {shape}"
                )

    # -- router --------------------------------------------------------------------------------------------------
    def read_router(self, model: nn.Module, layer: LayerId) -> RouterWeights:
        classifier = self._mlp(model, layer).router.classifier
        bias = None if classifier.bias is None else classifier.bias.detach().clone()
        return RouterWeights(classifier.weight.detach().clone(), bias)

    def mask_router(self, model: nn.Module, layer: LayerId, dropped_E: Tensor) -> None:
        # The stock router's own bias, so that the checkpoint needs nothing new; the configuration asks for it everywhere.
        config: Any = model.config
        config.router_bias = True
        for path in self.layers(model):
            classifier = self._mlp(model, path).router.classifier
            if classifier.bias is None:
                classifier.bias = nn.Parameter(classifier.weight.new_zeros(classifier.out_features))
        bias_E = self._mlp(model, layer).router.classifier.bias
        with torch.no_grad():
            bias_E.masked_fill_(dropped_E.to(bias_E.device), _NEVER)

    def router_parameters(self, model: nn.Module) -> list[str]:
        return [
            f"{layer}.router.{name}"
            for layer in self.layers(model)
            for name, _ in self._mlp(model, layer).router.named_parameters()
        ]

    # -- capture -------------------------------------------------------------------------------------------------
    @contextmanager
    def capture(self, model: nn.Module, detach: bool = True) -> Iterator[Capture]:
        captured = Capture()
        call: dict[str, Any] = {}
        signature = inspect.signature(model.forward)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.batches.clear()
            call.clear()
            call.update(signature.bind_partial(*args, **kwargs).arguments)

        def record(layer: LayerId, router: SwitchTransformersTop1Router, hidden: Tensor, result: Any) -> None:
            dispatch_BSE, weights_BS1, logits_BSE = result
            experts = logits_BSE.shape[-1]
            if logits_BSE.shape != dispatch_BSE.shape:
                raise ValueError(
                    f"layer {layer!r}: router logits have shape {tuple(logits_BSE.shape)}, not tokens x experts "
                    f"{tuple(dispatch_BSE.shape)}; this version of transformers is not supported (5.23 is)"
                )
            # The router's own arithmetic: rounded to the model's dtype before the maximum is taken.
            probabilities = logits_BSE.detach().softmax(dim=-1, dtype=router.dtype).to(hidden.dtype)
            wanted_TK = probabilities.reshape(-1, experts).argmax(dim=-1, keepdim=True)
            # An over-capacity token has an empty dispatch row, whose argmax would credit expert 0.
            dispatched_TK = dispatch_BSE.reshape(-1, experts).any(dim=-1, keepdim=True)
            batch = RoutedBatch(
                inputs_TD=hidden.reshape(-1, hidden.shape[-1]),
                logits_TE=logits_BSE.reshape(-1, experts),
                wanted_TK=wanted_TK,
                chosen_TK=torch.where(dispatched_TK, wanted_TK, -1),
                weights_TK=weights_BS1.reshape(-1, 1),
                valid_T=_valid(call, layer, hidden),
            )
            captured.batches[layer] = _detached(batch) if detach else batch

        handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
        for layer in self.layers(model):
            handles.append(
                self._mlp(model, layer).router.register_forward_hook(
                    lambda router, inputs, result, layer=layer: record(layer, router, inputs[0], result)
                )
            )
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def _valid(call: Mapping[str, Any], layer: LayerId, hidden_BSD: Tensor) -> Tensor:
    """bool [B * S]: encoder positions with attention, decoder positions with a label (else with attention)."""
    positions = hidden_BSD.shape[:2]
    if not layer.split(".block.")[0].endswith("decoder"):
        mask = call.get("attention_mask")
    elif call.get("labels") is not None:
        mask = call["labels"] != _IGNORED_LABEL
    else:
        mask = call.get("decoder_attention_mask")
    if mask is None:
        return torch.ones(positions, dtype=torch.bool, device=hidden_BSD.device).flatten()
    # With a cache the mask also covers earlier positions; only the newest ones pass through the layer.
    return mask.to(device=hidden_BSD.device, dtype=torch.bool)[:, -positions[1] :].reshape(-1)


def _detached(batch: RoutedBatch) -> RoutedBatch:
    return RoutedBatch(**{name: tensor.detach() for name, tensor in vars(batch).items()})
