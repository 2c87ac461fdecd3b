"""Novices: the best constant, and the best map of a rank, in closed form; kept by the compact form."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.calibration.tokens import LayerBatch
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.compress.novices import fit_affine, fit_constant
from mcsmoe.export.forms import dense
from mcsmoe.transform.novices import fit_novices, fit_ranks
from mcsmoe.types import Novices
from tests.tiny_models import DECODERS


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_constant_is_the_mean_over_all_blocks() -> None:
    outputs_TD = draw(50, 4)
    assert torch.allclose(fit_constant(outputs_TD.split([20, 30]), 4), outputs_TD.mean(dim=0))
    assert torch.equal(fit_constant([], 4), torch.zeros(4, dtype=torch.float64))


def test_affine_of_full_rank_is_weighted_ridge_regression() -> None:
    x, y, w = draw(80, 4), draw(80, 4, seed=1), draw(80, seed=2).square()
    constant_D, u_DR, v_RD = fit_affine([(x[:30], y[:30], w[:30]), (x[30:], y[30:], w[30:])], 4, 4, ridge=1e-2)
    weighted = w / w.sum()
    centred_x, centred_y = x - weighted @ x, y - weighted @ y
    gram = centred_x.T @ (centred_x * w[:, None])
    mu = 1e-2 * float(gram.diagonal().mean())
    rows = np.concatenate([(centred_x * w.sqrt()[:, None]).numpy(), np.sqrt(mu) * np.eye(4)])
    wanted = np.linalg.lstsq(
        rows, np.concatenate([(centred_y * w.sqrt()[:, None]).numpy(), np.zeros((4, 4))]), rcond=None
    )[0].T
    np.testing.assert_allclose((u_DR @ v_RD).numpy(), wanted, atol=1e-10)
    np.testing.assert_allclose(constant_D.numpy(), (weighted @ y).numpy() - wanted @ (weighted @ x).numpy(), atol=1e-10)


def test_affine_of_low_rank_beats_the_cut_of_the_full_map() -> None:
    x = draw(200, 5) * torch.tensor([5.0, 2.0, 1.0, 0.3, 0.1], dtype=torch.float64)
    y = x @ draw(5, 5, seed=3).T + 0.1 * draw(200, 5, seed=4)
    ones = torch.ones(200, dtype=torch.float64)

    def error(constant_D: Tensor, map_DD: Tensor) -> float:
        return float((y - constant_D - x @ map_DD.T).square().sum())

    full_D, full_u, full_v = fit_affine([(x, y, ones)], 5, 5, ridge=1e-9)
    map_DD = full_u @ full_v
    for rank in (1, 2, 3):
        constant_D, u_DR, v_RD = fit_affine([(x, y, ones)], rank, 5, ridge=1e-9)
        assert torch.linalg.matrix_rank(u_DR @ v_RD) == rank
        left, size, right = torch.linalg.svd(map_DD)
        cut = left[:, :rank] * size[:rank] @ right[:rank]
        assert error(constant_D, u_DR @ v_RD) <= error(y.mean(dim=0) - cut @ x.mean(dim=0), cut) * (1 + 1e-9)
    assert error(full_D, map_DD) < error(*(fit_affine([(x, y, ones)], 2, 5)[0], u_DR @ v_RD)) * 1.01


def test_an_expert_without_tokens_has_a_novice_of_zero() -> None:
    constant_D, u_DR, v_RD = fit_affine([(draw(0, 4), draw(0, 4), draw(0))], 2, 4)
    assert not constant_D.any()
    assert not (u_DR @ v_RD).any()
    with pytest.raises(ValueError, match="the rank of a novice is 5; give 1 to 4"):
        fit_affine([], 5, 4)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_model_with_novices_is_saved_and_loaded_as_it_runs(family: str, rank: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DECODERS[family]().eval()
    adapter = adapter_for(model)
    layer = adapter.layers(model)[0]
    weights = adapter.read_experts(model, layer)
    experts, width = weights.num_experts, weights.d_model
    kept_K = torch.arange(0, experts, 2)
    table_E = torch.empty(experts, dtype=torch.int64)
    table_E[kept_K] = torch.arange(len(kept_K))
    dropped = torch.tensor([expert for expert in range(experts) if expert % 2])
    table_E[dropped] = torch.arange(len(kept_K), experts)
    count = len(dropped)
    factors = (torch.randn(count, width, rank), torch.randn(count, rank, width)) if rank else (None, None)
    novices = Novices(torch.randn(count, width), *factors)
    ids = torch.randint(2, 90, (2, 9))
    # By hand: the layer's output less what dropped experts gave, plus what novices give.
    given = {}

    def see(_module: object, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        given["args"], given["out"] = inputs, result

    hook = model.get_submodule(layer).experts.register_forward_hook(see)
    model(input_ids=ids)
    hook.remove()
    hidden_TD, index_TK, weights_TK = given["args"]
    adapter.write_novices(model, layer, weights.select(kept_K), table_E, novices)
    wanted_TD = torch.zeros_like(given["out"])
    whole = model.get_submodule(layer).experts
    for token in range(len(hidden_TD)):
        for expert, gate in zip(index_TK[token].tolist(), weights_TK[token], strict=True):
            slot = int(table_E[expert])
            if slot >= len(kept_K):
                answer_D = novices.output(slot - len(kept_K), hidden_TD[token : token + 1])[0]
            else:
                answer_D = whole._expert(slot, hidden_TD[token : token + 1])[0]  # type: ignore
            wanted_TD[token] += gate * answer_D
    assert torch.allclose(whole(*given["args"]), wanted_TD, atol=1e-5)
    logits = model(input_ids=ids).logits
    mcsmoe.save(model, tmp_path / "noviced")
    again = mcsmoe.load(tmp_path / "noviced")
    assert torch.equal(again(input_ids=ids).logits, logits)
    held = adapter.read_novices(again, layer)
    assert held is not None
    assert torch.equal(held.constant_ND, novices.constant_ND)
    source = Streamed(tmp_path / "noviced")
    with source.runnable() as streamed:
        assert torch.allclose(streamed(input_ids=ids).logits, logits, atol=1e-6)
    with pytest.raises(ValueError, match="has novices, which the base architecture has no place for"):
        dense(source, tmp_path / "dense")


def test_a_regression_cut_to_several_ranks_is_each_of_them() -> None:
    torch.manual_seed(0)
    model = tiny_models.model("qwen3_moe")
    adapter = adapter_for(model)
    layer = adapter.layers(model)[0]
    weights, activation = adapter.read_experts(model, layer), adapter.activation(model, layer)
    draw = torch.Generator().manual_seed(1)
    inputs_TD = torch.randn(200, 16, generator=draw)
    index_TK = torch.rand(200, 6, generator=draw).argsort(dim=1)[:, :3]
    batch = LayerBatch(inputs_TD, index_TK, torch.rand(200, 3, generator=draw), inputs_TD, False)
    tokens = SimpleNamespace(batches=lambda: iter([batch]))
    together = fit_ranks(weights, activation, tokens, [0, 2, 7])
    for rank, novices in together.items():
        alone = fit_novices(weights, activation, tokens, rank)
        for expert in range(6):
            wanted = alone.output(expert, inputs_TD)
            torch.testing.assert_close(novices.output(expert, inputs_TD), wanted, rtol=1e-4, atol=1e-5)
