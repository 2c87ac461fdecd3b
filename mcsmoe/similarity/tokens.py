"""Bases that run experts on tokens kept of them: error of the pair's average, correlation of activations, mean output.

The tokens of an expert are its reservoir. A token kept stands for (tokens computed / tokens kept) of its expert's, so an
expert with more tokens has more say, as if all of them had been kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.similarity.base import NEUTRAL, Base, SimilarityInputs, cosine, gram, mapped
from mcsmoe.types import ExpertActivation, ExpertWeights, Role

FEWEST_TOKENS = 8
"""A pair with fewer tokens has a neutral correlation: over a handful of tokens the best match of any two experts'
neurons is near 1, and would call experts alike because nothing is known of them."""

_BLOCK_BYTES = 2**26  # of a block's intermediate results


# -- stacked experts on stacked tokens ---------------------------------------------------------------------------
def hidden(weights: ExpertWeights, inputs_BTD: Tensor, activation: ExpertActivation) -> Tensor:
    """[B, T, F]: hidden activations of B stacked experts, each on tokens of its own, in float32 or wider."""
    made = {}
    for name in weights.names(Role.INPUT):
        matrix_BFD = _wide(weights.tensors[name])
        made[name] = torch.bmm(inputs_BTD.to(matrix_BFD), matrix_BFD.transpose(1, 2))
        if f"{name}_bias" in weights.tensors:
            made[name] += _wide(weights.tensors[f"{name}_bias"])[:, None, :]
    return activation(made)


def output(weights: ExpertWeights, hidden_BTF: Tensor) -> Tensor:
    """[B, T, D]: outputs of B stacked experts from their hidden activations."""
    (name,) = weights.names(Role.OUTPUT)
    matrix_BDF = _wide(weights.tensors[name])
    made_BTD = torch.bmm(hidden_BTF.to(matrix_BDF), matrix_BDF.transpose(1, 2))
    if f"{name}_bias" in weights.tensors:
        made_BTD += _wide(weights.tensors[f"{name}_bias"])[:, None, :]
    return made_BTD


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Sample:
    """Tokens kept of a layer's experts, with what is needed to run experts on them."""

    weights: ExpertWeights
    activation: ExpertActivation
    input_ESD: Tensor
    weight_ES: Tensor  # tokens that each one stands for; 0 in empty places
    count_E: Tensor  # tokens kept

    @classmethod
    def of(cls, inputs: SimilarityInputs) -> Sample:
        """From inputs that were checked to have tokens."""
        statistics, weights, activation = inputs.statistics, inputs.weights, inputs.activation
        assert statistics is not None
        assert statistics.reservoir is not None
        assert weights is not None
        assert activation is not None
        reservoir, device = statistics.reservoir, next(iter(weights.tensors.values())).device
        count_E = reservoir.count_E
        stands_E = statistics.computed_E / count_E.clamp(min=1).double()
        kept_ES = torch.arange(reservoir.key_ES.shape[1], device=count_E.device) < count_E[:, None]
        weight_ES = torch.where(kept_ES, stands_E[:, None], 0.0)
        return cls(weights, activation, reservoir.input_ESD.to(device), weight_ES.to(device), count_E.to(device))

    def pair_blocks(self, floats: int) -> Iterator[tuple[Tensor, Tensor]]:
        """First and second experts of all pairs i < j, as many at once as ``floats`` numbers for each allow."""
        experts = self.count_E.shape[0]
        first_P, second_P = torch.triu_indices(experts, experts, 1, device=self.count_E.device)
        size = max(1, _BLOCK_BYTES // (4 * floats))
        yield from zip(first_P.split(size), second_P.split(size), strict=True)

    def both(self, first_B: Tensor, second_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 2S, D] and [B, 2S]: tokens of both experts of each pair, and how many each stands for."""
        inputs = torch.cat([self.input_ESD[first_B], self.input_ESD[second_B]], dim=1)
        return inputs, torch.cat([self.weight_ES[first_B], self.weight_ES[second_B]], dim=1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """E, S, D and F."""
        experts, size, width = self.input_ESD.shape
        return experts, size, width, self.weights.width


# -- mse ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def pair_errors(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [E, E] squared output error of the average of each pair, float64 [E] squared outputs, and [E] tokens.

    The error of pair (i, j) is summed over outputs and over the tokens of both experts, between what the average of the
    two computes and what the token's own expert does. The weights and matched neurons are taken as they are.
    """
    experts, size, width, ff = sample.shape
    own_ESD = torch.cat(
        [
            output(one := sample.weights.select(block), hidden(one, sample.input_ESD[block], sample.activation))
            for block in torch.arange(experts).split(max(1, _BLOCK_BYTES // (4 * 2 * ff * (width + size))))
        ]
    )
    weight_ES = sample.weight_ES.double()
    square_E = (own_ESD.double().square().sum(dim=2) * weight_ES).sum(dim=1)
    error_EE = torch.zeros(experts, experts, dtype=torch.float64, device=square_E.device)
    names = len(sample.weights.names(Role.INPUT, Role.OUTPUT))
    for first_B, second_B in sample.pair_blocks(3 * names * ff * width + 4 * size * (width + ff)):
        average = _average(sample.weights.select(first_B), sample.weights.select(second_B))
        inputs_BTD, weight_BT = sample.both(first_B, second_B)
        wanted_BTD = torch.cat([own_ESD[first_B], own_ESD[second_B]], dim=1)
        apart_BTD = output(average, hidden(average, inputs_BTD, sample.activation)) - wanted_BTD
        error_EE[first_B, second_B] = (apart_BTD.double().square().sum(dim=2) * weight_BT.double()).sum(dim=1)
    return error_EE + error_EE.T, square_E, weight_ES.sum(dim=1)


def _average(one: ExpertWeights, other: ExpertWeights) -> ExpertWeights:
    return one.map(lambda name, tensor: (_wide(tensor) + _wide(other.tensors[name])) / 2)


def mse(inputs: SimilarityInputs) -> Tensor:
    """1 / (1 + e), e the error of the pair's average on its tokens relative to the layer's mean squared output.

    e is the mean squared output error per token over the mean squared output per token of the whole layer: within a layer
    the similarity falls strictly as the error grows, from 1 for experts that can be averaged freely. The published map
    1 / (1 + 0.1 log(error)) has a pole and is largest just beyond it.
    """
    error_EE, square_E, tokens_E = pair_errors(Sample.of(inputs))
    tokens_EE = tokens_E[:, None] + tokens_E[None, :]
    mean_EE = error_EE / tokens_EE.clamp(min=1)
    layer = square_E.sum() / tokens_E.sum().clamp(min=1)
    # As layer / (layer + error): defined where all outputs are zero too.
    similarity_EE = torch.where(mean_EE == 0, 1.0, layer / (layer + mean_EE))
    return torch.where(tokens_EE > 0, similarity_EE, NEUTRAL)


# -- correlation of hidden activations ---------------------------------------------------------------------------
@torch.no_grad()
def pair_correlations(sample: Sample) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs i < j block by block: i [B], j [B] and [B, F, F] correlation of i's neurons (rows) with j's.

    Correlations are over the tokens of both experts; those of a neuron that never changes are zero.
    """
    _, size, width, ff = sample.shape
    names = len(sample.weights.names(Role.INPUT))
    for first_B, second_B in sample.pair_blocks(2 * names * ff * width + 2 * size * (width + 6 * ff) + ff * ff):
        inputs_BTD, weight_BT = sample.both(first_B, second_B)
        sides = [
            _standard(hidden(sample.weights.select(side_B), inputs_BTD, sample.activation), weight_BT)
            for side_B in (first_B, second_B)
        ]
        yield first_B, second_B, torch.bmm(sides[0].transpose(1, 2), sides[1]).clamp_(-1, 1)


def _standard(hidden_BTF: Tensor, weight_BT: Tensor) -> Tensor:
    """Columns centred by their weighted mean and of unit norm, so that products of two are correlations."""
    weight_BT1 = weight_BT.to(hidden_BTF)[:, :, None]
    total_B11 = weight_BT1.sum(dim=1, keepdim=True).clamp(min=1)
    mean_B1F = (hidden_BTF * weight_BT1).sum(dim=1, keepdim=True) / total_B11
    scaled_BTF = (hidden_BTF - mean_B1F) * weight_BT1.sqrt()
    norm_B1F = torch.linalg.vector_norm(scaled_BTF, dim=1, keepdim=True)
    # Rounding leaves a constant column with a norm of about eps times its size: that is no variation to correlate.
    size_B1F = torch.linalg.vector_norm(hidden_BTF * weight_BT1.sqrt(), dim=1, keepdim=True)
    return scaled_BTF * torch.where(norm_B1F <= 1e-6 * size_B1F, 0.0, 1 / norm_B1F)


def _correlated(inputs: SimilarityInputs, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Similarity from ``score``, which maps [B, F, F] correlations to [B] in [-1, 1]."""
    sample = Sample.of(inputs)
    experts, device = sample.count_E.shape[0], sample.count_E.device
    similarity_EE = torch.full((experts, experts), NEUTRAL, dtype=torch.float64, device=device)
    enough_EE = sample.count_E[:, None] + sample.count_E[None, :] >= FEWEST_TOKENS
    for first_B, second_B, correlation_BFF in pair_correlations(sample):
        # Not every score takes numbers that overflowed; they are to be reported by expert.
        finite_B = torch.isfinite(correlation_BFF).flatten(1).all(dim=1)
        score_B = score(correlation_BFF.nan_to_num_()).double().to(device)
        similarity_EE[first_B, second_B] = mapped(torch.where(finite_B, score_B, torch.nan))
    upper_EE = torch.where(enough_EE, similarity_EE, NEUTRAL).triu(1)
    return upper_EE + upper_EE.T


def correlation_lsa(inputs: SimilarityInputs) -> Tensor:
    """Mean correlation of hidden activations, neurons matched one to one so that it is largest."""
    from scipy.optimize import linear_sum_assignment

    def matched(correlation_FF: Tensor) -> float:
        matrix = correlation_FF.cpu().numpy()
        return float(matrix[linear_sum_assignment(matrix, maximize=True)].mean())

    # The solver releases the interpreter lock, so threads solve side by side without copies.
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return _correlated(inputs, lambda found_BFF: torch.tensor(list(pool.map(matched, found_BFF))))


def correlation_max(inputs: SimilarityInputs) -> Tensor:
    """Mean over the neurons of both experts of the largest correlation with a neuron of the other.

    Taken in both directions and averaged, so that neither expert's neurons decide alone.
    """
    return _correlated(
        inputs, lambda found_BFF: (found_BFF.amax(dim=1).mean(dim=1) + found_BFF.amax(dim=2).mean(dim=1)) / 2
    )


# -- mean output on shared tokens --------------------------------------------------------------------------------
@torch.no_grad()
def mean_outputs(sample: Sample) -> Tensor:
    """float64 [E, D]: mean output of each expert over the tokens kept of all experts; zero where there are none."""
    experts, size, width, ff = sample.shape
    total = sample.weight_ES.sum()
    weight_T = (sample.weight_ES / total.clamp(min=1)).flatten()
    inputs_TD = sample.input_ESD.flatten(0, 1)[weight_T > 0]
    weight_T = weight_T[weight_T > 0]
    names = len(sample.weights.names(Role.INPUT))
    block = max(1, _BLOCK_BYTES // (4 * (names * ff * width + experts * size * (names + 1) * ff)))
    made = []
    for chosen_B in torch.arange(experts).split(block):
        one = sample.weights.select(chosen_B)
        hidden_BTF = hidden(one, inputs_TD.expand(len(chosen_B), -1, -1), sample.activation)
        # The output is linear in the hidden activations, so the mean is taken before the second matrix.
        mean_B1F = torch.einsum("btf,t->bf", hidden_BTF.double(), weight_T)[:, None, :].to(hidden_BTF)
        made.append(output(one, mean_B1F)[:, 0].double())
    return torch.cat(made) * (total > 0)


def expert_output(inputs: SimilarityInputs) -> Tensor:
    """Mean output of an expert on tokens that all experts share (HC-SMoE, arXiv 2410.08589)."""
    return mapped(cosine(gram([mean_outputs(Sample.of(inputs))])))


def expert_output_distance(inputs: SimilarityInputs) -> Tensor:
    """1 less the Euclidean distance of the experts' mean outputs on shared tokens, over the largest in the layer.

    What HC-SMoE's source clusters by. The map is linear, so that average linkage merges what it merges by distances; a cosine
    leaves out how large an output is.
    """
    output_ED = mean_outputs(Sample.of(inputs))
    distance_EE = torch.cdist(output_ED, output_ED, compute_mode="donot_use_mm_for_euclid_dist")
    largest = float(distance_EE.max())
    # Numbers that are not finite go on as they are: they are reported by expert.
    return 1 - distance_EE / largest if largest != 0 else torch.full_like(distance_EE, NEUTRAL)


TOKEN_BASES: dict[str, Base] = {
    "mse": mse,
    "feature-correlation.lsa": correlation_lsa,
    "feature-correlation.max": correlation_max,
    "expert-output": expert_output,
    "expert-output.distance": expert_output_distance,
}
