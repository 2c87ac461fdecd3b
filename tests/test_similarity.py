"""Every similarity base against closed forms, one loop per pair, laws, and the recorded numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_switch
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from mcsmoe.adapters.switch import SwitchAdapter
from mcsmoe.methods import SIMILARITIES
from mcsmoe.routing import LayerStatistics, RoutingStatistics
from mcsmoe.similarity import BASES, SimilarityInputs, similarity
from mcsmoe.similarity import tokens as token_bases
from mcsmoe.types import ExpertWeights, Role, RoutedBatch, RouterWeights

EXPERTS, WIDTH, HIDDEN, UNUSED = 6, 5, 7, 5
LAYER = "layer.0"
ROLES = {
    "gate": Role.INPUT,
    "up": Role.INPUT,
    "down": Role.OUTPUT,
    "gate_bias": Role.INPUT_BIAS,
    "up_bias": Role.INPUT_BIAS,
    "down_bias": Role.OUTPUT_BIAS,
}
SIZES = {
    Role.INPUT: (HIDDEN, WIDTH),
    Role.OUTPUT: (WIDTH, HIDDEN),
    Role.INPUT_BIAS: (HIDDEN,),
    Role.OUTPUT_BIAS: (WIDTH,),
}
TOKEN_BASES = ("mse", "feature-correlation.lsa", "feature-correlation.max", "expert-output")


def activation(outputs: Mapping[str, Tensor]) -> Tensor:
    return functional.silu(outputs["gate"]) * outputs["up"]


def stacked(seed: int, experts: int = EXPERTS, scale: float = 1.0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: scale * torch.randn(experts, *SIZES[role], generator=generator) for name, role in ROLES.items()}
    return ExpertWeights(tensors, dict(ROLES))


def batch(tokens: int = 160, seed: int = 0, choices: int = 2, experts: int = EXPERTS) -> RoutedBatch:
    """Random routing in which the last expert is never wanted."""
    generator = torch.Generator().manual_seed(seed)
    inputs_TD = torch.randn(tokens, WIDTH, generator=generator)
    logits_TE = torch.randn(tokens, experts, generator=generator) + 0.5
    masked_TE = logits_TE.clone()
    masked_TE[:, -1] = -torch.inf
    weights_TK, chosen_TK = masked_TE.softmax(dim=-1).topk(choices, dim=-1)
    return RoutedBatch(inputs_TD, logits_TE, chosen_TK, chosen_TK, weights_TK, torch.ones(tokens, dtype=torch.bool))


def statistics_of(*batches: RoutedBatch, reservoir: int = 1000) -> LayerStatistics:
    made = RoutingStatistics(reservoir=reservoir)
    for one in batches:
        made.update({LAYER: one})
    return made.layers[LAYER]


def everything(routed: RoutedBatch | None = None, seed: int = 1, **changes: Any) -> SimilarityInputs:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "statistics": statistics_of(batch() if routed is None else routed),
        "weights": stacked(seed),
        "router": RouterWeights(torch.randn(EXPERTS, WIDTH, generator=generator)),
        "gradients": stacked(seed + 1),
        "activation": activation,
        "layer": LAYER,
    }
    return SimilarityInputs(**(values | changes))


def plain_cosine(left: Tensor, right: Tensor) -> float:
    left, right = left.flatten().double(), right.flatten().double()
    norms = float(left.norm() * right.norm())
    return (1 + (float(left @ right) / norms if norms > 0 else 0.0)) / 2


# -- one expert, one pair at a time --------------------------------------------------------------------------------
def own(routed: RoutedBatch, expert: int) -> Tensor:
    return routed.inputs_TD[(routed.chosen_TK == expert).any(dim=1)].double()


def run_hidden(weights: ExpertWeights, expert: int, inputs_TD: Tensor) -> Tensor:
    return activation(
        {
            name: inputs_TD @ weights.tensors[name][expert].double().T
            + weights.tensors[f"{name}_bias"][expert].double()
            for name in ("gate", "up")
        }
    )


def run(weights: ExpertWeights, expert: int, inputs_TD: Tensor) -> Tensor:
    down_DF, bias_D = weights.tensors["down"][expert].double(), weights.tensors["down_bias"][expert].double()
    return run_hidden(weights, expert, inputs_TD) @ down_DF.T + bias_D


def correlations(weights: ExpertWeights, routed: RoutedBatch, i: int, j: int) -> Tensor:
    inputs_TD = torch.cat([own(routed, i), own(routed, j)])
    both = torch.cat([run_hidden(weights, i, inputs_TD), run_hidden(weights, j, inputs_TD)], dim=1)
    return torch.corrcoef(both.T)[:HIDDEN, HIDDEN:]


def average_error(weights: ExpertWeights, routed: RoutedBatch, i: int, j: int) -> float:
    average = weights.map(lambda _, tensor: ((tensor[i] + tensor[j]) / 2)[None])
    return sum(
        float((run(average, 0, own(routed, e)) - run(weights, e, own(routed, e))).square().sum()) for e in (i, j)
    )


def slow_mse(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    counts = [len(own(routed, e)) for e in range(EXPERTS)]
    outputs = sum(float(run(given.weights, e, own(routed, e)).square().sum()) for e in range(EXPERTS))
    mean = average_error(given.weights, routed, i, j) / (counts[i] + counts[j])
    return 1 / (1 + mean / (outputs / sum(counts)))


def slow_lsa(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    found = correlations(given.weights, routed, i, j).numpy()
    return float((1 + found[linear_sum_assignment(found, maximize=True)]).mean() / 2)


def slow_max(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    found = correlations(given.weights, routed, i, j)
    return float(((1 + found.max(dim=0).values).mean() + (1 + found.max(dim=1).values).mean()) / 4)


def slow_output(given: SimilarityInputs, routed: RoutedBatch, i: int, j: int) -> float:
    assert given.weights is not None
    shared = torch.cat([own(routed, e) for e in range(EXPERTS)])
    return plain_cosine(run(given.weights, i, shared).mean(dim=0), run(given.weights, j, shared).mean(dim=0))


def vectors(given: SimilarityInputs, routed: RoutedBatch) -> dict[str, Callable[[int], Tensor]]:
    weights, gradients, router = given.weights, given.gradients, given.router
    assert weights is not None
    assert gradients is not None
    assert router is not None

    def mean(values: Tensor) -> Tensor:
        return values.mean(dim=0) if len(values) else torch.zeros(WIDTH)

    return {
        "router-logits": lambda e: routed.logits_TE[:, e],
        "router-weight": lambda e: router.weight_ED[e],
        "router-weight-feature": lambda e: router.weight_ED[e] * routed.inputs_TD.norm(dim=0),
        "weight": lambda e: torch.cat([tensor[e].flatten() for tensor in weights.tensors.values()]),
        "feature": lambda e: mean(own(routed, e)),
        "feature.abs": lambda e: mean(own(routed, e).abs()),
        "weight-feature": lambda e: torch.cat(
            [weights.tensors[name][e] * own(routed, e).norm(dim=0) for name in ("gate", "up")]
        ),
        "gradient": lambda e: torch.cat([tensor[e].flatten() for tensor in gradients.tensors.values()]),
        "weight-gradient": lambda e: torch.cat(
            [(gradients.tensors[name][e] * tensor[e]).flatten() for name, tensor in weights.tensors.items()]
        ),
    }


@pytest.mark.parametrize("base", [name for name in BASES if name not in ("random", *TOKEN_BASES)])
@pytest.mark.parametrize("choices", [1, 2])
def test_cosine_bases_equal_one_cosine_per_pair(base: str, choices: int) -> None:
    routed = batch(choices=choices)
    given = everything(routed)
    vector, found = vectors(given, routed)[base], similarity(base, given)
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            expected = 1.0 if i == j else plain_cosine(vector(i), vector(j))
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-7), (i, j)


@pytest.mark.parametrize(
    ("base", "slow"),
    [
        ("mse", slow_mse),
        ("feature-correlation.lsa", slow_lsa),
        ("feature-correlation.max", slow_max),
        ("expert-output", slow_output),
    ],
)
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("block", [1, 2**26])
def test_token_bases_equal_one_computation_per_pair(
    base: str, slow: Callable[..., float], choices: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_bases, "_BLOCK_BYTES", block)
    routed = batch(choices=choices)
    given = everything(routed)
    found = similarity(base, given)
    for i in range(EXPERTS):
        for j in range(i + 1, EXPERTS):
            assert float(found[i, j]) == pytest.approx(slow(given, routed, i, j), abs=2e-6), (i, j)


# -- laws ----------------------------------------------------------------------------------------------------------
def test_names_are_those_of_the_configuration() -> None:
    assert set(BASES) == set(SIMILARITIES)
    assert all(base.description for base in BASES.values())
    assert frozenset().union(*(base.needs for base in BASES.values())) == {
        *("statistics", "weights", "router", "gradients", "tokens"),
    }


def situations() -> dict[str, SimilarityInputs]:
    nothing = batch(tokens=9)
    nothing = RoutedBatch(**{**vars(nothing), "valid_T": torch.zeros(9, dtype=torch.bool)})
    one = batch(tokens=1, choices=1)
    zero = stacked(0).map(lambda _, tensor: torch.zeros_like(tensor))
    same = stacked(3, experts=1).map(lambda _, tensor: tensor.expand(EXPERTS, *tensor.shape[1:]).clone())
    constant = batch()
    constant = RoutedBatch(
        **{**vars(constant), "inputs_TD": torch.ones(160, WIDTH), "logits_TE": torch.zeros(160, EXPERTS)}
    )
    return {
        "ordinary": everything(),
        "nothing routed": everything(nothing),
        "one token": everything(one),
        "all zero": everything(weights=zero, gradients=zero, router=RouterWeights(torch.zeros(EXPERTS, WIDTH))),
        "identical experts": everything(weights=same, gradients=same),
        "constant inputs": everything(constant),
        "tiny numbers": everything(weights=stacked(1, scale=1e-30), gradients=stacked(2, scale=1e-30)),
        "bfloat16": everything(weights=stacked(1).map(lambda _, tensor: tensor.bfloat16())),
    }


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("situation", list(situations()))
def test_symmetric_in_0_1_with_a_diagonal_of_1_whatever_is_given(base: str, situation: str) -> None:
    found = similarity(base, situations()[situation])
    assert found.dtype == torch.float64
    assert found.shape == (EXPERTS, EXPERTS)
    assert torch.isfinite(found).all()
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(EXPERTS, dtype=torch.float64))
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("base", list(BASES))
def test_one_expert(base: str) -> None:
    routed = batch(tokens=20, choices=1, experts=2)
    alone = RoutedBatch(**{**vars(routed), "logits_TE": routed.logits_TE[:, :1]})
    given = everything(
        alone,
        weights=stacked(0, experts=1),
        gradients=stacked(1, experts=1),
        router=RouterWeights(torch.ones(1, WIDTH)),
    )
    assert torch.equal(similarity(base, given), torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("base", ["feature", "feature.abs", "weight-feature"])
def test_an_expert_that_was_never_used_is_neutral(base: str) -> None:
    found = similarity(base, everything())
    assert torch.equal(found[UNUSED, :UNUSED], torch.full((UNUSED,), 0.5, dtype=torch.float64))
    assert float((found[:UNUSED, :UNUSED] - 0.5).abs().max()) > 0.01


@pytest.mark.parametrize("base", [name for name in BASES if name != "random"])
def test_order_of_tokens_and_batches_changes_nothing(base: str) -> None:
    routed = batch()
    order = torch.randperm(160, generator=torch.Generator().manual_seed(4))
    parts = [RoutedBatch(**{name: tensor[part] for name, tensor in vars(routed).items()}) for part in order.split(37)]
    given = everything(routed)
    shuffled = everything(statistics=statistics_of(*parts))
    torch.testing.assert_close(similarity(base, shuffled), similarity(base, given), rtol=0, atol=2e-6)


@pytest.mark.parametrize("base", [name for name in BASES if name != "random"])
def test_order_of_experts_only_reorders(base: str) -> None:
    routed, order_E = batch(), torch.tensor([3, 0, 5, 1, 4, 2])
    rank_E = order_E.argsort()
    moved = RoutedBatch(
        *(routed.inputs_TD, routed.logits_TE[:, order_E], rank_E[routed.wanted_TK], rank_E[routed.chosen_TK]),
        *(routed.weights_TK, routed.valid_T),
    )
    given = everything(routed)
    assert given.weights is not None
    assert given.gradients is not None
    assert given.router is not None
    other = everything(
        moved,
        weights=given.weights.select(order_E),
        gradients=given.gradients.select(order_E),
        router=RouterWeights(given.router.weight_ED[order_E]),
    )
    expected = similarity(base, given)[order_E][:, order_E]
    torch.testing.assert_close(similarity(base, other), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("base", ["feature-correlation.lsa", "feature-correlation.max", "expert-output"])
def test_order_of_neurons_changes_nothing(base: str) -> None:
    given = everything()
    assert given.weights is not None
    generator = torch.Generator().manual_seed(8)
    orders = [torch.randperm(HIDDEN, generator=generator) for _ in range(EXPERTS)]

    def permuted(name: str, tensor: Tensor) -> Tensor:
        axis = ExpertWeights.neuron_axis(given.weights, name)  # type: ignore[arg-type]
        if axis is None:
            return tensor
        return torch.stack([one.index_select(axis - 1, order) for one, order in zip(tensor, orders, strict=True)])

    other = everything(weights=given.weights.map(permuted))
    torch.testing.assert_close(similarity(base, other), similarity(base, given), rtol=0, atol=2e-6)
    assert (similarity("weight", other) - similarity("weight", given)).abs().max() > 0.01


def test_random_depends_on_seed_and_layer_alone() -> None:
    given = [everything(seed=3), everything(statistics=None), everything(layer="layer.1")]
    first, again, elsewhere = (similarity("random", one) for one in given)
    assert torch.equal(first, again)
    assert not torch.equal(first, elsewhere)
    values = similarity("random", SimilarityInputs(router=RouterWeights(torch.zeros(200, 1)), seed=9))
    above = values[tuple(torch.triu_indices(200, 200, 1))]
    assert above.unique().shape[0] == 200 * 199 // 2
    # The mean of 19900 uniform numbers has a standard deviation of 0.002.
    assert float(above.mean()) == pytest.approx(0.5, abs=0.011)


def test_closed_forms_of_the_router_logits() -> None:
    base_T = torch.randn(50, generator=torch.Generator().manual_seed(0))
    logits_TE = torch.stack([base_T, 2 * base_T, -base_T, torch.zeros(50), base_T.abs(), base_T + 1], dim=1)
    found = similarity("router-logits", everything(RoutedBatch(**{**vars(batch(50)), "logits_TE": logits_TE})))
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-12)
    assert float(found[0, 2]) == pytest.approx(0, abs=1e-12)
    assert float(found[0, 3]) == 0.5


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


# -- real models, recorded numbers -----------------------------------------------------------------------------------
def given_of(
    made: nn.Module, inputs: dict[str, Tensor], reservoir: int, all_valid: bool = False, training: bool = False
) -> dict[str, SimilarityInputs]:
    adapter, statistics = SwitchAdapter(), RoutingStatistics(reservoir=reservoir)
    made.train(training)
    with torch.no_grad(), adapter.capture(made) as captured:
        made(**inputs)
        batches = captured.batches
        if all_valid:
            batches = {
                layer: RoutedBatch(**{**vars(one), "valid_T": torch.ones_like(one.valid_T)})
                for layer, one in batches.items()
            }
        statistics.update(batches)
    return {
        layer: SimilarityInputs(
            statistics=statistics.layers[layer],
            weights=adapter.read_experts(made, layer),
            router=adapter.read_router(made, layer),
            activation=adapter.activation(made, layer),
            layer=layer,
        )
        for layer in adapter.layers(made)
    }


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[str, Any]:
    from safetensors.torch import load_file
    from transformers import SwitchTransformersForConditionalGeneration

    folder = shared / "golden"
    return {
        "model": SwitchTransformersForConditionalGeneration.from_pretrained(folder / "model").eval(),
        "batches": load_file(folder / "batches.safetensors"),
        "similarity": load_file(folder / "similarity.safetensors"),
    }


def recorded_batch(recorded: dict[str, Any], name: str) -> dict[str, Tensor]:
    return {key: recorded["batches"][f"{name}.{key}"] for key in ("input_ids", "attention_mask", "labels")}


def upper(matrix_EE: Tensor) -> Tensor:
    return matrix_EE.double()[tuple(torch.triu_indices(*matrix_EE.shape, offset=1))]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["full", "pad"])
def test_agrees_with_the_published_implementation(recorded: dict[str, Any], name: str) -> None:
    """Padding counts as a token in the recorded numbers, so every position is declared valid here."""
    wanted = recorded["similarity"]
    compared = 0
    for layer, given in given_of(recorded["model"], recorded_batch(recorded, name), 2000, all_valid=True).items():
        for base in BASES:
            key = next((k for k in (f"{name}.{base}.{layer}", f"{base}.{layer}") if k in wanted), None)
            if key is None or base in ("mse", "feature-correlation.max", "gradient", "weight-gradient"):
                continue
            found, compared = similarity(base, given), compared + 1
            # The published correlation adds 1e-7 to the product of standard deviations.
            tolerance = 1e-5 if base.startswith("feature-correlation") else 2e-6
            torch.testing.assert_close(
                upper(found), upper(wanted[key]), rtol=0, atol=tolerance, msg=lambda t, k=key: f"{k}: {t}"
            )
        reversed_EE = 1 - similarity("router-logits", given)
        torch.testing.assert_close(
            reversed_EE.float(), wanted[f"{name}.router-logits.reversed.{layer}"], rtol=0, atol=2e-6
        )
    assert compared == 8 * 4


@pytest.mark.golden
@pytest.mark.parametrize("name", ["full", "pad"])
def test_published_maps_follow_from_our_parts(recorded: dict[str, Any], name: str) -> None:
    """mse: the published map of our error. Maximum correlation: the published direction of our correlations."""
    wanted = recorded["similarity"]
    for layer, given in given_of(recorded["model"], recorded_batch(recorded, name), 2000, all_valid=True).items():
        sample = token_bases.Sample.of(given)
        error_EE, _, _ = token_bases.pair_errors(sample)
        published = 1 / (1 + 0.1 * error_EE.log())
        torch.testing.assert_close(upper(published), upper(wanted[f"{name}.mse.{layer}"]), rtol=0, atol=2e-6)
        for first_B, second_B, correlation_BFF in token_bases.pair_correlations(sample):
            one_way = (1 + correlation_BFF.double().amax(dim=1)).mean(dim=1) / 2
            expected = wanted[f"{name}.feature-correlation.max.{layer}"][first_B, second_B].double()
            torch.testing.assert_close(one_way, expected, rtol=0, atol=1e-5)
        if name == "full":
            assert given.statistics is not None
            gram_EE = given.statistics.logits_gram_EE
            distance_EE = gram_EE.diagonal()[:, None] + gram_EE.diagonal()[None, :] - 2 * gram_EE
            expected = wanted[f"full.router-logits@mse.{layer}"]
            torch.testing.assert_close(upper(1 / (1 + 0.1 * distance_EE.log())), upper(expected), rtol=0, atol=2e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["full", "pad"])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_bases_agree_with_the_published_implementation(
    recorded: dict[str, Any], name: str, frozen: bool
) -> None:
    """The published loss is the mean over mini-batches of 16 rows of their mean loss, here with autograd."""
    made, adapter, inputs = recorded["model"], SwitchAdapter(), recorded_batch(recorded, name)
    made.zero_grad()
    for start in range(0, 64, 16):
        part = {key: value[start : start + 16] for key, value in inputs.items()}
        outputs = made(**part, output_router_logits=not frozen)
        (outputs.loss / 4).backward()
    suffix = ".frozen" if frozen else ""
    for layer in adapter.layers(made):
        weights, modules = adapter.read_experts(made, layer), made.get_submodule(layer).experts
        gradients = ExpertWeights(
            {
                matrix: torch.stack(
                    [
                        torch.zeros_like(one.weight) if one.weight.grad is None else one.weight.grad
                        for one in (getattr(modules[f"expert_{e}"], matrix) for e in range(8))
                    ]
                )
                for matrix in weights.tensors
            },
            weights.roles,
        )
        given = SimilarityInputs(weights=weights, gradients=gradients, layer=layer)
        for base in ("gradient", "weight-gradient"):
            expected = recorded["similarity"][f"{name}.{base}{suffix}.{layer}"]
            torch.testing.assert_close(upper(similarity(base, given)), upper(expected), rtol=0, atol=1e-4)
    made.zero_grad()


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
