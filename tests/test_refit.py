"""The refit against numpy's least squares, and what it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mcsmoe.calibration.tokens import LayerBatch
from mcsmoe.refit.ridge import RIDGES, Block, RefitBatch, _spread, refit

D, P, B, T = 6, 5, 4, 300


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[list[Block], list[RefitBatch], Tensor, Tensor]:
    """Blocks with random features, two batches of tokens that choose two blocks each, and what they are made of."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    maps = [draw(P, D) for _ in range(B)]
    blocks = [Block(lambda x_ND, m=m: torch.tanh(x_ND @ m.T), draw(D, P)) for m in maps]  # type: ignore
    inputs_TD, target_TD = draw(T, D), draw(T, D)
    block_TK = torch.rand(T, B, generator=generator).argsort(dim=1)[:, :2]
    gate_TK = torch.rand(T, 2, generator=generator, dtype=torch.float64).to(dtype)
    batches = [
        RefitBatch.of(inputs_TD[part], target_TD[part], block_TK[part], gate_TK[part], B)
        for part in (slice(0, 170), slice(170, T))
    ]
    return blocks, batches, block_TK, gate_TK


def design(blocks: list[Block], batches: list[RefitBatch]) -> tuple[np.ndarray, np.ndarray]:
    """[T, B x P] gated features, and [T, D] targets."""
    rows, targets = [], []
    for batch in batches:
        row = torch.zeros(len(batch.inputs_TD), B * P, dtype=torch.float64)
        for index, block in enumerate(blocks):
            token_N, gate_N = batch.of_block(index)
            features_NP = block.features(batch.inputs_TD[token_N]).double()
            row[token_N, index * P : (index + 1) * P] = features_NP * gate_N[:, None].double()
        rows.append(row)
        targets.append(batch.target_TD.double())
    return torch.cat(rows).numpy(), torch.cat(targets).numpy()


def by_lstsq(blocks: list[Block], batches: list[RefitBatch], ridge: float) -> list[np.ndarray]:
    """The joint ridge solution: rows sqrt(mu) are added to the design, with the projections there were as their targets."""
    matrix, target = design(blocks, batches)
    start = np.concatenate([block.weight_DP.double().numpy().T for block in blocks])
    mu = np.concatenate(
        [np.full(P, ridge * (matrix[:, i * P : (i + 1) * P] ** 2).sum(axis=0).mean()) for i in range(len(blocks))]
    )
    whole = np.concatenate([matrix, np.diag(np.sqrt(mu))])
    wanted = np.concatenate([target, np.sqrt(mu)[:, None] * start])
    solved = np.linalg.lstsq(whole, wanted, rcond=None)[0]
    return [solved[i * P : (i + 1) * P].T for i in range(len(blocks))]


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_many_sweeps_reach_the_joint_least_squares(ridge: float) -> None:
    blocks, batches, *_ = case()
    found = refit(blocks, batches, ridges=(ridge,), sweeps=200)
    for weight_DP, wanted in zip(found.weights, by_lstsq(blocks, batches, ridge), strict=True):
        np.testing.assert_allclose(weight_DP.numpy(), wanted, rtol=1e-8, atol=1e-9)


def test_one_block_is_solved_in_one_sweep() -> None:
    blocks, batches, *_ = case()
    alone = [
        RefitBatch.of(
            batch.inputs_TD,
            batch.target_TD,
            torch.zeros(len(batch.inputs_TD), 1).long(),
            torch.full((len(batch.inputs_TD), 1), 0.7, dtype=torch.float64),
            1,
        )
        for batch in batches
    ]
    found = refit(blocks[:1], alone, ridges=(0.05,), sweeps=1)
    inputs = torch.cat([batch.inputs_TD for batch in batches])
    matrix = (0.7 * blocks[0].features(inputs)).numpy()
    mu = 0.05 * (matrix**2).sum(axis=0).mean()
    start = blocks[0].weight_DP.numpy()
    target = torch.cat([batch.target_TD for batch in batches]).numpy()
    whole = np.concatenate([matrix, np.sqrt(mu) * np.eye(P)])
    wanted = np.linalg.lstsq(whole, np.concatenate([target, np.sqrt(mu) * start.T]), rcond=None)[0].T
    np.testing.assert_allclose(found.weights[0].numpy(), wanted, rtol=1e-9)


