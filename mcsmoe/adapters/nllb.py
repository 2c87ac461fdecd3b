"""NLLB-MoE: top-2 routing with a capacity over the whole batch, experts fc1 [F, D] and fc2 [D, F] with biases.

The router decides per forward pass how many tokens an expert takes (``moe_eval_capacity_token_fraction`` in evaluation,
``expert_capacity`` in training); a token's first or second expert may turn it away, and padding is not routed at all.

transformers 5.23 has a defect: it reads the router's one-hot dispatch as indices, so the first choice of every token is
computed by expert 1 and the second by expert 0, whatever the router chose; experts 2 and up are never used (their
weights change no logit). A model given to this adapter is repaired in place to dispatch as published, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeExperts,
    NllbMoePreTrainedModel,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
)

from mcsmoe.adapters.capacity import CapacityAdapter
from mcsmoe.adapters.redirecting import newest_positions
from mcsmoe.modules import Projection, RedirectedExperts, TopTwoRedirectedExperts
from mcsmoe.types import LayerId, Role, RoutedBatch


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


class NllbAdapter(CapacityAdapter):
    """Encoder-decoder NLLB-MoE models."""

    name: ClassVar[str] = "nllb-moe"
    model_class: ClassVar[type[nn.Module]] = NllbMoePreTrainedModel
    sparse_class: ClassVar[type[nn.Module]] = NllbMoeSparseMLP
    matrices: ClassVar[dict[str, Role]] = {"fc1": Role.INPUT, "fc2": Role.OUTPUT}
    biases: ClassVar[bool] = True

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

    def _redirected(
        self, experts: Any, projections: Mapping[str, Projection], roles: dict[str, Role], table: Tensor
    ) -> RedirectedExperts:
        if isinstance(experts, TopTwoRedirectedExperts):
            dropout, masking, activation = experts.dropout.p, experts.masking.p, experts.activation
        else:
            first = experts["expert_0"]
            dropout, masking, activation = first.dropout.p, experts.moe_token_dropout, self._stock_activation(experts)
        return TopTwoRedirectedExperts(projections, roles, activation, table, dropout, masking)

    def mask_router(self, model: nn.Module, layer: LayerId, dropped_E: Tensor) -> None:
        if int((~dropped_E).sum()) < 2:
            raise ValueError(f"layer {layer!r}: fewer than 2 experts are kept, and every token chooses 2")
        super().mask_router(model, layer, dropped_E)

    def _routed(
        self, layer: LayerId, router: NllbMoeTop2Router, hidden_TD: Tensor, result: Any, mask: Tensor | None
    ) -> RoutedBatch:
        """K is 2; an expert that turned the token away, or a second one that the policy ``random`` did not draw, is -1."""
        _, combined_TE, noisy_TE = result
        logits_TE = noisy_TE
        if router.second_expert_policy == "sampling":  # which adds its noise to the logits in place
            logits_TE = router.classifier(hidden_TD.to(router.dtype))
        probabilities_TE = logits_TE.detach().softmax(dim=-1, dtype=router.dtype).to(hidden_TD.dtype)
        first_T1 = probabilities_TE.argmax(dim=-1, keepdim=True)
        second_T1 = noisy_TE.detach().scatter(1, first_T1, float("-inf")).argmax(dim=-1, keepdim=True)
        wanted_TK = torch.cat([first_T1, second_T1], dim=1)
        weights_TK = combined_TE.gather(1, wanted_TK)
        return RoutedBatch(
            inputs_TD=hidden_TD,
            logits_TE=logits_TE,
            wanted_TK=wanted_TK,
            chosen_TK=torch.where(weights_TK != 0, wanted_TK, -1),
            weights_TK=weights_TK,
            valid_T=newest_positions(mask, layer, hidden_TD),
        )
