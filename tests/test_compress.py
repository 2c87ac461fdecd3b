"""Low-rank factors: closed forms, brute force, laws, and the published arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mcsmoe.compress.lowrank import decompose, decompose_whitened, factored_parameters, stable_rank
from mcsmoe.types import LowRankFactors


def matrices(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spectrum(out: int, inner: int, values: Tensor, seed: int = 0) -> Tensor:
    """[1, o, i] with the given singular values and random singular vectors."""
    size = min(out, inner)
    left = torch.linalg.qr(matrices(out, size, seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(matrices(inner, size, seed=seed + 1, dtype=torch.float64)).Q
    return ((left * values) @ right.T)[None].float()


def product(factors: LowRankFactors) -> Tensor:
    return factors.u_GoR @ factors.v_GRi


def exact_error(matrix_Goi: Tensor, rank: int) -> Tensor:
    """[G]: Frobenius norm of what the best approximation of that rank leaves, from numpy."""
    values = np.linalg.svd(matrix_Goi.double().numpy(), compute_uv=False)
    return torch.from_numpy(np.sqrt((values[:, rank:] ** 2).sum(axis=1)))


# -- decomposition -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (160, 120), (120, 160)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_product_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = matrices(3, *shape, dtype=torch.float64)
    factors = decompose(matrix, rank)
    u, s, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    best = torch.from_numpy((u[:, :, :rank] * s[:, None, :rank]) @ v[:, :rank])
    assert (product(factors) - best).abs().max() < 1e-6
    assert (product(factors) + factors.residual_Goi - matrix).abs().max() < 1e-12
    # Singular values are split evenly: both factors have orthogonal directions of squared length s.
    square = torch.diag_embed(torch.from_numpy(s[:, :rank]))
    assert (factors.u_GoR.mT @ factors.u_GoR - square).abs().max() < 1e-6
    assert (factors.v_GRi @ factors.v_GRi.mT - square).abs().max() < 1e-6


SPECTRA = {
    "flat": torch.ones(128),
    "linear": torch.linspace(1, 0, 128),
    "geometric": 0.8 ** torch.arange(128.0),
    "steep": 10.0 ** -torch.arange(0, 12.8, 0.1),
    "low rank": torch.cat([torch.linspace(1, 0.5, 12), torch.zeros(116)]),
    "step far below": torch.cat([torch.ones(4), torch.full((12,), 1e-5), torch.zeros(112)]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(128, 320), (320, 128), (128, 128)])
def test_reconstruction_error_is_the_exact_one_for_any_spectrum(name: str, shape: tuple[int, int]) -> None:
    matrix = spectrum(*shape, SPECTRA[name].double())
    for rank in (1, 4, 16, 100, 128):
        error = torch.linalg.matrix_norm(matrix.double() - product(decompose(matrix, rank)).double())
        # Equal to 1e-4 of itself, but for float32 rounding of the matrix.
        assert (error <= exact_error(matrix, rank) * (1 + 1e-4) + 2e-6 * torch.linalg.matrix_norm(matrix)).all()


def test_zero_matrices_and_half_precision() -> None:
    zero = decompose(torch.zeros(2, 128, 200), 3)
    assert product(zero).abs().max() == 0 == zero.residual_Goi.abs().max()
    matrix = matrices(2, 128, 100, dtype=torch.bfloat16)
    half = decompose(matrix, 8)
    assert half.u_GoR.dtype == half.residual_Goi.dtype == torch.bfloat16
    # What is stored adds up, to the precision it is stored in.
    assert (product(half) + half.residual_Goi - matrix).abs().max() < 0.05


def test_a_group_decomposes_the_same_whoever_it_is_stacked_with() -> None:
    matrix = matrices(4, 130, 140)
    together, alone = decompose(matrix, 6), decompose(matrix[2:3], 6)
    assert (product(together)[2] - product(alone)[0]).abs().max() < 1e-5


def test_defect_rank_ceil() -> None:
    # Through a ratio of parameters and back, rank 17 of 1024 x 2816 became 18.
    ratio = 17 * (1024 + 2816) / (1024 * 2816)
    assert np.ceil(ratio * (1024 * 2816) / (1024 + 2816)) == 18
    assert decompose(matrices(1, 1024, 2816), 17).u_GoR.shape == (1, 1024, 17)


def nan_in_group_1(tensor: Tensor) -> Tensor:
    tensor[1, 0, 0] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("matrix", "rank", "message"),
    [
        (matrices(2, 8, 6), 7, r"layer x: wi: rank is 7, but the matrix is 8 x 6; give a whole number from 1 to 6"),
        (matrices(2, 8, 6), 0, "rank is 0"),
        (matrices(2, 8, 6), 2.0, r"rank is 2\.0"),
        (matrices(8, 6), 2, r"shape \(8, 6\) is not a stack"),
        (nan_in_group_1(matrices(2, 8, 6)), 2, "layer x: wi: entries of group 1 are not finite"),
    ],
)
def test_bad_matrices_and_ranks_are_named(matrix: Tensor, rank: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(matrix, rank, name="layer x: wi")


# -- activation-aware decomposition ------------------------------------------------------------------------------
def gram_of(inputs_GTi: Tensor) -> Tensor:
    return inputs_GTi.mT.double() @ inputs_GTi.double()


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (150, 110)])
def test_whitened_factors_are_the_best_on_the_inputs(shape: tuple[int, int]) -> None:
    out, inner = shape
    matrix = matrices(2, out, inner, dtype=torch.float64)
    scale = torch.logspace(0, -2, inner, dtype=torch.float64)
    inputs = matrices(2, 400, inner, seed=5, dtype=torch.float64) * scale
    made = decompose_whitened(matrix, gram_of(inputs), 6, regularisation=1e-12)
    assert (product(made) + made.residual_Goi - matrix).abs().max() < 1e-12
    # The outputs of the best factors are the best approximation, of that rank, of the outputs themselves.
    outputs = matrix @ inputs.mT
    error = torch.linalg.matrix_norm((matrix - product(made)) @ inputs.mT)
    assert torch.allclose(error, exact_error(outputs, 6), rtol=1e-6)
    plain = torch.linalg.matrix_norm((matrix - product(decompose(matrix, 6))) @ inputs.mT)
    assert (plain > 1.05 * error).all()
    # Factors are balanced, as those of the plain decomposition.
    assert (made.u_GoR.mT @ made.u_GoR - made.v_GRi @ made.v_GRi.mT).abs().max() < 1e-9


def test_whitening_with_equal_or_no_inputs_is_the_plain_decomposition() -> None:
    matrix = matrices(3, 20, 12)
    gram = torch.stack([torch.eye(12), torch.zeros(12, 12), 1e6 * torch.eye(12)])
    made = decompose_whitened(matrix, gram, 4)
    assert (product(made) - product(decompose(matrix, 4))).abs().max() < 1e-5


def test_whitening_does_not_depend_on_how_many_inputs_were_seen() -> None:
    matrix, gram = matrices(1, 20, 12), gram_of(matrices(1, 50, 12, seed=3))
    first, second = (product(decompose_whitened(matrix, gram * scale, 4)) for scale in (1.0, 1e-3))
    assert (first - second).abs().max() < 1e-6


def test_fewer_inputs_than_dimensions_are_reproduced_and_the_rest_stays_finite() -> None:
    matrix = matrices(1, 20, 12, dtype=torch.float64)
    inputs = matrices(1, 3, 12, seed=4, dtype=torch.float64)
    made = decompose_whitened(matrix, gram_of(inputs), 5, regularisation=1e-10)
    assert ((matrix - product(made)) @ inputs.mT).abs().max() < 1e-3
    assert torch.isfinite(made.u_GoR).all()


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(20)[None], r"layer x: wi: the Gram matrix of the inputs has shape \(1, 20, 20\), not \(2, 12, 12\)"),
        (nan_in_group_1(torch.eye(12).repeat(2, 1, 1)), "Gram matrix of the inputs: entries of group 1 are not finite"),
        (-torch.eye(12).repeat(2, 1, 1), "group 0 has a negative trace"),
    ],
)
def test_bad_gram_matrices_are_named(gram: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose_whitened(matrices(2, 20, 12), gram, 4, name="layer x: wi")


# -- stable rank and sizes ---------------------------------------------------------------------------------------
def test_stable_rank_closed_forms() -> None:
    one = torch.outer(torch.arange(1.0, 7), torch.ones(4))
    identity = 3.0 * torch.eye(6, 4)
    graded = torch.zeros(6, 4)
    graded[range(4), range(4)] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    found = stable_rank(torch.stack([one, identity, graded, torch.zeros(6, 4)]))
    assert found.tolist() == pytest.approx([1.0, 4.0, 7 / 4, 0.0])
    matrix = matrices(3, 10, 40)
    values = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(stable_rank(matrix), (values**2).sum(dim=1) / values[:, 0] ** 2)


def test_published_parameter_counts_follow_from_arithmetic() -> None:
    width, hidden, experts, layers, vocabulary, kv = 768, 3072, 32, 12, 32128, 12 * 64
    attention = 4 * width * kv
    blocks = 12
    dense = vocabulary * width + 3 * blocks * attention + (2 * blocks - layers) * 2 * width * hidden
    norms_and_biases = (5 * blocks + 2) * width + 2 * 32 * 12
    expert = 2 * width * hidden
    rest = dense + norms_and_biases + layers * experts * width
    full = rest + layers * experts * expert
    merged = full - 11 * (experts - 8) * expert
    small = factored_parameters(hidden, width, 32, 0.1) + factored_parameters(width, hidden, 32, 0.1)
    found = (full, merged, merged - 11 * 8 * (expert - small), full - 11 * experts * (expert - small))
    assert [round(count / 1e6, 1) for count in found] == pytest.approx([1978.5, 732.8, 380.7, 570.2], abs=0.051)