def error_of(blocks: list[Block], batches: list[RefitBatch], weights: list[Tensor]) -> float:
    matrix, target = design(blocks, batches)
    stacked = np.concatenate([weight_DP.double().numpy().T for weight_DP in weights])
    return float(((target - matrix @ stacked) ** 2).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_error_never_rises(seed: int, dtype: torch.dtype) -> None:
    blocks, batches, *_ = case(seed, dtype)
    held = case(seed + 100, dtype)[1]
    start = [block.weight_DP for block in blocks]
    for given in ({"ridges": (0.1,)}, {"held": held}, {"held": held, "ridges": (1e-6, 10.0)}):
        errors = [refit(blocks, batches, **given, sweeps=sweeps) for sweeps in (1, 2, 3)]  # type: ignore
        assert errors[0].before == pytest.approx(error_of(blocks, batches, start), rel=1e-5)
        for found in errors:
            assert found.after <= found.before
            assert error_of(blocks, batches, found.weights) == pytest.approx(found.after, rel=1e-4)
            if "held" in given:
                assert error_of(blocks, held, start) == pytest.approx(found.held_before, rel=1e-5)
                assert error_of(blocks, held, found.weights) == pytest.approx(found.held_after, rel=1e-4)
        assert all(weight_DP.dtype == dtype for weight_DP in errors[0].weights)


def noisy(tokens: int, seed: int) -> tuple[list[Block], RefitBatch]:
    """One block that all tokens choose; targets are those of other projections, with noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs_TP = torch.randn(tokens, 20, generator=generator, dtype=torch.float64)
    start_DP = torch.zeros(D, 20, dtype=torch.float64)
    truth_DP = torch.randn(D, 20, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    target_TD = inputs_TP @ truth_DP.T + 4 * torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    block_T1 = torch.zeros(tokens, 1, dtype=torch.int64)
    ones_T1 = torch.ones(tokens, 1, dtype=torch.float64)
    return [Block(lambda x_NP: x_NP, start_DP)], RefitBatch.of(inputs_TP, target_TD, block_T1, ones_T1, 1)


@pytest.mark.parametrize("tokens", [25, 100, 3000])
@pytest.mark.parametrize("seed", range(4))
def test_held_out_tokens_choose_the_ridge(tokens: int, seed: int) -> None:
    """One block is solved for exactly in every sweep, so trying all candidates one by one is the truth."""
    candidates = (1.0, 0.1, 1e-4)
    blocks, fitted = noisy(tokens, seed)
    held = [noisy(500, seed + 50)[1]]
    alone = {ridge: refit(blocks, [fitted], held, (ridge,)) for ridge in candidates}
    found = refit(blocks, [fitted], held, candidates)
    best = min(candidates, key=lambda ridge: alone[ridge].held_after)
    assert found.ridge == best
    assert found.held_after == pytest.approx(alone[best].held_after)
    assert torch.allclose(found.weights[0], alone[best].weights[0])
    assert found.ridge >= 0.1 or tokens > 25


def test_without_held_out_tokens_the_strongest_ridge_is_taken() -> None:
    blocks, batches, *_ = case()
    found = refit(blocks, batches)
    assert found.ridge == max(RIDGES)
    assert found.helps


def test_held_out_tokens_say_whether_it_helps() -> None:
    blocks, fitted = noisy(22, 1)
    none_DP = blocks[0].weight_DP
    held = RefitBatch.of(
        fitted.inputs_TD, fitted.inputs_TD @ none_DP.T, fitted.token_N[:, None] * 0, fitted.gate_N[:, None], 1
    )
    assert not refit(blocks, [fitted], [held]).helps
    assert refit(blocks, [fitted]).helps


def test_where_nothing_can_be_won_everything_stays() -> None:
    blocks, batches, *_ = case(2)
    matrix, _ = design(blocks, batches)
    start = np.concatenate([block.weight_DP.numpy().T for block in blocks])
    given = torch.from_numpy(matrix @ start)
    exact, place = [], 0
    for batch in batches:
        target = given[place : place + len(batch.inputs_TD)]
        place += len(batch.inputs_TD)
        exact.append(RefitBatch(batch.inputs_TD, target, batch.token_N, batch.gate_N, batch.count_B))
    found = refit(blocks, exact)
    assert found.after <= found.before < 1e-20
    for weight_DP, block in zip(found.weights, blocks, strict=True):
        assert torch.allclose(weight_DP, block.weight_DP, atol=1e-9)


def test_batches_are_one_stream() -> None:
    blocks, batches, block_TK, gate_TK = case()
    whole = RefitBatch.of(
        torch.cat([b.inputs_TD for b in batches]), torch.cat([b.target_TD for b in batches]), block_TK, gate_TK, B
    )
    one, two = refit(blocks, batches), refit(blocks, [whole])
    for first, second in zip(one.weights, two.weights, strict=True):
        assert torch.allclose(first, second, atol=1e-10)


def test_a_block_chosen_twice_has_the_sum_of_its_gates() -> None:
    inputs_TD = torch.randn(3, D)
    made = RefitBatch.of(inputs_TD, inputs_TD, torch.tensor([[1, 1], [0, 1], [-1, 0]]), torch.ones(3, 2) * 0.5, 2)
    assert made.count_B.tolist() == [2, 2]
    assert [part.tolist() for part in made.of_block(1)] == [[0, 1], [1.0, 0.5]]
    assert [part.tolist() for part in made.of_block(0)] == [[1, 2], [0.5, 0.5]]


def test_a_block_without_tokens_keeps_its_projection() -> None:
    blocks, batches, block_TK, gate_TK = case()
    emptied = [
        RefitBatch.of(batch.inputs_TD, batch.target_TD, torch.where(part_TK == 3, -1, part_TK), gates, B)
        for batch, part_TK, gates in zip(batches, block_TK.split([170, 130]), gate_TK.split([170, 130]), strict=True)
    ]
    found = refit(blocks, emptied)
    assert torch.equal(found.weights[3], blocks[3].weight_DP)
    assert not torch.equal(found.weights[0], blocks[0].weight_DP)


def test_a_fixed_part_is_left_out_of_what_is_solved() -> None:
    blocks, batches, *_ = case()
    shifted = [Block(b.features, b.weight_DP, lambda x_ND: torch.ones_like(x_ND)) for b in blocks]
    gates = [torch.zeros(len(b.inputs_TD), dtype=torch.float64) for b in batches]
    moved = []
    for batch, gate_T in zip(batches, gates, strict=True):
        gate_T.index_add_(0, batch.token_N, batch.gate_N)
        moved.append(
            RefitBatch(batch.inputs_TD, batch.target_TD + gate_T[:, None], batch.token_N, batch.gate_N, batch.count_B)
        )
    one, two = refit(blocks, batches), refit(shifted, moved)
    assert two.before == pytest.approx(one.before)
    for first, second in zip(one.weights, two.weights, strict=True):
        assert torch.allclose(first, second, atol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    blocks, batches, *_ = case()
    with pytest.raises(ValueError, match="layer 'x': the ridge is 0"):
        refit(blocks, batches, ridges=(0.1, 0.0), layer="x")
    with pytest.raises(ValueError, match="0 sweeps; give at least 1"):
        refit(blocks, batches, sweeps=0)
    batches[0].target_TD[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'x': outputs on the calibration tokens are not finite"):
        refit(blocks, batches, layer="x")


@pytest.mark.parametrize("room", [0, 2**29])
def test_each_token_is_looked_at_once_a_sweep_and_kept_where_there_is_room(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcsmoe.refit.ridge._CACHE_BYTES", room)
    blocks, batches, *_ = case()
    held = case(7)[1]
    seen = [0]

    def counted(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def count(inputs_ND: Tensor) -> Tensor:
            seen[0] += len(inputs_ND)
            return features(inputs_ND)

        return count

    watched = [Block(counted(block.features), block.weight_DP) for block in blocks]
    found = refit(watched, batches, held, sweeps=3)
    choices = sum(int(batch.count_B.sum()) for batch in (*batches, *held))
    assert seen[0] == choices * (1 if room else 4)
    plain = refit(blocks, batches, held, sweeps=3)
    assert all(torch.equal(one, two) for one, two in zip(found.weights, plain.weights, strict=True))


def test_what_experts_read_is_scaled_where_their_family_scales_it() -> None:
    inputs_TD, index_TK = torch.randn(5, 3), torch.tensor([[0], [1], [0], [1], [1]])
    scale_TK = torch.tensor([[0.5], [2.0], [1.0], [3.0], [0.25]])
    batch = LayerBatch(inputs_TD, index_TK, torch.ones(5, 1), torch.zeros(5, 3), False, scale_TK)
    assert torch.equal(batch.read("a layer"), inputs_TD * scale_TK)
    assert torch.equal(batch.read_by(1), (inputs_TD * scale_TK)[[1, 3, 4]])
    assert torch.equal(replace(batch, scale_TK=None).read("a layer"), inputs_TD)
    two = replace(batch, index_TK=index_TK.repeat(1, 2), scale_TK=scale_TK.repeat(1, 2))
    with pytest.raises(ValueError, match="'a layer': the 2 experts of a token read it scaled"):
        two.read("a layer")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40, 257])
def test_few_blocks_choose_the_ridge_however_many_there_are(count: int) -> None:
    indices = [3 * number for number in range(count)]
    found = sorted(_spread(indices))
    assert set(found) <= set(indices)
    assert min(count, 9) <= len(found) <= 16
    assert not found or found[0] == indices[0]
    gaps = {later - earlier for earlier, later in pairwise(found)}
    assert len(gaps) <= 1
