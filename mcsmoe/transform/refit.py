"""Refit the output projections of a reduced layer on its tokens, where held-out tokens say that it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.calibration.observe import observing
from mcsmoe.calibration.tokens import LayerBatch, LayerTokens
from mcsmoe.console import log
from mcsmoe.refit.ridge import RIDGE, SWEEPS, Block, RefitBatch, refit, squared_error
from mcsmoe.similarity.tokens import hidden
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.types import ExpertActivation, ExpertWeights, Novices, Role


@dataclass(frozen=True)
class Refitting:
    """How a layer is refitted."""

    ridge: float = RIDGE
    sweeps: int = SWEEPS


@dataclass(frozen=True)
class RefitReport:
    """Squared error over the squared target, on the tokens fitted on and on those held out, before and after."""

    fitted_before: float
    fitted_after: float
    held_before: float
    held_after: float
    kept: bool


@torch.no_grad()
def refit_layer(
    layer: SparseLayer,
    tokens: LayerTokens,
    refitting: Refitting,
    route: Callable[[LayerBatch], tuple[Tensor, Tensor]] | None = None,
) -> RefitReport:
    """Solve for the output projections of a reduced layer, in place, where that helps on held-out tokens.

    Args:
        tokens: with what the layer gave before it was reduced as target.
        route: expert indices and combine weights as the layer now routes; None: as the tokens say.
    """
    weights, activation = layer.read_experts(), layer.activation
    table, novices = layer.expert_to_group, layer.read_novices()
    blocks = expert_blocks(weights, activation) + ([] if novices is None else novice_blocks(novices))
    fitted: list[RefitBatch] = []
    held: list[RefitBatch] = []
    for batch in tokens.batches():
        index_TK, gate_TK = (batch.index_TK, batch.weights_TK) if route is None else route(batch)
        slot_TK = torch.where(index_TK < 0, -1, table.to(index_TK.device)[index_TK.clamp(min=0)])
        made = RefitBatch.of(batch.inputs_TD, batch.target_TD, slot_TK, gate_TK, len(blocks))
        (held if batch.held_out else fitted).append(made)
    if not fitted:
        raise ValueError(f"layer {layer.id!r}: there are no tokens to refit on; give more calibration text")
    found = refit(blocks, fitted, refitting.ridge, refitting.sweeps, layer.id)
    before = squared_error(blocks, held, [block.weight_DP for block in blocks])
    after = squared_error(blocks, held, found.weights)
    # Without held-out tokens there is nothing that says no.
    kept = after < before if held else found.after < found.before
    if kept:
        new = _with_outputs(weights, found.weights)
        if novices is None:
            layer.write_experts(new)
        else:
            answers = _with_answers(novices, found.weights[weights.num_experts :])
            layer.write_novices(new, table, answers)
    targets = [sum(float(batch.target_TD.double().square().sum()) for batch in part) or 1.0 for part in (fitted, held)]
    report = RefitReport(
        found.before / targets[0], found.after / targets[0], before / targets[1], after / targets[1], kept
    )
    log.info(
        "%s: refit %s; relative squared error %.4f to %.4f, on held-out tokens %.4f to %.4f",
        layer.id,
        "kept" if kept else "not kept",
        report.fitted_before,
        report.fitted_after,
        report.held_before,
        report.held_after,
    )
    return report


def expert_blocks(weights: ExpertWeights, activation: ExpertActivation) -> list[Block]:
    """One block an expert: its output projection, with its bias as the column of a feature that is always one."""
    (name,) = weights.names(Role.OUTPUT)
    bias_ED = weights.tensors.get(f"{name}_bias")

    def block(expert: int) -> Block:
        one = weights.select(torch.tensor([expert]))
        weight_DF = weights.tensors[name][expert]

        def features(inputs_ND: Tensor) -> Tensor:
            hidden_NF = hidden(one, inputs_ND[None], activation)[0]
            return hidden_NF if bias_ED is None else torch.cat([hidden_NF, _ones(hidden_NF)], dim=1)

        whole = weight_DF if bias_ED is None else torch.cat([weight_DF, bias_ED[expert][:, None]], dim=1)
        return Block(features, whole)

    return [block(expert) for expert in range(weights.num_experts)]


def novice_blocks(novices: Novices) -> list[Block]:
    """One block a novice: its constant, and the factor that gives the output where it has factors."""

    def block(novice: int) -> Block:
        constant_D1 = novices.constant_ND[novice][:, None]
        if novices.u_NDR is None or novices.v_NRD is None:
            return Block(_ones, constant_D1)
        v_RD = novices.v_NRD[novice]

        def features(inputs_ND: Tensor) -> Tensor:
            return torch.cat([inputs_ND.to(v_RD) @ v_RD.T, _ones(inputs_ND).to(v_RD)], dim=1)

        return Block(features, torch.cat([novices.u_NDR[novice], constant_D1], dim=1))

    return [block(novice) for novice in range(len(novices.constant_ND))]


def _ones(like_ND: Tensor) -> Tensor:
    return like_ND.new_ones(len(like_ND), 1)


def _with_outputs(weights: ExpertWeights, solved: Sequence[Tensor]) -> ExpertWeights:
    (name,) = weights.names(Role.OUTPUT)
    tensors = dict(weights.tensors)
    width = weights.width
    own = list(solved[: weights.num_experts])
    tensors[name] = torch.stack([weight_DP[:, :width] for weight_DP in own]).to(weights.tensors[name])
    if f"{name}_bias" in tensors:
        bias_ED = torch.stack([weight_DP[:, width] for weight_DP in own])
        tensors[f"{name}_bias"] = bias_ED.to(weights.tensors[f"{name}_bias"])
    return ExpertWeights(tensors, dict(weights.roles))


def _with_answers(novices: Novices, solved: Sequence[Tensor]) -> Novices:
    constant_ND = torch.stack([weight_DP[:, -1] for weight_DP in solved])
    if novices.u_NDR is None:
        return Novices(constant_ND)
    return Novices(constant_ND, torch.stack([weight_DP[:, :-1] for weight_DP in solved]), novices.v_NRD)


def reroute(layer: SparseLayer) -> Callable[[LayerBatch], tuple[Tensor, Tensor]]:
    """How the layer routes now, asked of the layer itself: its block runs alone on the tokens."""

    def route(batch: LayerBatch) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), layer.adapter.capture(layer.model) as captured, observing(layer.id, layer.module) as seen:
            layer.module(batch.inputs_TD[None])
            found = captured.batches[layer.id]
            return found.chosen_TK, seen.take(found).weights_TK

    return route
