"""Switch Transformers: top-1 routing with a per-sequence capacity, experts wi [F, D] and wo [D, F] without biases."""

from __future__ import annotations

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

from mcsmoe.adapters.base import Capture
from mcsmoe.adapters.redirecting import (
    NEVER,
    ExpertShape,
    Place,
    RedirectingAdapter,
    newest_positions,
    recording,
)
from mcsmoe.modules import OneHotRedirectedExperts, Projection, RedirectedExperts
from mcsmoe.types import IGNORED, ExpertActivation, ExpertWeights, LayerId, Role, RoutedBatch, RouterWeights

ROLES = {"wi": Role.INPUT, "wo": Role.OUTPUT}


class _WiActivation:
    """The model's activation function applied to ``wi``; a class so that models stay picklable and copyable."""

    def __init__(self, function: nn.Module) -> None:
        self.function = function

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return cast(Tensor, self.function(outputs["wi"]))


class SwitchAdapter(RedirectingAdapter):
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

    def _experts_name(self, model: nn.Module, layer: LayerId) -> str:
        self._mlp(model, layer)
        return "experts"

    def _place(self, model: nn.Module, layer: LayerId) -> Place:
        return Place(self._experts_name(model, layer), "router", "classifier")

    def num_experts(self, model: nn.Module, layer: LayerId) -> int:
        return int(self._mlp(model, layer).router.num_experts)

    def activation(self, model: nn.Module, layer: LayerId) -> ExpertActivation:
        experts: Any = self._experts(model, layer)
        return experts.activation if isinstance(experts, RedirectedExperts) else _WiActivation(experts["expert_0"].act)

    # -- weights -------------------------------------------------------------------------------------------------
    def _stock_shape(self, experts: Any) -> ExpertShape:
        first = experts["expert_0"]
        return ExpertShape({name: tuple(getattr(first, name).weight.shape) for name in ROLES}, dict(ROLES))

    def _stock_read(self, experts: Any) -> ExpertWeights:
        members = [experts[f"expert_{index}"] for index in range(len(experts))]
        tensors = {name: torch.stack([getattr(one, name).weight.detach() for one in members]) for name in ROLES}
        return ExpertWeights(tensors, dict(ROLES))

    def _stock_write(self, experts: Any, weights: ExpertWeights) -> None:
        for name in ROLES:
            for index, matrix in enumerate(weights.tensors[name]):
                getattr(experts[f"expert_{index}"], name).weight.copy_(matrix)

    def _redirected(
        self, experts: Any, projections: Mapping[str, Projection], roles: dict[str, Role], table: Tensor
    ) -> RedirectedExperts:
        if isinstance(experts, OneHotRedirectedExperts):
            return OneHotRedirectedExperts(projections, roles, experts.activation, table, experts.dropout.p)
        first = experts["expert_0"]
        return OneHotRedirectedExperts(projections, roles, _WiActivation(first.act), table, first.dropout.p)

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
            bias_E.masked_fill_(dropped_E.to(bias_E.device), NEVER)

    def router_parameters(self, model: nn.Module) -> list[str]:
        return [
            f"{layer}.router.{name}"
            for layer in self.layers(model)
            for name, _ in self._mlp(model, layer).router.named_parameters()
        ]

    # -- capture -------------------------------------------------------------------------------------------------
    @contextmanager
    def capture(self, model: nn.Module, detach: bool = True) -> Iterator[Capture]:
        captured, call, hooks = Capture(), {}, []  # type: ignore[var-annotated]

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
            inputs_TD = hidden.reshape(-1, hidden.shape[-1])
            batch = RoutedBatch(
                inputs_TD=inputs_TD,
                logits_TE=logits_BSE.reshape(-1, experts),
                wanted_TK=wanted_TK,
                chosen_TK=torch.where(dispatched_TK, wanted_TK, -1),
                weights_TK=weights_BS1.reshape(-1, 1),
                valid_T=newest_positions(_mask(call, layer), layer, inputs_TD),
            )
            captured.batches[layer] = batch.detached() if detach else batch

        for layer in self.layers(model):
            hooks.append(
                self._mlp(model, layer).router.register_forward_hook(
                    lambda router, inputs, result, layer=layer: record(layer, router, inputs[0], result)
                )
            )
        with recording(model, hooks, captured, call):
            yield captured


def _mask(call: Mapping[str, Any], layer: LayerId) -> Tensor | None:
    """bool [B, S]: encoder positions with attention, decoder positions with a label (else with attention)."""
    if not layer.split(".block.")[0].endswith("decoder"):
        return call.get("attention_mask")
    if call.get("labels") is not None:
        return cast(Tensor, call["labels"] != IGNORED)
    return call.get("decoder_attention_mask")
