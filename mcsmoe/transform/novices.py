"""Novices of a layer, fitted on its tokens, and what they leave of its experts' outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.compress.novices import fit_affine, fit_constant, weighted_mean
from mcsmoe.similarity.tokens import hidden, output
from mcsmoe.statistics.outputs import OutputSums
from mcsmoe.types import ExpertActivation, ExpertWeights, Novices


@torch.no_grad()
def fit_novices(weights: ExpertWeights, activation: ExpertActivation, tokens: LayerTokens, rank: int) -> Novices:
    """A novice for every expert, constant for rank 0, on the tokens that are not held out; one expert at a time."""
    return fit_ranks(weights, activation, tokens, [rank])[rank]


@torch.no_grad()
def fit_ranks(
    weights: ExpertWeights, activation: ExpertActivation, tokens: LayerTokens, ranks: Sequence[int]
) -> dict[int, Novices]:
    """``fit_novices`` by rank: a regression that is cut to several ranks is solved once."""
    largest = max(ranks)
    constants: dict[int, list[Tensor]] = {rank: [] for rank in ranks}
    us, vs = [], []
    for expert in range(weights.num_experts):
        pairs = []
        for batch in tokens.batches():
            if batch.held_out:
                continue
            here_TK = batch.index_TK == expert
            inputs_TD = batch.read_by(expert)
            gate_T = batch.weights_TK[here_TK]
            pairs.append((inputs_TD, expert_outputs(weights, expert, inputs_TD, activation), gate_T.double().square()))
        if 0 in constants:
            constants[0].append(fit_constant((output_TD for _, output_TD, _ in pairs), weights.d_model))
        if not largest:
            continue
        constant_D, u_DR, v_RD = fit_affine(pairs, largest, weights.d_model)
        us.append(u_DR)
        vs.append(v_RD)
        left_R = v_RD @ weighted_mean(((inputs_TD, weight_T) for inputs_TD, _, weight_T in pairs), weights.d_model)
        for rank in constants:
            if rank:
                # The mean that directions which are cut off gave goes to the constant.
                constants[rank].append(constant_D + u_DR[:, rank:] @ left_R[rank:])
    dtype = torch.promote_types(next(iter(weights.tensors.values())).dtype, torch.float32)
    made = {}
    for rank, all_D in constants.items():
        factors = [torch.stack(us)[:, :, :rank].to(dtype), torch.stack(vs)[:, :rank].to(dtype)] if rank else []
        made[rank] = Novices(torch.stack(all_D).to(dtype), *factors)
    return made


@torch.no_grad()
def remainder_sums(
    weights: ExpertWeights,
    activation: ExpertActivation,
    tokens: LayerTokens,
    novices: Novices | None = None,
    held_out_alone: bool = False,
) -> OutputSums:
    """Sums over what experts give on all tokens, or those held out, less what their novices would."""
    total = OutputSums.empty(weights.num_experts, weights.d_model, weights.tensors[weights.names()[0]].device)
    for batch in tokens.batches():
        if held_out_alone and not batch.held_out:
            continue
        outputs_TKD = batch.inputs_TD.new_zeros(*batch.index_TK.shape, weights.d_model)
        for expert in range(weights.num_experts):
            here_TK = batch.index_TK == expert
            inputs_TD = batch.read_by(expert)
            given_TD = expert_outputs(weights, expert, inputs_TD, activation)
            if novices is not None:
                given_TD = given_TD - novices.output(expert, inputs_TD).to(given_TD)
            outputs_TKD[here_TK] = given_TD.to(outputs_TKD)
        total.add_(OutputSums.measured(outputs_TKD, batch.index_TK, batch.weights_TK, weights.num_experts))
    return total


def expert_outputs(weights: ExpertWeights, expert: int, inputs_TD: Tensor, activation: ExpertActivation) -> Tensor:
    """[T, D]: what one expert gives."""
    one = weights.select(torch.tensor([expert]))
    return output(one, hidden(one, inputs_TD[None], activation))[0]
