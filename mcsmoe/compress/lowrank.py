"""W = U V + S: truncated singular value decomposition of all experts of a layer at once (section 3.2 of MC-SMoE).

A full decomposition per matrix computes all min(o, i) singular vectors to keep R of them. Here the wanted subspace is
read from the Gram matrix of the smaller side, which costs one product and one small symmetric eigenproblem, and is
then refined on W itself: the Gram matrix squares the condition, and small singular values would drown in rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.types import LowRankFactors

_EXACT_BELOW = 96  # smaller side up to which the full decomposition is cheap enough
_EXTRA = 8  # directions carried beyond the rank, so that the refinement may choose between near-ties


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
    bad_G = ~torch.isfinite(tensor).flatten(1).all(dim=1)
    if bad_G.any():
        raise ValueError(f"{name}: entries of group {int(bad_G.nonzero()[0])} are not finite; its training diverged")


def _working(matrix: Tensor) -> Tensor:
    return matrix.detach().to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)


def _top_right(matrix_Goi: Tensor, size: int) -> Tensor:
    """[G, i, size]: an orthonormal basis close to the ``size`` leading right singular vectors of each matrix."""
    _, out, inner = matrix_Goi.shape
    if out < inner:
        basis_Gob = torch.linalg.eigh(matrix_Goi @ matrix_Goi.mT).eigenvectors[:, :, -size:]
    else:
        right_Gib = torch.linalg.eigh(matrix_Goi.mT @ matrix_Goi).eigenvectors[:, :, -size:]
        basis_Gob = torch.linalg.qr(matrix_Goi @ right_Gib).Q
    return torch.linalg.qr(matrix_Goi.mT @ basis_Gob).Q


def leading_singular(matrix_Goi: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` leading singular triplets of each matrix: u [G, o, R], s [G, R] descending, v [G, R, i].

    The reconstruction error ||W - u s v|| is that of the exact truncated decomposition to a relative 1e-4 (measured:
    below 1e-6 in float32).
    """
    if min(matrix_Goi.shape[1:]) <= _EXACT_BELOW:
        u_Gom, s_Gm, v_Gmi = torch.linalg.svd(matrix_Goi, full_matrices=False)
        return u_Gom[:, :, :rank], s_Gm[:, :rank], v_Gmi[:, :rank]
    right_Gib = _top_right(matrix_Goi, min(rank + _EXTRA, *matrix_Goi.shape[1:]))
    left_Gob, triangle_Gbb = torch.linalg.qr(matrix_Goi @ right_Gib)
    inner_u, s_Gb, inner_v = torch.linalg.svd(triangle_Gbb)
    return left_Gob @ inner_u[:, :, :rank], s_Gb[:, :rank], inner_v[:, :rank] @ right_Gib.mT


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
    basis_GoR = leading_singular(weights_Goi @ root_Gii, rank)[0]
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
