"""Routing statistics: brute force on random batches, the laws of a streaming pass, recorded numbers, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.reservoir import keys
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import RoutedBatch

EXPERTS, WIDTH, CHOICES = 5, 6, 2
LAYER = "layer.0"


def routed(tokens: int, seed: int = 0, choices: int = CHOICES, dropped: float = 0.2, valid: float = 0.7) -> RoutedBatch:
    """A random batch in which some choices are over capacity, some tokens are padding, and expert 4 is never wanted."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, EXPERTS, generator=generator)
    masked_TE = logits_TE.clone()
    masked_TE[:, 4] = -torch.inf
    weights_TK, wanted_TK = masked_TE.softmax(dim=-1).topk(choices, dim=-1)
    chosen_TK = torch.where(torch.rand(tokens, choices, generator=generator) < dropped, -1, wanted_TK)
    valid_T = torch.rand(tokens, generator=generator) < valid
    return RoutedBatch(
        torch.randn(tokens, WIDTH, generator=generator), logits_TE, wanted_TK, chosen_TK, weights_TK, valid_T
    )


def rows(batch: RoutedBatch, index: Any) -> RoutedBatch:
    return RoutedBatch(**{name: tensor[index] for name, tensor in vars(batch).items() if tensor is not None})


def collected(*batches: RoutedBatch, **settings: Any) -> RoutingStatistics:
    made = RoutingStatistics(**settings)
    for batch in batches:
        made.update({LAYER: batch})
    return made


def assert_same(left: LayerStatistics, right: LayerStatistics, rtol: float = 1e-13) -> None:
    mine, other = left.tensors(), right.tensors()
    assert set(mine) == set(other)
    for name, tensor in mine.items():
        if tensor.dtype == torch.float64:
            torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=1e-13)
        else:
            assert torch.equal(tensor, other[name]), name


def brute_force(batch: RoutedBatch) -> dict[str, Tensor]:
    """Every statistic by one loop over tokens."""
    made = {
        "wanted_E": torch.zeros(EXPERTS, dtype=torch.int64),
        "computed_E": torch.zeros(EXPERTS, dtype=torch.int64),
        "dropped_E": torch.zeros(EXPERTS, dtype=torch.int64),
        "probability_sum_E": torch.zeros(EXPERTS, dtype=torch.float64),
        "gate_sum_E": torch.zeros(EXPERTS, dtype=torch.float64),
        "logits_gram_EE": torch.zeros(EXPERTS, EXPERTS, dtype=torch.float64),
        "input_sum_ED": torch.zeros(EXPERTS, WIDTH, dtype=torch.float64),
        "input_abs_sum_ED": torch.zeros(EXPERTS, WIDTH, dtype=torch.float64),
        "input_square_sum_ED": torch.zeros(EXPERTS, WIDTH, dtype=torch.float64),
        "token_square_sum_D": torch.zeros(WIDTH, dtype=torch.float64),
        "input_gram_EDD": torch.zeros(EXPERTS, WIDTH, WIDTH, dtype=torch.float64),
        "valid_tokens": torch.tensor(0),
    }
    for token in range(len(batch.valid_T)):
        if not batch.valid_T[token]:
            continue
        made["valid_tokens"] += 1
        x_D, logits_E = batch.inputs_TD[token].double(), batch.logits_TE[token].double()
        made["probability_sum_E"] += logits_E.softmax(dim=0)
        made["logits_gram_EE"] += torch.outer(logits_E, logits_E)
        made["token_square_sum_D"] += x_D * x_D
        for place in range(batch.wanted_TK.shape[1]):
            wanted, chosen = int(batch.wanted_TK[token, place]), int(batch.chosen_TK[token, place])
            made["wanted_E"][wanted] += 1
            if chosen < 0:
                made["dropped_E"][wanted] += 1
                continue
            made["computed_E"][chosen] += 1
            made["gate_sum_E"][chosen] += batch.weights_TK[token, place].double()
            made["input_sum_ED"][chosen] += x_D
            made["input_abs_sum_ED"][chosen] += x_D.abs()
            made["input_square_sum_ED"][chosen] += x_D * x_D
            made["input_gram_EDD"][chosen] += torch.outer(x_D, x_D)
    return made


