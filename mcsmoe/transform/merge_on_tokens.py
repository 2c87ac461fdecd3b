"""What ``mcsmoe merge`` alone has, layer after layer: REAM, MergeMoE, and deleting the set that changes outputs least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.criteria.quadratic import Limits
from mcsmoe.criteria.scores import CriterionInputs, choose, reap
from mcsmoe.grouping.dominant import group_by_dominant
from mcsmoe.merge import mergemoe, ream
from mcsmoe.merge.base import Merged
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.types import Grouping

SAMPLE = 4096
"""Tokens that experts are compared on where each is run on the tokens of all."""

Grouped = Callable[[Tensor], Grouping]
"""From what experts are chosen by [E] to the groups that the method's own similarity and grouping give."""

OnTokens = Callable[[SparseLayer, LayerStatistics, LayerTokens | None, int, Grouped], Merged]


def _ream(
    layer: SparseLayer, statistics: LayerStatistics, tokens: LayerTokens | None, kept: int, _grouped: Grouped
) -> Merged:
    weights, activation, inputs_TD = layer.view_experts(), layer.activation, _sample(layer, tokens)
    mean_ED = ream.mean_gated_outputs(weights, activation, layer.read_router(), [inputs_TD])
    saliency_E = reap(CriterionInputs(layer.id, statistics))
    groups = ream.pseudo_groups(saliency_E, ream.similarity(mean_ED, statistics.logits_gram_EE), kept)
    return ream.merge(weights, groups, saliency_E, inputs_TD, activation, layer.id)


def _mergemoe(
    layer: SparseLayer, statistics: LayerStatistics, tokens: LayerTokens | None, _kept: int, grouped: Grouped
) -> Merged:
    weights, grouping = layer.view_experts(), grouped(statistics.frequency_E)
    routed = _routed(layer, tokens, weights.num_experts)
    return mergemoe.merge(weights, grouping, statistics.frequency_E, routed, layer.activation, layer.id)


def _gram(
    layer: SparseLayer, statistics: LayerStatistics, _tokens: LayerTokens | None, kept: int, _grouped: Grouped
) -> Merged:
    inputs, weights, sets = CriterionInputs(layer.id, statistics), layer.view_experts(), layer.expert_sets
    limits = Limits.none(weights.num_experts)
    limits = replace(limits, group_E=torch.arange(weights.num_experts) // (weights.num_experts // sets))
    grouping = beside(statistics, choose("gram", inputs, kept, limits))
    leads_E = grouping.leads()
    chosen = weights.select(grouping.dominant)
    return Merged(chosen, grouping.expert_to_group.clone(), leads_E.double(), grouping.dominant.clone(), ~leads_E)


def beside(statistics: LayerStatistics, kept_K: Tensor) -> Grouping:
    """Groups led by the kept experts: every other joins the one whose router logits are most like its own."""
    gram_EE = statistics.logits_gram_EE.double().cpu()
    norm_E = gram_EE.diagonal().clamp(min=0).sqrt().clamp(min=1e-300)
    return group_by_dominant(statistics.frequency_E.cpu(), gram_EE / norm_E[:, None] / norm_E[None, :], kept_K)


ON_TOKENS: dict[str, OnTokens] = {"ream": _ream, "mergemoe": _mergemoe, "gram": _gram}


def _require(layer: SparseLayer, tokens: LayerTokens | None) -> LayerTokens:
    if tokens is None:
        raise ValueError(f"layer {layer.id!r}: this merge looks at tokens; give --calibration, not --statistics alone")
    return tokens


def _sample(layer: SparseLayer, tokens: LayerTokens | None) -> Tensor:
    """[S, D]: tokens spread evenly over those of the layer."""
    inputs_TD = torch.cat([batch.inputs_TD for batch in _require(layer, tokens).batches()])
    return inputs_TD[:: max(1, -(-len(inputs_TD) // SAMPLE))]


def _routed(layer: SparseLayer, tokens: LayerTokens | None, experts: int) -> list[Tensor]:
    """By expert, the tokens routed to it."""
    found: list[list[Tensor]] = [[] for _ in range(experts)]
    for batch in _require(layer, tokens).batches():
        for expert, parts in enumerate(found):
            parts.append(batch.read_by(expert))
    return [torch.cat(parts) for parts in found]
