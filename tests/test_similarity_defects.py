"""Similarities: defects of the published implementation that ours must not have, and bad input."""

from __future__ import annotations

import math

import pytest
import tiny_switch
import torch
from similarity_cases import (
    EXPERTS,
    LAYER,
    TOKEN_BASES,
    UNUSED,
    WIDTH,
    batch,
    correlations,
    everything,
    given_of,
    run,
    stacked,
    statistics_of,
)
from torch import Tensor
from torch.nn import functional

from mcsmoe.adapters.switch import SwitchAdapter
from mcsmoe.similarity import BASES, similarity
from mcsmoe.similarity import tokens as token_bases
from mcsmoe.similarity.base import SimilarityInputs
from mcsmoe.types import RoutedBatch, RouterWeights


# -- defects of the published implementation -----------------------------------------------------------------------
def test_mse_falls_with_the_error_and_is_largest_for_identical_experts() -> None:
    """The published map calls identical experts least alike, and has a pole where the error is e^-10."""
    base, direction = stacked(0, experts=1), stacked(1, experts=1)
    steps = torch.tensor([0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.5])
    weights = base.map(
        lambda name, tensor: torch.cat([tensor + float(step) * direction.tensors[name] for step in steps])
    )
    row = similarity("mse", everything(batch(experts=EXPERTS), weights=weights))[0]
    assert float(row[1]) == pytest.approx(1, abs=1e-9)
    assert (row[:-1] >= row[1:]).all()
    assert (row[2:-1] > row[3:]).all()
    identical = everything(weights=base.map(lambda _, tensor: tensor.expand(EXPERTS, *tensor.shape[1:]).clone()))
    torch.testing.assert_close(
        similarity("mse", identical)[:UNUSED, :UNUSED], torch.ones(5, 5).double(), rtol=0, atol=1e-9
    )