@pytest.mark.parametrize(("choices", "tokens"), [(1, 90), (2, 90), (3, 500), (1, 1)])
def test_equals_one_loop_over_tokens(choices: int, tokens: int) -> None:
    batch = routed(tokens, choices=choices)
    found = collected(batch, whiten=True).layers[LAYER].tensors()
    for name, expected in brute_force(batch).items():
        # Squares and probabilities of a token are float32 numbers; their sums are not.
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
        if expected.dtype == torch.int64:
            assert torch.equal(found[name], expected), name


def test_sums_of_inputs_are_exact_to_float64() -> None:
    batch = routed(4000, choices=1)
    found, expected = collected(batch).layers[LAYER], brute_force(batch)
    for name in ("input_sum_ED", "input_abs_sum_ED", "logits_gram_EE"):
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing_whatever_it_holds() -> None:
    batch = routed(80)
    damaged = RoutedBatch(
        batch.inputs_TD.masked_fill(~batch.valid_T[:, None], torch.nan),
        batch.logits_TE.masked_fill(~batch.valid_T[:, None], torch.inf),
        *(batch.wanted_TK, batch.chosen_TK, batch.weights_TK, batch.valid_T),
    )
    settings = {"reservoir": 4, "whiten": True}
    expected = collected(rows(batch, batch.valid_T), **settings).layers[LAYER]
    assert_same(collected(damaged, **settings).layers[LAYER], expected, rtol=0)


def test_dropped_tokens_are_never_credited_to_expert_0() -> None:
    batch = routed(200, choices=1, dropped=0.0, valid=1.1)
    wants_2 = batch.wanted_TK[:, 0] == 2
    over = RoutedBatch(**{**vars(batch), "chosen_TK": torch.where(wants_2[:, None], -1, batch.wanted_TK)})
    full, found = collected(batch).layers[LAYER], collected(over).layers[LAYER]
    assert int(found.dropped_E[2]) == int(wants_2.sum()) == int(full.computed_E[2]) > 0
    assert int(found.computed_E[2]) == 0
    assert found.dropped_E.sum() == found.dropped_E[2]
    for expert in (0, 1, 3):
        assert torch.equal(found.computed_E[expert], full.computed_E[expert])
        assert torch.equal(found.input_sum_ED[expert], full.input_sum_ED[expert])
    torch.testing.assert_close(found.token_square_sum_D, full.token_square_sum_D)


@pytest.mark.parametrize("sizes", [[1] * 60, [7, 0, 13, 40], [59, 1], [60]])
def test_any_batches_give_the_statistics_of_the_whole(sizes: list[int]) -> None:
    batch, settings = routed(60), {"reservoir": 3, "whiten": True, "seed": 11}
    parts = [rows(batch, index) for index in torch.arange(60).split(sizes)]
    whole = collected(batch, **settings)
    assert_same(collected(*parts, **settings).layers[LAYER], whole.layers[LAYER])
    assert whole.position() == {LAYER: int(batch.valid_T.sum())}


def test_two_halves_equal_the_whole() -> None:
    batch, settings = routed(100), {"reservoir": 4, "whiten": True, "seed": 5}
    first = collected(rows(batch, slice(0, 37)), **settings)
    second = RoutingStatistics(**settings, start=first.position())
    second.update({LAYER: rows(batch, slice(37, None))})
    before = {name: tensor.clone() for name, tensor in first.tensors().items()}
    merged, whole = first.merge(second), collected(batch, **settings)
    assert_same(merged.layers[LAYER], whole.layers[LAYER])
    assert_same(second.merge(first).layers[LAYER], whole.layers[LAYER])
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in before.items()), "merge changed its part"
    empty = RoutingStatistics(**settings)
    assert_same(empty.merge(first).layers[LAYER], first.layers[LAYER])
    assert_same(first.merge(empty).layers[LAYER], first.layers[LAYER])
    assert merged.position() == whole.position()


def test_order_of_tokens_changes_no_sum() -> None:
    batch = routed(300)
    shuffled = rows(batch, torch.randperm(300, generator=torch.Generator().manual_seed(1)))
    assert_same(collected(shuffled, whiten=True).layers[LAYER], collected(batch, whiten=True).layers[LAYER], rtol=1e-12)


