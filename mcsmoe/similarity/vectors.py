"""Bases that compare one vector per expert by its cosine: router, weights, mean inputs, gradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mcsmoe.similarity.base import Base, SimilarityInputs, cosine, gram, mapped
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.types import ExpertWeights, Role, RouterWeights

_BLOCK = 2**16  # elements of each expert's vector that are compared at once


def router_logits(inputs: SimilarityInputs) -> Tensor:
    """Columns of the raw router logits over all tokens (equation 1)."""
    return mapped(cosine(_statistics(inputs).logits_gram_EE))


def router_weight(inputs: SimilarityInputs) -> Tensor:
    """Rows of the router's matrix."""
    return mapped(cosine(gram([_router(inputs).weight_ED])))


def router_weight_feature(inputs: SimilarityInputs) -> Tensor:
    """Rows of the router's matrix times the L2 norm of each input dimension over all tokens."""
    weight_ED = _router(inputs).weight_ED.double()
    norm_D = _statistics(inputs).token_square_sum_D.sqrt().to(weight_ED.device)
    return mapped(cosine(gram([weight_ED * norm_D])))


def weight(inputs: SimilarityInputs) -> Tensor:
    """All parameters of an expert, biases included."""
    return mapped(cosine(gram(_blocks(_weights(inputs)))))


def feature(inputs: SimilarityInputs) -> Tensor:
    """Mean input of an expert."""
    return mapped(cosine(gram([_statistics(inputs).input_sum_ED])))  # the scale of a vector does not matter


def feature_abs(inputs: SimilarityInputs) -> Tensor:
    """Mean absolute input of an expert."""
    return mapped(cosine(gram([_statistics(inputs).input_abs_sum_ED])))


def weight_feature(inputs: SimilarityInputs) -> Tensor:
    """Input projections of an expert times the L2 norm of each dimension of its inputs."""
    weights = _weights(inputs)
    norm_ED = _statistics(inputs).input_square_sum_ED.sqrt()

    def scaled() -> Iterator[Tensor]:
        for name in weights.names(Role.INPUT):
            matrix_EFD = weights.tensors[name]
            scale_E1D = norm_ED.to(matrix_EFD.device)[:, None, :]
            for rows_EfD in matrix_EFD.split(max(1, _BLOCK // weights.d_model), dim=1):
                yield (rows_EfD * scale_E1D).flatten(1)

    return mapped(cosine(gram(scaled())))


def gradient(inputs: SimilarityInputs) -> Tensor:
    """Gradient of the loss by an expert's parameters."""
    assert inputs.gradients is not None
    return mapped(cosine(gram(_blocks(inputs.gradients))))


def weight_gradient(inputs: SimilarityInputs) -> Tensor:
    """An expert's parameters times the gradient of the loss by them, element by element."""
    assert inputs.gradients is not None
    pairs = zip(_blocks(_weights(inputs)), _blocks(inputs.gradients), strict=True)
    return mapped(cosine(gram(one_EP.double() * other_EP.to(one_EP.device).double() for one_EP, other_EP in pairs)))


def random(inputs: SimilarityInputs) -> Tensor:
    """Uniform random numbers in [0, 1): a control. The same for the same seed and layer."""
    generator = torch.Generator().manual_seed(zlib.crc32(inputs.layer.encode()) + (inputs.seed << 32))
    upper_EE = torch.rand(inputs.num_experts, inputs.num_experts, dtype=torch.float64, generator=generator).triu(1)
    return upper_EE + upper_EE.T


def _blocks(weights: ExpertWeights) -> Iterator[Tensor]:
    """All parameters, [E, at most _BLOCK] at a time: copies of wide types are never of a whole layer."""
    for tensor in weights.tensors.values():
        yield from tensor.flatten(1).split(_BLOCK, dim=1)


def _statistics(inputs: SimilarityInputs) -> LayerStatistics:
    assert inputs.statistics is not None
    return inputs.statistics


def _weights(inputs: SimilarityInputs) -> ExpertWeights:
    assert inputs.weights is not None
    return inputs.weights


def _router(inputs: SimilarityInputs) -> RouterWeights:
    assert inputs.router is not None
    return inputs.router


VECTOR_BASES: dict[str, Base] = {
    "router-logits": router_logits,
    "router-weight": router_weight,
    "weight": weight,
    "feature": feature,
    "feature.abs": feature_abs,
    "weight-feature": weight_feature,
    "router-weight-feature": router_weight_feature,
    "gradient": gradient,
    "weight-gradient": weight_gradient,
    "random": random,
}