def test_mse_does_not_depend_on_the_scale_of_outputs() -> None:
    given = everything()
    assert given.weights is not None
    scaled = given.weights.map(lambda name, tensor: 10 * tensor if name.startswith("down") else tensor)
    other = everything(weights=scaled)
    torch.testing.assert_close(similarity("mse", other), similarity("mse", given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", TOKEN_BASES)
def test_token_bases_are_the_same_each_time_and_ignore_dropout(base: str) -> None:
    """The published pair average keeps dropout on: its similarities are random."""
    made = tiny_switch.model(dropout_rate=0.5)
    given = given_of(made, tiny_switch.batch(rows=8), reservoir=50)
    made.train()
    again = given_of(made, tiny_switch.batch(rows=8), reservoir=50, training=False)
    for layer in given:
        assert torch.equal(similarity(base, given[layer]), similarity(base, again[layer]))


@pytest.mark.parametrize("base", ["feature-correlation.lsa", "feature-correlation.max", "mse"])
def test_pairs_without_tokens_are_neutral_not_alike(base: str) -> None:
    """Published: 1.0, so that experts nobody used are the first to be merged."""
    routed = batch(choices=1)
    few = torch.where(routed.chosen_TK == 4, 0, routed.chosen_TK)
    routed = RoutedBatch(**{**vars(routed), "wanted_TK": few, "chosen_TK": few})
    found = similarity(base, everything(routed))
    assert float(found[4, UNUSED]) == 0.5
    assert float(found[0, 1]) != 0.5


def test_a_handful_of_tokens_does_not_make_experts_alike() -> None:
    routed = batch(tokens=200, choices=1)
    two = torch.where(routed.chosen_TK == 4, 0, routed.chosen_TK)
    two[:2] = 4
    routed = RoutedBatch(**{**vars(routed), "wanted_TK": two, "chosen_TK": two})
    found = similarity("feature-correlation.max", everything(routed))
    assert float(found[4, UNUSED]) == 0.5  # two tokens: every correlation is 1 or -1


def test_maximum_correlation_is_taken_in_both_directions() -> None:
    """Published: over one side's neurons only, so the value depends on which expert comes first."""
    routed = batch(choices=1)
    given = everything(routed)
    assert given.weights is not None
    found = correlations(given.weights, routed, 0, 1)
    one, other = (float((1 + found.max(dim=axis).values).mean() / 2) for axis in (0, 1))
    assert abs(one - other) > 1e-3
    assert float(similarity("feature-correlation.max", given)[0, 1]) == pytest.approx((one + other) / 2, abs=1e-6)


def test_a_sample_stands_for_all_tokens() -> None:
    """With few tokens kept, expert outputs approach those on all tokens, though experts' loads differ widely."""
    routed = batch(tokens=6000, choices=1)
    routed = RoutedBatch(**{**vars(routed), "inputs_TD": routed.inputs_TD + 0.3 * routed.logits_TE[:, :WIDTH]})
    skewed = torch.where(torch.arange(6000)[:, None] < 4500, 0, routed.chosen_TK)
    routed = RoutedBatch(**{**vars(routed), "chosen_TK": skewed, "wanted_TK": skewed})
    given = everything(routed)
    assert given.weights is not None
    all_tokens = torch.stack([run(given.weights, e, routed.inputs_TD.double()).mean(dim=0) for e in range(EXPERTS)])
    sample = token_bases.Sample.of(everything(statistics=statistics_of(routed, reservoir=400)))
    scale = float(all_tokens.abs().mean())
    assert float((token_bases.mean_outputs(sample) - all_tokens).abs().mean()) < 0.15 * scale


# -- bad input -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", [name for name in BASES if name != "random"])
def test_what_is_missing_is_named(base: str) -> None:
    bare = {"statistics": None, "weights": None, "router": None, "gradients": None, "activation": None}
    with pytest.raises(ValueError, match=rf"layer '{LAYER}': similarity '{base}' needs .*; (collect|give)"):
        similarity(base, everything(**bare))


def test_bad_input_is_refused_by_name() -> None:
    wide = stacked(0, experts=4)
    bad_weights, bad_gradients = stacked(0), stacked(1)
    bad_weights.tensors["up"][2, 1, 1] = torch.nan
    bad_gradients.tensors["down"][3, 0, 0] = torch.inf
    router = torch.zeros(EXPERTS, WIDTH)
    router[1, 2] = torch.nan
    broken = statistics_of(batch())
    broken.logits_gram_EE[0, 0] = torch.nan
    huge = stacked(0, scale=1e25)
    for base, changes, message in (
        ("nonsense", {}, "'nonsense' is not known; known are router-logits"),
        ("feature", {"weights": wide}, f"layer '{LAYER}': statistics are of 6 experts, the layer has 4"),
        ("weight", {"weights": bad_weights}, "tensor 'up' of expert 2"),
        ("mse", {"weights": bad_weights}, "tensor 'up' of expert 2"),
        ("gradient", {"gradients": bad_gradients}, "gradient of 'down' of expert 3 is not finite"),
        ("weight-gradient", {"gradients": wide}, "gradients are of"),
        ("router-weight", {"router": RouterWeights(router)}, "row of expert 1 is not finite"),
        ("router-weight", {"router": RouterWeights(torch.zeros(EXPERTS, 9))}, "router is 6 x 9"),
        ("router-logits", {"statistics": broken}, r"'logits_gram_EE' is nan at \[0, 0\]"),
        ("mse", {"statistics": statistics_of(batch(), reservoir=0)}, "needs tokens; collect .* reservoir"),
        *((base, {"weights": huge}, f"'{base}' of experts 0 and 1 overflows") for base in TOKEN_BASES),
    ):
        with pytest.raises(ValueError, match=message):
            similarity(base, everything(**changes))
    with pytest.raises(ValueError, match="nothing is given"):
        similarity("random", SimilarityInputs())


def test_padding_changes_no_similarity() -> None:
    """Published: padding counts. Here the same examples give the same similarities however far they are padded."""
    made, inputs = tiny_switch.model(), tiny_switch.batch(rows=6)
    padded = {
        "input_ids": functional.pad(inputs["input_ids"], (0, 5)),
        "attention_mask": functional.pad(inputs["attention_mask"], (0, 5)),
        "labels": functional.pad(inputs["labels"], (0, 4), value=-100),
    }
    short, long = given_of(made, inputs, reservoir=200), given_of(made, padded, reservoir=200)
    for layer in short:
        for base in BASES:
            if base in ("gradient", "weight-gradient"):
                continue
            left, right = similarity(base, short[layer]), similarity(base, long[layer])
            torch.testing.assert_close(left, right, rtol=0, atol=1e-5, msg=lambda t, b=base: f"{b}: {t}")


def test_gradients_of_a_single_example_are_enough() -> None:
    """Published: mini-batches of 16 rows by floor division, so fewer than 16 examples end in an error."""
    made, adapter, inputs = tiny_switch.model(), SwitchAdapter(), tiny_switch.batch(rows=1)
    made(**inputs).loss.backward()
    layer = adapter.layers(made)[0]
    weights, modules = adapter.read_experts(made, layer), made.get_submodule(layer).experts

    def gradient(name: str, tensor: Tensor) -> Tensor:
        found = [getattr(modules[f"expert_{expert}"], name).weight.grad for expert in range(len(tensor))]
        return torch.stack([torch.zeros_like(tensor[0]) if one is None else one for one in found])

    gradients = weights.map(gradient)
    used = gradients.flatten().abs().sum(dim=1) > 0
    found = similarity("gradient", SimilarityInputs(gradients=gradients, layer=layer))
    assert 0 < int(used.sum()) < 6
    assert (found[~used][:, used] == 0.5).all()
    assert math.isfinite(float(found.sum()))
