"""W = U V + S: truncated singular value decomposition of all experts of a layer at once (section 3.2 of MC-SMoE).

A full decomposition per matrix computes all min(o, i) singular vectors to keep R of them. Here only the wanted subspace
is computed, as leading eigenvectors of the Gram matrix of the smaller side. That squares the condition: where wanted
singular values are small beside the largest they drown in rounding, and the subspace is refined on W itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.types import LowRankFactors

_EXACT_BELOW = 96  # smaller side up to which the full decomposition is cheap enough
_EXTRA = 8  # directions carried beyond the rank, so that a refinement may choose between near-ties
_RESOLVED = 3e-4  # share of the largest eigenvalue above which float32 tells eigenvectors from rounding
_GRAM_BLOCKS = 4


def check_rank(matrix_Goi: Tensor, rank: int, name: str = "matrix") -> None:
    """Raise ValueError naming the matrix and the value unless 1 <= rank <= min(o, i)."""
    if matrix_Goi.ndim != 3:
        raise ValueError(f"{name}: shape {tuple(matrix_Goi.shape)} is not a stack of matrices [G, o, i]")
    largest = min(matrix_Goi.shape[1:])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(
            f"{name}: rank is {rank!r}, but the matrix is {matrix_Goi.shape[1]} x {matrix_Goi.shape[2]}; "
            f"give a whole number from 1 to {largest}"
        )


def _require_finite(tensor: Tensor, name: str) -> None:
    # One pass without a mask: a sum is finite only if its terms are, and a false alarm is looked into.
    if bool(torch.isfinite(_working(tensor).flatten(1).sum(dim=1)).all()):
        return
    bad_G = ~torch.isfinite(tensor).flatten(1).all(dim=1)
    if bad_G.any():
        raise ValueError(f"{name}: entries of group {int(bad_G.nonzero()[0])} are not finite; its training diverged")


def _working(matrix: Tensor) -> Tensor:
    return matrix.detach().to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)


def _gram(tall_GMm: Tensor) -> Tensor:
    """[G, m, m]: A^T A, the blocks on and below the diagonal only; a symmetric solver reads no more than that."""
    size = tall_GMm.shape[2]
    gram_Gmm = tall_GMm.new_zeros(tall_GMm.shape[0], size, size)
    step = -(-size // _GRAM_BLOCKS)
    for start in range(0, size, step):
        rows = slice(start, start + step)
        gram_Gmm[:, rows, : start + step] = tall_GMm[:, :, rows].mT @ tall_GMm[:, :, : start + step]
    return gram_Gmm


def _top_eigen(gram_Gmm: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues [G, count], descending, and eigenvectors [G, m, count]; overwrites the lower triangle."""
    size = gram_Gmm.shape[1]
    if gram_Gmm.device.type != "cpu" or 2 * count > size:
        value_Gm, vector_Gmm = torch.linalg.eigh(gram_Gmm, UPLO="L")
        return value_Gm[:, -count:].flip(1), vector_Gmm[:, :, -count:].flip(2)
    from scipy.linalg import eigh
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # LAPACK computes a part of the eigenvectors in less than half the time of all; torch offers all only. One thread:
    # the reduction is bound by memory, and threads that wait for each other on a busy machine make it far slower.
    wanted = {"subset_by_index": [size - count, size - 1], "driver": "evr"}
    with threadpool_limits(1, user_api="blas"):
        # The transposed view has LAPACK's own order of memory, so that nothing is copied; its triangle is the upper.
        found = [eigh(gram.T, lower=False, overwrite_a=True, check_finite=False, **wanted) for gram in gram_Gmm.numpy()]
    value_Gb = torch.stack([torch.from_numpy(value) for value, _ in found])
    vector_Gmb = torch.stack([torch.from_numpy(vector) for _, vector in found])
    return value_Gb.flip(1), vector_Gmb.flip(2)