def test_collecting_goes_on_after_a_round_trip(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    batch, settings = routed(90), {"reservoir": 3, "whiten": True, "seed": 2}
    half = collected(rows(batch, slice(0, 50)), **settings)
    save_file(half.tensors(), tmp_path / "routing.safetensors")
    resumed = RoutingStatistics.from_tensors(load_file(tmp_path / "routing.safetensors"))
    resumed.update({LAYER: rows(batch, slice(50, None))})
    assert_same(resumed.layers[LAYER], collected(batch, **settings).layers[LAYER])
    assert (resumed.reservoir, resumed.whiten, resumed.seed) == (3, True, 2)


def test_collecting_twice_doubles_counts_and_keeps_frequencies() -> None:
    batch = routed(70)
    once, twice = collected(batch).layers[LAYER], collected(batch, batch).layers[LAYER]
    assert torch.equal(twice.computed_E, 2 * once.computed_E)
    torch.testing.assert_close(twice.frequency_E, once.frequency_E, rtol=1e-15, atol=0)


def test_what_is_kept_does_not_grow_with_tokens() -> None:
    def held(statistics: RoutingStatistics) -> int:
        return sum(tensor.nbytes for tensor in statistics.tensors().values())

    small = collected(routed(10), reservoir=3, whiten=True)
    assert held(collected(*(routed(500, seed) for seed in range(3)), reservoir=3, whiten=True)) == held(small)


# -- shares ------------------------------------------------------------------------------------------------------
def test_frequency_and_probability() -> None:
    found = collected(routed(300)).layers[LAYER]
    assert float(found.frequency_E.sum()) == pytest.approx(1, abs=1e-15)
    assert float(found.probability_E.sum()) == pytest.approx(1, abs=1e-6)
    assert float(found.frequency_E[4]) == 0
    torch.testing.assert_close(found.frequency_E, found.computed_E / found.computed_E.sum().double())


def test_shares_are_uniform_where_nothing_was_routed() -> None:
    batch = routed(12)
    found = collected(RoutedBatch(**{**vars(batch), "valid_T": torch.zeros(12, dtype=torch.bool)})).layers[LAYER]
    assert int(found.valid_tokens) == 0
    torch.testing.assert_close(found.frequency_E, torch.full((EXPERTS,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(found.probability_E, torch.full((EXPERTS,), 0.2, dtype=torch.float64))
    assert torch.equal(found.feature_ED, torch.zeros(EXPERTS, WIDTH, dtype=torch.float64))


# -- sampled tokens ----------------------------------------------------------------------------------------------
def test_reservoir_holds_an_experts_own_tokens_and_all_of_them_where_there_is_room() -> None:
    batch = routed(60, choices=1)
    valid = rows(batch, batch.valid_T)
    found = collected(batch, reservoir=100).layers[LAYER]
    for expert, (tokens_ND, gates_N) in enumerate(zip(found.tokens(), found.gates(), strict=True)):
        own = valid.chosen_TK[:, 0] == expert
        assert len(tokens_ND) == int(own.sum()) == int(found.computed_E[expert])
        expected = torch.cat([valid.inputs_TD[own], valid.weights_TK[own]], dim=1)
        assert sorted(torch.cat([tokens_ND, gates_N[:, None]], dim=1).tolist()) == sorted(expected.tolist())


def test_reservoir_keeps_the_smallest_keys() -> None:
    batch = routed(400, choices=1, valid=1.1, dropped=0.0)
    found = collected(*(rows(batch, part) for part in torch.arange(400).split(64)), reservoir=5, seed=9).layers[LAYER]
    key_T = keys(torch.arange(400), batch.chosen_TK[:, 0], seed=9)
    for expert in range(4):
        own = (batch.chosen_TK[:, 0] == expert).nonzero()[:, 0]
        assert torch.equal(found.tokens()[expert], batch.inputs_TD[own[key_T[own].argsort()[:5]]])
    assert len(found.tokens()[4]) == 0


def test_reservoir_is_a_uniform_sample() -> None:
    size, tokens, seeds = 10, 40, 600
    expert_N = torch.zeros(tokens, dtype=torch.int64)
    drawn = torch.zeros(tokens)
    for seed in range(seeds):
        drawn[keys(torch.arange(tokens), expert_N, seed).argsort()[:size]] += 1
    # Binomial(600, 1/4) has a standard deviation of 10.6; 40 of them stay within 5 of it.
    assert float((drawn - seeds * size / tokens).abs().max()) < 53
    assert int(keys(torch.arange(5000), expert_N[:1].expand(5000), 3).unique().shape[0]) == 5000
    assert int(keys(torch.arange(5000), expert_N[:1].expand(5000), 3).min()) >= 0


def test_reservoir_depends_on_the_seed_and_is_missed_by_name() -> None:
    batch = routed(300)
    one, other = (collected(batch, reservoir=4, seed=seed).layers[LAYER].tokens()[0] for seed in (0, 1))
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match=r"layer 'x'.*reservoir"):
        collected(batch).layers[LAYER].tokens("x")


# -- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field", ["inputs_TD", "logits_TE", "weights_TK"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("choices", [1, 2])
def test_non_finite_numbers_are_refused_and_change_nothing(field: str, value: float, choices: int) -> None:
    statistics = collected(routed(30, choices=choices))
    before = {name: tensor.clone() for name, tensor in statistics.tensors().items()}
    bad = routed(30, seed=1, choices=choices, valid=1.1, dropped=0.0)
    getattr(bad, field)[17, 0] = value
    with pytest.raises(ValueError, match=rf"layer '{LAYER}': .* token 17 .* is -?(nan|inf)"):
        statistics.update({"another": routed(5), LAYER: bad})
    assert set(statistics.tensors()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics.tensors().items())


def test_a_dropped_token_is_checked_too() -> None:
    bad = routed(30, choices=1, dropped=1.1, valid=1.1)
    bad.inputs_TD[3, 2] = torch.nan
    with pytest.raises(ValueError, match="input of valid token 3"):
        collected(bad)


def test_statistics_of_another_model_are_refused() -> None:
    batch = routed(20)
    statistics = collected(batch)
    narrow = RoutedBatch(**{**vars(batch), "inputs_TD": batch.inputs_TD[:, :4]})
    with pytest.raises(ValueError, match=rf"layer '{LAYER}'.*6 input features.*4"):
        statistics.update({LAYER: narrow})
    with pytest.raises(ValueError, match=rf"layer '{LAYER}'.*another model"):
        statistics.merge(collected(narrow))
    other = RoutingStatistics()
    other.update({"layer.1": batch})
    with pytest.raises(ValueError, match=r"'layer.0' is in one"):
        statistics.merge(other)
    with pytest.raises(ValueError, match=r"seed 0 .* seed 1"):
        statistics.merge(collected(batch, seed=1))
    with pytest.raises(ValueError, match=rf"layer '{LAYER}': statistics are of 5 experts, the layer has 8"):
        statistics.layers[LAYER].check_against(LAYER, 8)
    statistics.check_layers([LAYER])
    with pytest.raises(ValueError, match=r"layer 'layer.9' is in the model"):
        statistics.check_layers([LAYER, "layer.9"])
    with pytest.raises(ValueError, match=rf"layer '{LAYER}' is in the routing"):
        statistics.check_layers([])


def test_damaged_files_are_refused() -> None:
    good = collected(routed(20), reservoir=2).tensors()

    def changed(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {**good, f"{LAYER}/{name}": tensor}

    for tensors, message in (
        (
            {k: v for k, v in good.items() if not k.endswith("computed_E")},
            f"layer '{LAYER}': .*'computed_E' is missing",
        ),
        ({k: v for k, v in good.items() if k != "settings"}, "settings are missing"),
        ({k: v for k, v in good.items() if not k.endswith("gate_ES")}, f"layer '{LAYER}': its reservoir has only"),
        (changed("logits_gram_EE", torch.zeros(4, 4).double()), "'logits_gram_EE' has shape"),
        (changed("computed_E", -torch.ones(EXPERTS, dtype=torch.int64)), "'computed_E' is -1"),
        (changed("input_sum_ED", torch.full((EXPERTS, WIDTH), torch.nan).double()), "'input_sum_ED' is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            RoutingStatistics.from_tensors(tensors)
    with pytest.raises(ValueError, match="reservoir is -1"):
        RoutingStatistics(reservoir=-1)
