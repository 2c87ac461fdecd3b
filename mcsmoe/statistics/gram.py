"""Gram matrices in float64."""

from __future__ import annotations

from functools import cache

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


@cache
def _blas() -> ThreadpoolController:
    """The thread pools of the libraries that numpy multiplies with; finding them takes longer than a product."""
    return ThreadpoolController().select(user_api="blas")


def column_gram(rows_TC: Tensor) -> Tensor:
    """Float64 [C, C]: inner products of the columns, exactly symmetric."""
    wide_TC = rows_TC.detach().double()
    if wide_TC.device.type == "cpu":
        # numpy sees that both factors are the same and computes one triangle: three times as fast here as torch. Its
        # threads spin for a while when they are done, which holds up torch's own on the same cores, so it gets one.
        matrix = wide_TC.numpy()
        with _blas().limit(limits=1):
            return torch.from_numpy(matrix.T @ matrix)
    return wide_TC.T @ wide_TC
