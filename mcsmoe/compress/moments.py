"""Second moments of what the matrices of a layer receive, from as few tokens as there are.

The mean of x x' over n tokens is unbiased, and useless where n is near the width: a decomposition trusts directions that
were met by chance. It is therefore mixed with a target, with the share that makes the expected squared error least (Ledoit
and Wolf, Journal of Multivariate Analysis 88, 2004): for what an expert reads, what all experts receive together, itself
mixed with a multiple of the identity; for its hidden activations, whose neurons are its own, that multiple alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def shrunken(
    samples: Sequence[Tensor],
    exact_Gii: Tensor | None = None,
    tokens_G: Tensor | None = None,
    alike: bool = True,
) -> Tensor:
    """Float64 [G, i, i]: the second moment of each group's inputs, shrunken towards that of all.

    Args:
        samples: by group, inputs [N_g, i].
        alike: whether dimension n of one group's inputs is dimension n of another's, as it is for what a layer reads, and
            not for hidden neurons: these are shrunken towards a multiple of the identity alone.
        exact_Gii: sums of x x' over all tokens of each group, where they are known; the samples then only say how much
            such a sum varies.
        tokens_G: how many tokens those are.
    """
    counts_G = torch.tensor([len(inputs_Ni) for inputs_Ni in samples], dtype=torch.float64)
    given_G = counts_G if tokens_G is None else tokens_G.double().cpu()
    width = samples[0].shape[1]
    device = samples[0].device
    moments, fourths = [], []
    for inputs_Ni in samples:
        wide_Ni = inputs_Ni.double()
        moments.append(wide_Ni.T @ wide_Ni / max(1, len(inputs_Ni)))
        fourths.append(float(wide_Ni.square().sum(dim=1).square().mean()) if len(inputs_Ni) else 0.0)
    moment_Gii = torch.stack(moments)
    if exact_Gii is not None:
        moment_Gii = exact_Gii.to(moment_Gii) / given_G.clamp(min=1).to(device)[:, None, None]
    share_G = (given_G / given_G.sum().clamp(min=1)).to(device)
    pooled_ii = (share_G[:, None, None] * moment_Gii).sum(dim=0)
    fourth = float(share_G.cpu() @ torch.tensor(fourths, dtype=torch.float64))
    identity_ii = torch.eye(width, dtype=torch.float64, device=device) * pooled_ii.diagonal().mean()
    pooled_ii = _mixed(pooled_ii, identity_ii, fourth, float(given_G.sum()))

    def target(moment_ii: Tensor) -> Tensor:
        return pooled_ii if alike else torch.eye(width).to(moment_ii) * moment_ii.diagonal().mean()

    return torch.stack(
        [
            _mixed(moment_ii, target(moment_ii), fourth, tokens) if tokens else target(pooled_ii)
            for moment_ii, fourth, tokens in zip(moment_Gii, fourths, given_G.tolist(), strict=True)
        ]
    )


def _mixed(moment_ii: Tensor, target_ii: Tensor, fourth: float, tokens: float) -> Tensor:
    """The moment with the share of the target that a moment of so many tokens is expected to be the better for."""
    apart = float((moment_ii - target_ii).square().sum())
    # Of the mean of x x' over the tokens: (mean |x|^4 - |S|^2) / n.
    variance = max(0.0, fourth - float(moment_ii.square().sum())) / max(1.0, tokens)
    share = min(1.0, variance / apart) if apart > 0 else 1.0
    return (1 - share) * moment_ii + share * target_ii
