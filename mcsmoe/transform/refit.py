"""Refit the output projections of a reduced layer on its tokens, where held-out tokens say that it helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.console import log
from mcsmoe.methods import require_known
from mcsmoe.refit.ridge import RIDGES, SWEEPS, Block, RefitBatch, refit
from mcsmoe.similarity.tokens import hidden
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.shared import Probe, probe, shared_projection, shared_weight
from mcsmoe.types import ExpertActivation, ExpertWeights, Novices, Role

TARGETS = (LAYER, STREAM) = ("layer", "stream")


@dataclass(frozen=True)
class Refitting:
    """How a layer is refitted: held-out tokens choose among ``ridges``."""

    ridges: tuple[float, ...] = RIDGES
    sweeps: int = SWEEPS
    target: str = LAYER
    """What a layer is to give: what it ``layer`` gave for the same input, or what makes the residual ``stream`` behind it that
    of the whole model."""

    def __post_init__(self) -> None:
        require_known("refit_target", self.target, TARGETS)


@dataclass(frozen=True)
class RefitReport:
    """Squared error over the squared target, on the tokens fitted on and on those held out, before and after."""

    fitted_before: float
    fitted_after: float
    held_before: float
    held_after: float
    ridge: float
    kept: bool
    shared: str | None = None  # module of the shared output projection that was solved for too


@torch.no_grad()
def refit_layer(layer: SparseLayer, tokens: LayerTokens, refitting: Refitting, reroutes: bool = False) -> RefitReport:
    """Solve for the output projections of a reduced layer, in place, where that helps on held-out tokens.

    A shared expert's is one of them, and what it gave is part of the target.

    Args:
        tokens: with what the layer gave before it was reduced as target.
        reroutes: the layer routes otherwise than the tokens say, and is asked how.
    """
    weights, activation = layer.view_experts(), layer.activation
    table, novices = layer.expert_to_group, layer.read_novices()
    blocks = expert_blocks(weights, activation) + ([] if novices is None else novice_blocks(novices))
    shared = _Shared.of(layer, tokens)
    fitted: list[RefitBatch] = []
    held: list[RefitBatch] = []
    for batch in tokens.batches():
        index_TK, gate_TK, target_TD = batch.index_TK, batch.weights_TK, batch.target_TD
        inputs_TD = batch.read(layer.id)
        if reroutes or shared is not None:
            seen = probe(layer, batch.inputs_TD, None if shared is None else shared.name)
            if reroutes:
                index_TK, gate_TK = seen.index_TK, seen.gate_TK
                inputs_TD = replace(batch, scale_TK=seen.scale_TK).read(layer.id)
        slot_TK = torch.where(index_TK < 0, -1, table.to(index_TK.device)[index_TK.clamp(min=0)])
        if shared is not None:
            # Its features are not a function of the inputs that is at hand, so they come along with these.
            hidden_TP, factor_T = shared.seen(seen, inputs_TD)
            slot_TK = torch.cat([slot_TK, torch.full_like(slot_TK[:, :1], len(blocks))], dim=1)
            gate_TK = torch.cat([gate_TK, factor_T[:, None].to(gate_TK)], dim=1)
            given_TD = hidden_TP.to(target_TD) @ shared.weight_DP.to(target_TD).T
            target_TD = target_TD + given_TD * factor_T[:, None].to(target_TD)
            inputs_TD = torch.cat([inputs_TD, hidden_TP.to(inputs_TD)], dim=1)
        made = RefitBatch.of(inputs_TD, target_TD, slot_TK, gate_TK, len(blocks) + (shared is not None))
        (held if batch.held_out else fitted).append(made)
    if not fitted:
        raise ValueError(f"layer {layer.id!r}: there are no tokens to refit on; give more calibration text")
    if shared is not None:
        blocks = [replace(block, features=_first(block.features, weights.d_model)) for block in blocks]
        blocks.append(Block(lambda wide_NW: wide_NW[:, weights.d_model :], shared.weight_DP))
    found = refit(blocks, fitted, held, refitting.ridges, refitting.sweeps, layer.id)
    if found.helps:
        if shared is not None:
            shared.write(found.weights[-1])
        new = _with_outputs(weights, found.weights)
        if novices is None:
            layer.write_experts(new)
        else:
            last = weights.num_experts + novices.spec.count
            layer.write_novices(new, table, _with_answers(novices, found.weights[weights.num_experts : last]))
    targets = [sum(float(batch.target_TD.double().square().sum()) for batch in part) or 1.0 for part in (fitted, held)]
    report = RefitReport(
        fitted_before=found.before / targets[0],
        fitted_after=found.after / targets[0],
        held_before=found.held_before / targets[1],
        held_after=found.held_after / targets[1],
        ridge=found.ridge,
        kept=found.helps,
        shared=shared.name if shared is not None and found.helps else None,
    )
    log.info(
        "%s: refit %s, ridge %g; relative squared error %.4f to %.4f, on held-out tokens %.4f to %.4f",
        layer.id,
        "kept" if report.kept else "not kept",
        report.ridge,
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


def _first(features: Callable[[Tensor], Tensor], width: int) -> Callable[[Tensor], Tensor]:
    """``features`` of the first columns of what is given."""
    return lambda wide_NW: features(wide_NW[:, :width])


@dataclass(frozen=True)
class _Shared:
    """The output projection of the shared expert of a layer."""

    layer: SparseLayer
    name: str
    weight_DP: Tensor

    @classmethod
    def of(cls, layer: SparseLayer, tokens: LayerTokens) -> _Shared | None:
        """None where the layer has none that could be solved for."""
        first = next(iter(tokens.batches()), None)
        name = None if first is None else shared_projection(layer, first.inputs_TD)
        if first is None or name is None:
            return None
        return cls(layer, name, shared_weight(layer, name).clone())

    def seen(self, found: Probe, inputs_TD: Tensor) -> tuple[Tensor, Tensor]:
        """What it reads [T, P] and is multiplied with [T]; nothing where that could not be told."""
        if found.hidden_TP is None or found.factor_T is None:
            return inputs_TD.new_zeros(len(inputs_TD), self.weight_DP.shape[1]), inputs_TD.new_zeros(len(inputs_TD))
        return found.hidden_TP, found.factor_T

    def write(self, weight_DP: Tensor) -> None:
        """Put a new projection in its place."""
        shared_weight(self.layer, self.name).copy_(weight_DP)
