"""Novices: what answers for a dropped expert at the cost of a vector or of two thin matrices (after arXiv 2507.00390).

A constant novice gives the mean output of the expert over its tokens; an affine one also follows the input,
``c + U V x`` with U V of rank r: the ridge regression of the outputs on the inputs, cut to the rank by the singular value
decomposition of what it fits. In place of an expert they leave its remainder f - novice, whose Gram matrix says what
dropping a set of experts costs then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

RIDGE = 0.1
"""Of the affine regression, over the mean diagonal of the covariance of the inputs."""


@torch.no_grad()
def fit_constant(outputs: Iterable[Tensor], width: int) -> Tensor:
    """float64 [D]: mean of outputs that come as blocks [T, D]; zero without any."""
    total_D, count = torch.zeros(width, dtype=torch.float64), 0
    for output_TD in outputs:
        total_D = total_D.to(output_TD.device) + output_TD.double().sum(dim=0)
        count += len(output_TD)
    return total_D / max(1, count)


@torch.no_grad()
def weighted_mean(blocks: Iterable[tuple[Tensor, Tensor]], width: int) -> Tensor:
    """float64 [D]: mean of rows that come as blocks [T, D] with their weights [T]; zero without any."""
    total_D, weight = torch.zeros(width, dtype=torch.float64), 0.0
    for rows_TD, weight_T in blocks:
        total_D = total_D.to(rows_TD.device) + weight_T.double() @ rows_TD.double()
        weight += float(weight_T.double().sum())
    return total_D / weight if weight > 0 else total_D


@torch.no_grad()
def fit_affine(
    pairs: Sequence[tuple[Tensor, Tensor, Tensor]], rank: int, width: int, ridge: float = RIDGE
) -> tuple[Tensor, Tensor, Tensor]:
    """Constant [D], u [D, R] and v [R, D], float64, of one expert.

    Args:
        pairs: blocks of inputs [T, D], outputs [T, D] and weights [T] (squared gates: what the layer's error counts).
        rank: R; where fewer directions are left, the rest of the factors is zero.
        width: D.
        ridge: over the mean diagonal of the weighted covariance.
    """
    if rank < 1 or rank > width:
        raise ValueError(f"the rank of a novice is {rank}; give 1 to {width}")
    first = pairs[0][0] if pairs else torch.zeros(0, width)
    weight, mean_x, mean_y = 0.0, first.new_zeros(width).double(), first.new_zeros(width).double()
    for input_TD, output_TD, weight_T in pairs:
        wide_T = weight_T.double()
        weight += float(wide_T.sum())
        mean_x += wide_T @ input_TD.double()
        mean_y += wide_T @ output_TD.double()
    u_DR, v_RD = mean_x.new_zeros(width, rank), mean_x.new_zeros(rank, width)
    if not weight > 0:
        return mean_y, u_DR, v_RD
    mean_x, mean_y = mean_x / weight, mean_y / weight
    xx_DD, yx_DD = mean_x.new_zeros(width, width), mean_x.new_zeros(width, width)
    for input_TD, output_TD, weight_T in pairs:
        x_TD, y_TD = input_TD.double() - mean_x, output_TD.double() - mean_y
        weighted_TD = x_TD * weight_T.double()[:, None]
        xx_DD += x_TD.T @ weighted_TD
        yx_DD += y_TD.T @ weighted_TD
    mu = ridge * float(xx_DD.diagonal().mean())
    if mu > 0:
        # With the ridge as further tokens, the regression cut to a rank is that of the fitted outputs: the leading
        # directions of A C^(1/2), C the covariance with the ridge (reduced-rank regression).
        factor_DD = torch.linalg.cholesky(xx_DD + mu * torch.eye(width, dtype=xx_DD.dtype, device=xx_DD.device))
        fitted_DD = torch.linalg.solve_triangular(factor_DD, yx_DD.T, upper=False).T
        left_DD, size_D, right_DD = torch.linalg.svd(fitted_DD, full_matrices=False)
        root_R = size_D[:rank].sqrt()
        u_DR = left_DD[:, :rank] * root_R
        v_RD = torch.linalg.solve_triangular(factor_DD.T, (right_DD[:rank] * root_R[:, None]).T, upper=True).T
    return mean_y - u_DR @ (v_RD @ mean_x), u_DR, v_RD
