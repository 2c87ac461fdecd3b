"""NLLB-MoE: top-2 routing with a capacity over the whole batch, experts fc1 [F, D] and fc2 [D, F] with biases.

The router decides per forward pass how many tokens an expert takes (``moe_eval_capacity_token_fraction`` in evaluation,
``expert_capacity`` in training); a token's first or second expert may turn it away, and padding is not routed at all.

transformers 5.23 has a defect: it reads the router's one-hot dispatch as indices, so the first choice of every token is
computed by expert 1 and the second by expert 0, whatever the router chose; experts 2 and up are never used (their
weights change no logit). A model given to this adapter is repaired in place to dispatch as published, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeExperts,
    NllbMoePreTrainedModel,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
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
from mcsmoe.modules import Projection, RedirectedExperts, TopTwoRedirectedExperts
from mcsmoe.types import IGNORED, ExpertActivation, ExpertWeights, LayerId, Role, RoutedBatch, RouterWeights

MATRICES = {"fc1": Role.INPUT, "fc2": Role.OUTPUT}


class RepairedExperts(NllbMoeExperts):  # type: ignore[misc]
    """The family's own experts, each computing the tokens that the router gave it a weight for."""

    def forward(self, hidden_TD: Tensor, _first_TE: Tensor, weights_TE: Tensor) -> Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        for expert, here in enumerate((weights_TE != 0).t()):
            tokens = here.nonzero()[:, 0]
            if tokens.numel() == 0:
                continue
            outputs = self[f"expert_{expert}"](hidden_TD[tokens]) * weights_TE[tokens, expert, None]
            outputs = self.token_dropout(outputs) if self.training else outputs * (1 - self.moe_token_dropout)
            output_TD.index_add_(0, tokens, outputs.to(hidden_TD.dtype))
        return output_TD


class _Fc1Activation:
    """The model's activation function applied to ``fc1``; a class so that models stay picklable and copyable."""

    def __init__(self, function: nn.Module) -> None:
        self.function = function

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return cast(Tensor, self.function(outputs["fc1"]))