def _leading_tall(tall_GMm: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``leading_singular`` for M >= m, v being [G, m, R]."""
    value_Gb, right_Gmb = _top_eigen(_gram(tall_GMm), min(rank + _EXTRA, tall_GMm.shape[2]))
    if bool((value_Gb[:, rank - 1] > _RESOLVED * value_Gb[:, 0]).all()):
        right_GmR = right_Gmb[:, :, :rank]
        scaled_GMR = tall_GMm @ right_GmR
        s_GR = torch.linalg.vector_norm(scaled_GMR, dim=1)
        return scaled_GMR / s_GR[:, None, :], s_GR, right_GmR
    # Half a step of subspace iteration, which what rounding added does not survive; then W inside that subspace.
    basis_GMb = torch.linalg.qr(tall_GMm @ right_Gmb).Q
    right_Gmb, triangle_Gbb = torch.linalg.qr(tall_GMm.mT @ basis_GMb)
    inner_v, s_Gb, inner_u = torch.linalg.svd(triangle_Gbb)
    return basis_GMb @ inner_u[:, :rank].mT, s_Gb[:, :rank], right_Gmb @ inner_v[:, :, :rank]


def leading_singular(matrix_Goi: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of each matrix: u [G, o, R], s [G, R], v [G, R, i].

    The reconstruction error ||W - u s v|| is that of the exact truncated decomposition to a relative 1e-4 (measured in
    float32: 1e-6 and less). u and v are orthonormal to about 1e-4.
    """
    _, out, inner = matrix_Goi.shape
    if min(out, inner) <= _EXACT_BELOW:
        u_Gom, s_Gm, v_Gmi = torch.linalg.svd(matrix_Goi, full_matrices=False)
        return u_Gom[:, :, :rank], s_Gm[:, :rank], v_Gmi[:, :rank]
    if out >= inner:
        u_GoR, s_GR, v_GiR = _leading_tall(matrix_Goi, rank)
        return u_GoR, s_GR, v_GiR.mT
    v_GiR, s_GR, u_GoR = _leading_tall(matrix_Goi.mT, rank)
    return u_GoR, s_GR, v_GiR.mT


def _factors(matrix_Goi: Tensor, u_GoR: Tensor, s_GR: Tensor, v_GRi: Tensor) -> LowRankFactors:
    root_GR = s_GR.clamp(min=0).sqrt()
    u_GoR = (u_GoR * root_GR[:, None, :]).to(matrix_Goi.dtype)
    v_GRi = (root_GR[:, :, None] * v_GRi).to(matrix_Goi.dtype)
    # The residual is taken from the stored factors, so that the sum is W again whatever their precision.
    return LowRankFactors(u_GoR, v_GRi, torch.baddbmm(matrix_Goi.detach(), u_GoR, v_GRi, alpha=-1))


@torch.no_grad()
def decompose(matrix_Goi: Tensor, rank: int, name: str = "matrix") -> LowRankFactors:
    """Rank-R truncated singular value decomposition, singular values split evenly, and what it leaves.

    Args:
        matrix_Goi: [G, o, i].
        rank: R, from 1 to min(o, i).
        name: named in errors, e.g. layer and tensor.

    Returns:
        u [G, o, R], v [G, R, i] and the residual W - u v [G, o, i], in the dtype and on the device of the matrix.

    Raises:
        ValueError: a rank out of range, or entries that are not finite; names the matrix, the group and the value.
    """
    check_rank(matrix_Goi, rank, name)
    _require_finite(matrix_Goi, name)
    return _factors(matrix_Goi, *leading_singular(_working(matrix_Goi), rank))


@torch.no_grad()
def decompose_whitened(
    matrix_Goi: Tensor, gram_Gii: Tensor, rank: int, name: str = "matrix", regularisation: float = 1e-3
) -> LowRankFactors:
    """Rank-R factors that minimise ||(W - U V) X|| over the inputs X the matrix receives, and what they leave.

    With X X^T = C = L L^T the best U V is Q Q^T W, where Q are the R leading left singular vectors of W L
    (activation-aware decomposition; nothing is inverted). C is regularised by a share of its mean diagonal, so that
    directions without inputs follow the plain decomposition; a group without inputs is decomposed plainly.

    Args:
        matrix_Goi: [G, o, i].
        gram_Gii: [G, i, i], per group the sum (or mean) of x x^T over its inputs.
        rank: R, from 1 to min(o, i).
        name: named in errors, e.g. layer and tensor.
        regularisation: share of the mean diagonal added to the diagonal.

    Raises:
        ValueError: as ``decompose``; or a Gram matrix that does not fit, is not finite or has a negative diagonal.
    """
    check_rank(matrix_Goi, rank, name)
    _require_finite(matrix_Goi, name)
    groups, _, inner = matrix_Goi.shape
    if gram_Gii.shape != (groups, inner, inner):
        raise ValueError(
            f"{name}: the Gram matrix of the inputs has shape {tuple(gram_Gii.shape)}, not {(groups, inner, inner)}"
        )
    _require_finite(gram_Gii, f"{name}, Gram matrix of the inputs")
    gram_Gii = gram_Gii.detach().to(matrix_Goi.device, torch.float64)
    scale_G = gram_Gii.diagonal(dim1=1, dim2=2).mean(dim=1)
    if (scale_G < 0).any():
        raise ValueError(f"{name}: the Gram matrix of group {int((scale_G < 0).nonzero()[0])} has a negative trace")
    used_G = scale_G > 0
    # Scaled to a mean diagonal of 1, which changes no minimiser and makes the share mean the same everywhere.
    gram_Gii = torch.where(used_G[:, None, None], gram_Gii / scale_G.clamp(min=1e-300)[:, None, None], 0.0)
    gram_Gii.diagonal(dim1=1, dim2=2).add_(torch.where(used_G, regularisation, 1.0)[:, None])
    root_Gii = torch.linalg.cholesky(gram_Gii).to(_working(matrix_Goi).dtype)
    weights_Goi = _working(matrix_Goi)
    basis_GoR = torch.linalg.qr(leading_singular(weights_Goi @ root_Gii, rank)[0]).Q
    # Re-split evenly: the factors of the whitened matrix are not balanced for the matrix itself.
    right_GiR, triangle_GRR = torch.linalg.qr(weights_Goi.mT @ basis_GoR)
    inner_v, s_GR, inner_u = torch.linalg.svd(triangle_GRR)
    return _factors(matrix_Goi, basis_GoR @ inner_u.mT, s_GR, (right_GiR @ inner_v).mT)


@torch.no_grad()
def stable_rank(matrix_Goi: Tensor) -> Tensor:
    """[G] float64: squared Frobenius norm over squared spectral norm, from 1 to min(o, i); 0 for a zero matrix.

    The paper's measure of how compressible experts are before and after merging (section 3.2).
    """
    matrix_Goi = matrix_Goi.detach().to(torch.float64)
    _, out, inner = matrix_Goi.shape
    gram = matrix_Goi @ matrix_Goi.mT if out < inner else matrix_Goi.mT @ matrix_Goi
    total_G = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    largest_G = torch.linalg.eigvalsh(gram)[:, -1]
    return torch.where(total_G > 0, total_G / largest_G.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def factored_parameters(out: int, inner: int, rank: int, kept_fraction: float) -> int:
    """Parameters of one compressed o x i matrix: R (o + i) for the factors, and the kept share of the residual.

    As the paper counts; whole rows are stored, so a real matrix may differ by part of a row.
    """
    return rank * (out + inner) + round(kept_fraction * out * inner)
