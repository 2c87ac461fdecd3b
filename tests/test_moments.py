"""Second moments from few tokens: nearer to the truth than the plain mean, and the plain mean where tokens are many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcsmoe.compress.moments import shrunken


def truth(seed: int, width: int = 24) -> Tensor:
    root_ii = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root_ii @ torch.diag(torch.logspace(0, -2, width, dtype=torch.float64)) @ root_ii.T / width


def samples(moment_ii: Tensor, tokens: int, seed: int) -> Tensor:
    noise = torch.randn(tokens, len(moment_ii), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise @ torch.linalg.cholesky(moment_ii).T


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("tokens", [8, 64])
def test_few_tokens_come_nearer_to_the_truth(tokens: int, alike: bool) -> None:
    same = truth(0)
    wanted = [same + 0.1 * truth(seed) for seed in range(1, 7)] if alike else [truth(seed) for seed in range(1, 7)]
    given = [samples(moment_ii, tokens, seed) for seed, moment_ii in enumerate(wanted)]
    found = shrunken(given, alike=alike)
    plain = torch.stack([one.T @ one / tokens for one in given])
    errors = [(made - torch.stack(wanted)).square().sum() for made in (found, plain)]
    assert errors[0] < (0.8 if tokens == 8 else 1.0) * errors[1]
    assert bool((torch.linalg.eigvalsh(found) > 0).all())


@pytest.mark.parametrize("alike", [True, False])
def test_many_tokens_speak_for_themselves(alike: bool) -> None:
    given = [samples(truth(seed), 60_000, seed) for seed in range(3)]
    plain = torch.stack([one.T @ one / len(one) for one in given])
    assert torch.allclose(shrunken(given, alike=alike), plain, atol=3e-3 * float(plain.abs().max()))


def test_sums_over_all_tokens_replace_the_samples() -> None:
    whole = [samples(truth(seed), 20_000, seed) for seed in range(3)]
    exact = torch.stack([one.T @ one for one in whole])
    found = shrunken([one[:50] for one in whole], exact, torch.full((3,), 20_000))
    assert torch.allclose(found, exact / 20_000, atol=1e-2 * float(exact.abs().max()) / 20_000)


def test_a_group_without_tokens_has_what_the_others_have() -> None:
    given = [samples(truth(0), 500, 0), samples(truth(0), 0, 1)]
    found = shrunken(given)
    assert torch.allclose(found[1], found[0], atol=0.2 * float(found[0].abs().max()))
    own = shrunken(given, alike=False)[1]
    assert torch.allclose(own, torch.eye(24, dtype=torch.float64) * own[0, 0])