class NllbAdapter(RedirectingAdapter):
    """Encoder-decoder NLLB-MoE models."""

    name: ClassVar[str] = "nllb-moe"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, NllbMoePreTrainedModel) and any(
            isinstance(module, NllbMoeSparseMLP) for module in model.modules()
        )

    def prepare(self, model: nn.Module) -> None:
        """Repair the dispatch of every stock experts module of ``model``, once, with a warning."""
        broken = [module for module in model.modules() if type(module) is NllbMoeExperts]
        for module in broken:
            module.__class__ = RepairedExperts
        if broken:
            warnings.warn(
                "transformers 5.23 lets experts 0 and 1 of NLLB-MoE compute all tokens, whatever the router chose; "
                "this model now dispatches as published, so its logits differ from those of plain transformers",
                stacklevel=3,
            )

    # -- structure -----------------------------------------------------------------------------------------------
    def layers(self, model: nn.Module) -> list[LayerId]:
        return [path for path, module in model.named_modules() if isinstance(module, NllbMoeSparseMLP)]

    def _mlp(self, model: nn.Module, layer: LayerId) -> NllbMoeSparseMLP:
        self._experts_name(model, layer)
        return model.get_submodule(layer)

    def _experts_name(self, model: nn.Module, layer: LayerId) -> str:
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            module = None
        if not isinstance(module, NllbMoeSparseMLP):
            raise ValueError(f"layer {layer!r} is not a sparse layer of this model; it has {self.layers(model)}")
        return "experts"

    def _place(self, model: nn.Module, layer: LayerId) -> Place:
        return Place(self._experts_name(model, layer), "router", "classifier")

    def num_experts(self, model: nn.Module, layer: LayerId) -> int:
        return int(self._mlp(model, layer).router.num_experts)

    def activation(self, model: nn.Module, layer: LayerId) -> ExpertActivation:
        experts: Any = self._experts(model, layer)
        return experts.activation if isinstance(experts, RedirectedExperts) else _Fc1Activation(experts["expert_0"].act)

    # -- stock experts -------------------------------------------------------------------------------------------
    def _stock_shape(self, experts: Any) -> ExpertShape:
        shapes = {name: tuple(getattr(experts["expert_0"], name).weight.shape) for name in MATRICES}
        return ExpertShape(shapes, dict(MATRICES), tuple(MATRICES))

    def _stock_read(self, experts: Any) -> ExpertWeights:
        members = [experts[f"expert_{index}"] for index in range(experts.num_experts)]
        tensors = {name: torch.stack([getattr(one, name).weight.detach() for one in members]) for name in MATRICES}
        tensors |= {
            f"{name}_bias": torch.stack([getattr(one, name).bias.detach() for one in members]) for name in MATRICES
        }
        return ExpertWeights(tensors, self._stock_shape(experts).all_roles())

    def _stock_write(self, experts: Any, weights: ExpertWeights) -> None:
        for index in range(experts.num_experts):
            for name in MATRICES:
                linear = getattr(experts[f"expert_{index}"], name)
                linear.weight.copy_(weights.tensors[name][index])
                linear.bias.copy_(weights.tensors[f"{name}_bias"][index])

    def _redirected(
        self, experts: Any, projections: Mapping[str, Projection], roles: dict[str, Role], table: Tensor
    ) -> RedirectedExperts:
        if isinstance(experts, TopTwoRedirectedExperts):
            dropout, masking, activation = experts.dropout.p, experts.masking.p, experts.activation
        else:
            first = experts["expert_0"]
            dropout, masking, activation = first.dropout.p, experts.moe_token_dropout, _Fc1Activation(first.act)
        return TopTwoRedirectedExperts(projections, roles, activation, table, dropout, masking)

    # -- router --------------------------------------------------------------------------------------------------
    def read_router(self, model: nn.Module, layer: LayerId) -> RouterWeights:
        classifier = self._mlp(model, layer).router.classifier
        bias = None if classifier.bias is None else classifier.bias.detach().clone()
        return RouterWeights(classifier.weight.detach().clone(), bias)

    @torch.no_grad()
    def mask_router(self, model: nn.Module, layer: LayerId, dropped_E: Tensor) -> None:
        if int((~dropped_E).sum()) < 2:
            raise ValueError(f"layer {layer!r}: fewer than 2 experts are kept, and every token chooses 2")
        # The stock router's own bias, so the checkpoint needs nothing new; the configuration asks for it everywhere.
        config: Any = model.config
        config.router_bias = True
        for path in self.layers(model):
            classifier = self._mlp(model, path).router.classifier
            if classifier.bias is None:
                classifier.bias = nn.Parameter(classifier.weight.new_zeros(classifier.out_features))
        bias_E = self._mlp(model, layer).router.classifier.bias
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
        """As the interface says. K is 2; an expert that turned the token away, or a second one that the policy
        ``random`` did not draw, is -1 in ``chosen_TK``."""
        captured, call, hooks = Capture(), {}, []  # type: ignore[var-annotated]

        def record(layer: LayerId, router: NllbMoeTop2Router, hidden_TD: Tensor, result: Any) -> None:
            _, combined_TE, noisy_TE = result
            logits_TE = noisy_TE
            if router.second_expert_policy == "sampling":  # which adds its noise to the logits in place
                logits_TE = router.classifier(hidden_TD.to(router.dtype))
            probabilities_TE = logits_TE.detach().softmax(dim=-1, dtype=router.dtype).to(hidden_TD.dtype)
            first_T1 = probabilities_TE.argmax(dim=-1, keepdim=True)
            second_T1 = noisy_TE.detach().scatter(1, first_T1, float("-inf")).argmax(dim=-1, keepdim=True)
            wanted_TK = torch.cat([first_T1, second_T1], dim=1)
            weights_TK = combined_TE.gather(1, wanted_TK)
            batch = RoutedBatch(
                inputs_TD=hidden_TD,
                logits_TE=logits_TE,
                wanted_TK=wanted_TK,
                chosen_TK=torch.where(weights_TK != 0, wanted_TK, -1),
                weights_TK=weights_TK,
                valid_T=newest_positions(_mask(call, layer), layer, hidden_TD),
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
    """[rows, positions]: encoder positions with attention, decoder positions with a label (else with attention)."""
    if "decoder" not in layer.split(".layers.")[0].split("."):
        return call.get("attention_mask")
    if call.get("labels") is not None:
        return call["labels"] != IGNORED
    return call.get("decoder_attention_mask")
