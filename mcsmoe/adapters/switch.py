"""Switch Transformers: top-1 routing with a per-sequence capacity, experts wi [F, D] and wo [D, F] without biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersPreTrainedModel,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from mcsmoe.adapters.capacity import CapacityAdapter
from mcsmoe.adapters.redirecting import newest_positions
from mcsmoe.modules import OneHotRedirectedExperts, Projection, RedirectedExperts
from mcsmoe.types import LayerId, Role, RoutedBatch


class SwitchAdapter(CapacityAdapter):
    """Encoder-decoder and encoder-only Switch models."""

    name: ClassVar[str] = "switch_transformers"
    model_class: ClassVar[type[nn.Module]] = SwitchTransformersPreTrainedModel
    sparse_class: ClassVar[type[nn.Module]] = SwitchTransformersSparseMLP
    matrices: ClassVar[dict[str, Role]] = {"wi": Role.INPUT, "wo": Role.OUTPUT}

    def _redirected(
        self, experts: Any, projections: Mapping[str, Projection], roles: dict[str, Role], table: Tensor
    ) -> RedirectedExperts:
        if isinstance(experts, OneHotRedirectedExperts):
            return OneHotRedirectedExperts(projections, roles, experts.activation, table, experts.dropout.p)
        first = experts["expert_0"]
        return OneHotRedirectedExperts(projections, roles, self._stock_activation(experts), table, first.dropout.p)

    def _routed(
        self, layer: LayerId, router: SwitchTransformersTop1Router, hidden: Tensor, result: Any, mask: Tensor | None
    ) -> RoutedBatch:
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
        return RoutedBatch(
            inputs_TD=inputs_TD,
            logits_TE=logits_BSE.reshape(-1, experts),
            wanted_TK=wanted_TK,
            chosen_TK=torch.where(dispatched_TK, wanted_TK, -1),
            weights_TK=weights_BS1.reshape(-1, 1),
            valid_T=newest_positions(mask, layer, inputs_TD),
        )
