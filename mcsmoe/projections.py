"""The matrices of a layer's experts, stacked over groups: dense, low-rank plus a residual, or that residual packed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mcsmoe.types import LowRankFactors


def parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter that holds ``tensor``; numbers that are counted get no gradient."""
    # Contiguous, so that a product has the same last bits before saving and after loading.
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=tensor.is_floating_point())


class DenseProjection(nn.Module):
    """y = x W_g^T + b_g with the G matrices stacked: ``weight_Goi`` [G, o, i], ``bias_Go`` [G, o] or None."""

    def __init__(self, weight_Goi: Tensor, bias_Go: Tensor | None = None) -> None:
        super().__init__()
        self.weight_Goi = parameter(weight_Goi)
        self.bias_Go = None if bias_Go is None else parameter(bias_Go)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, o, i)."""
        groups, out, inner = self.weight_Goi.shape
        return groups, out, inner

    def forward(self, group: int, inputs_Ti: Tensor) -> Tensor:
        bias_o = None if self.bias_Go is None else self.bias_Go[group]
        return functional.linear(inputs_Ti, self.weight_Goi[group], bias_o)

    def dense(self) -> Tensor:
        """[G, o, i]: the matrices this projection applies."""
        return self.weight_Goi.detach()


class LowRankProjection(nn.Module):
    """y = x (U_g V_g + S_g)^T + b_g (section 3.2 of the paper), all three parts trainable and S_g dense.

    Rows of ``residual_Goi`` may be set to zero while training; ``packed`` then drops them from memory.
    """

    def __init__(self, factors: LowRankFactors, bias_Go: Tensor | None = None) -> None:
        super().__init__()
        self.u_GoR = parameter(factors.u_GoR)
        self.v_GRi = parameter(factors.v_GRi)
        self.residual_Goi = parameter(factors.residual_Goi)
        self.bias_Go = None if bias_Go is None else parameter(bias_Go)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, o, i)."""
        groups, out, inner = self.residual_Goi.shape
        return groups, out, inner

    def forward(self, group: int, inputs_Ti: Tensor) -> Tensor:
        bias_o = None if self.bias_Go is None else self.bias_Go[group]
        outputs_To = functional.linear(inputs_Ti, self.residual_Goi[group], bias_o)
        return outputs_To + functional.linear(functional.linear(inputs_Ti, self.v_GRi[group]), self.u_GoR[group])

    @torch.no_grad()
    def dense(self) -> Tensor:
        """[G, o, i]: the matrices this projection applies."""
        return torch.baddbmm(self.residual_Goi, self.u_GoR, self.v_GRi)

    @torch.no_grad()
    def packed(self) -> PackedProjection:
        """The same function with only the live (not all-zero) rows of the residual."""
        live_Go = (self.residual_Goi != 0).any(dim=2)
        row_index_N = live_Go.nonzero()[:, 1].to(torch.int32)
        made = PackedProjection(
            self.u_GoR.clone(),
            self.v_GRi.clone(),
            self.residual_Goi[live_Go],
            row_index_N,
            live_Go.sum(dim=1).tolist(),
            None if self.bias_Go is None else self.bias_Go.clone(),
        )
        return made.requires_grad_(self.u_GoR.requires_grad)


class PackedProjection(nn.Module):
    """y = x (U_g V_g + S_g)^T + b_g where S_g is stored as its live rows only, as many as each group has.

    ``residual_rows_Ni`` stacks the rows of all groups (N in total), ``row_index_N`` says which output each row feeds,
    ``kept_rows[g]`` how many belong to group g.
    """

    row_index_N: Tensor

    def __init__(
        self,
        u_GoR: Tensor,
        v_GRi: Tensor,
        residual_rows_Ni: Tensor,
        row_index_N: Tensor,
        kept_rows: Sequence[int],
        bias_Go: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.u_GoR = parameter(u_GoR)
        self.v_GRi = parameter(v_GRi)
        self.residual_rows_Ni = parameter(residual_rows_Ni)
        self.register_buffer("row_index_N", row_index_N)
        self.bias_Go = None if bias_Go is None else parameter(bias_Go)
        self.kept_rows = list(kept_rows)
        self._spans = list(pairwise(accumulate(self.kept_rows, initial=0)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, o, i)."""
        groups, out, _ = self.u_GoR.shape
        return groups, out, self.v_GRi.shape[2]

    def forward(self, group: int, inputs_Ti: Tensor) -> Tensor:
        # Output features come first in memory, so that a live row is added as one contiguous run over the tokens; the
        # next projection takes the transposed view back without a copy.
        inputs_iT = inputs_Ti.t()
        outputs_oT = self.u_GoR[group] @ (self.v_GRi[group] @ inputs_iT)
        start, end = self._spans[group]
        if end > start:
            rows_NT = self.residual_rows_Ni[start:end] @ inputs_iT
            outputs_oT = outputs_oT.index_add_(0, self.row_index_N[start:end], rows_NT)
        if self.bias_Go is not None:
            outputs_oT = outputs_oT + self.bias_Go[group, :, None]
        return outputs_oT.t()

    @torch.no_grad()
    def dense(self) -> Tensor:
        """[G, o, i]: the matrices this projection applies."""
        groups_N = torch.repeat_interleave(torch.arange(len(self.kept_rows)), torch.tensor(self.kept_rows))
        dense_Goi = torch.bmm(self.u_GoR, self.v_GRi)
        place = (groups_N.to(dense_Goi.device), self.row_index_N.long())
        return dense_Goi.index_put(place, self.residual_rows_Ni, accumulate=True)


Projection = DenseProjection | LowRankProjection | PackedProjection
