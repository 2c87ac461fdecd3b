"""Split the experts of a model into low-rank factors and what they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe import modules
from mcsmoe.compress.lowrank import decompose, decompose_whitened
from mcsmoe.compress.moments import shrunken
from mcsmoe.console import progress
from mcsmoe.modules import LowRankProjection, RedirectedExperts
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.transform.layers import Layers, SparseLayer
from mcsmoe.types import LayerId, LowRankFactors, Role, chosen_layers


@dataclass(frozen=True)
class CompressSettings:
    """How experts are split."""

    rank: int
    keep: float | None = None
    """Share of the residual's rows that stay; None leaves all of them, to be pruned while training."""
    exclude_layers: Sequence[LayerId] = ()

    def check(self, layers: Layers) -> None:
        """Refuse what cannot be, before anything is read.

        Raises:
            ValueError: a rank or a share out of range, or a layer that the model does not have; names it.
        """
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; give a share of the rows above 0 and up to 1")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        chosen_layers(layers.ids, self.exclude_layers)


def compress_layers(
    layers: Layers,
    settings: CompressSettings,
    statistics: RoutingStatistics | None = None,
    only: Sequence[LayerId] | None = None,
) -> None:
    """Replace the matrices of every expert by low-rank factors and a residual.

    With ``statistics`` the split is activation-aware, and rows are kept by what they add to the outputs on the calibration
    tokens; else by their norm.

    Args:
        only: the layers to treat; None: all that are not excluded.

    Raises:
        ValueError: settings that cannot be; names the field or the layer, the value and the remedy.
    """
    settings.check(layers)
    chosen = [one for one in chosen_layers(layers.ids, settings.exclude_layers) if only is None or one in only]

    def compress(layer: SparseLayer) -> None:
        if statistics is not None:
            statistics.layers[layer.id].check_against(layer.id, layer.num_experts)
        grams = {} if statistics is None else input_grams(layer, statistics.layers[layer.id])
        split_layer(layer, settings.rank, grams)
        if settings.keep is not None:
            keep_rows(layer, settings.keep, grams)

    layers.change(compress, progress(chosen, "compress"))


@torch.no_grad()
def split_layer(layer: SparseLayer, rank: int, grams: Mapping[str, Tensor]) -> None:
    """Replace every expert matrix of a layer by low-rank factors and a dense residual, in place.

    ``grams`` has, by matrix, what ``input_grams`` gives; a matrix without one is split by its weights alone.
    """
    weights, table = layer.read_experts(), layer.expert_to_group
    factors: dict[str, LowRankFactors] = {}
    for name in weights.names(Role.INPUT, Role.OUTPUT):
        matrix, where = weights.tensors[name], f"layer {layer.id!r}, {name}"
        if name in grams:
            factors[name] = decompose_whitened(matrix, grams[name], rank, where)
        else:
            factors[name] = decompose(matrix, rank, where)
    biases = {name: weights.tensors[name] for name in weights.names(Role.INPUT_BIAS, Role.OUTPUT_BIAS)}
    layer.write_compressed(factors, biases, table)


@torch.no_grad()
def keep_rows(layer: SparseLayer, keep: float, grams: Mapping[str, Tensor]) -> None:
    """Leave the strongest rows of the residuals of a layer that is split, and pack what is left.

    A row counts by its norm, or by the norm of what it adds to the outputs where ``grams`` has its matrix.
    """
    for module in layer.module.modules():
        if not isinstance(module, RedirectedExperts):
            continue
        for name in module.roles:
            projection = module.projection(name)
            assert isinstance(projection, LowRankProjection)
            residual_Goi = projection.residual_Goi
            squared_Goi = residual_Goi.double() if name not in grams else residual_Goi.double() @ grams[name].double()
            score_Go = (squared_Goi * residual_Goi.double()).sum(dim=2)
            count = max(1, round(keep * score_Go.numel()))
            order = score_Go.flatten().argsort(descending=True, stable=True)
            residual_Goi.flatten(0, 1)[order[count:]] = 0
    modules.pack(layer.module)


def input_grams(layer: SparseLayer, statistics: LayerStatistics) -> dict[str, Tensor]:
    """By matrix [G, i, i]: the Gram matrix of what it receives, over each group's calibration tokens.

    Inputs of an output projection are the hidden activations of the group's tokens. Where few tokens are kept of an expert
    its matrix is mixed with that of all (``compress.moments``); it counts for as many tokens as the expert had.
    """
    weights, table, activation = layer.read_experts(), layer.expert_to_group, layer.activation
    tokens, names = statistics.tokens(), weights.names(Role.INPUT, Role.OUTPUT)
    members = [(table == group).nonzero()[:, 0].tolist() for group in range(weights.num_experts)]
    count_G = torch.stack([statistics.computed_E[experts].double().sum() for experts in members]).cpu()
    routed = [torch.cat([tokens[expert] for expert in experts]) for experts in members]
    hidden = [weights.hidden(group, routed_TD, activation) for group, routed_TD in enumerate(routed)]
    found = {Role.OUTPUT: shrunken(hidden, alike=False)}
    if statistics.input_gram_EDD is None:
        found[Role.INPUT] = shrunken(routed)
    else:
        exact_GDD = torch.stack([statistics.input_gram_EDD[experts].sum(dim=0) for experts in members])
        found[Role.INPUT] = shrunken(routed, exact_GDD, count_G)
    counted = {role: moment_Gii * count_G.to(moment_Gii)[:, None, None] for role, moment_Gii in found.items()}
    return {name: counted[weights.roles[name]] for name in names}
