"""Novices of a layer, fitted on its tokens, and what they leave of its experts' outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.compress.novices import fit_affine, fit_constant
from mcsmoe.similarity.tokens import hidden, output
from mcsmoe.statistics.outputs import OutputSums
from mcsmoe.types import ExpertActivation, ExpertWeights, Novices


@torch.no_grad()
def fit_novices(weights: ExpertWeights, activation: ExpertActivation, tokens: LayerTokens, rank: int) -> Novices:
    """A novice for every expert, constant for rank 0, on the tokens that are not held out; one expert at a time."""
    constants, us, vs = [], [], []
    for expert in range(weights.num_experts):
        pairs = []
        for batch in tokens.batches():
            if batch.held_out:
                continue
            here_TK = batch.index_TK == expert
            inputs_TD = batch.read_by(expert)
            gate_T = batch.weights_TK[here_TK]
            pairs.append((inputs_TD, expert_outputs(weights, expert, inputs_TD, activation), gate_T.double().square()))
        if rank:
            constant_D, u_DR, v_RD = fit_affine(pairs, rank, weights.d_model)
            us.append(u_DR)
            vs.append(v_RD)
        else:
            constant_D = fit_constant((output_TD for _, output_TD, _ in pairs), weights.d_model)
        constants.append(constant_D)
    dtype = torch.promote_types(next(iter(weights.tensors.values())).dtype, torch.float32)
    factors = (torch.stack(us).to(dtype), torch.stack(vs).to(dtype)) if rank else (None, None)
    return Novices(torch.stack(constants).to(dtype), *factors)


@torch.no_grad()
def remainder_sums(
    weights: ExpertWeights, activation: ExpertActivation, tokens: LayerTokens, novices: Novices | None = None
) -> OutputSums:
    """Sums over what experts give on all tokens, less what their novices would."""
    total = OutputSums.empty(weights.num_experts, weights.d_model, weights.tensors[weights.names()[0]].device)
    for batch in tokens.batches():
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
