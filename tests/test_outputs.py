"""Sums over the outputs of experts: one loop over tokens, and the laws of sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcsmoe.calibration.files import load_statistics, save_tensors
from mcsmoe.statistics.outputs import ChosenOutputs, OutputSums
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import RoutedBatch

EXPERTS, WIDTH, LAYER = 5, 7, "layer.0"


def case(tokens: int, choices: int, seed: int = 0, dropped: float = 0.2) -> tuple[RoutedBatch, ChosenOutputs]:
    """A random batch with padding and dropped choices, whose outputs are NaN wherever nothing may look at them."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, EXPERTS, generator=generator)
    weights_TK, wanted_TK = logits_TE.softmax(dim=-1).topk(choices, dim=-1)
    chosen_TK = torch.where(torch.rand(tokens, choices, generator=generator) < dropped, -1, wanted_TK)
    valid_T = torch.rand(tokens, generator=generator) < 0.7
    outputs_TKD = torch.randn(tokens, choices, WIDTH, generator=generator)
    outputs_TKD[chosen_TK < 0] = torch.nan
    outputs_TKD[~valid_T] = torch.nan
    inputs_TD = torch.randn(tokens, WIDTH, generator=generator)
    batch = RoutedBatch(inputs_TD, logits_TE, wanted_TK, chosen_TK, weights_TK, valid_T)
    return batch, ChosenOutputs(outputs_TKD, 0.8 * weights_TK, 0.8)


def brute_force(batch: RoutedBatch, outputs: ChosenOutputs) -> dict[str, Tensor]:
    made = OutputSums.empty(EXPERTS, WIDTH).tensors()
    for token in batch.valid_T.nonzero()[:, 0].tolist():
        chosen = [place for place, expert in enumerate(batch.chosen_TK[token].tolist()) if expert >= 0]
        total_D = torch.zeros(WIDTH, dtype=torch.float64)
        for place in chosen:
            expert, gate = int(batch.chosen_TK[token, place]), outputs.weights_TK[token, place].double()
            f_D = outputs.outputs_TKD[token, place].double()
            total_D += gate * f_D
            made["gate_square_sum_E"][expert] += gate**2
            made["norm_sum_E"][expert] += f_D.norm()
            made["norm_square_sum_E"][expert] += f_D.norm() ** 2
            made["gated_norm_sum_E"][expert] += gate * f_D.norm()
            made["gated_norm_square_sum_E"][expert] += gate**2 * f_D.norm() ** 2
            made["output_sum_ED"][expert] += f_D
            made["gated_output_sum_ED"][expert] += gate * f_D
            made["largest_norm_E"][expert] = max(made["largest_norm_E"][expert], f_D.norm())
            for second in chosen:
                other, weight = int(batch.chosen_TK[token, second]), outputs.weights_TK[token, second].double()
                g_D = outputs.outputs_TKD[token, second].double()
                made["gram_EE"][expert, other] += gate * weight * (f_D @ g_D)
                made["norm_gram_EE"][expert, other] += gate * weight * f_D.norm() * g_D.norm()
        made["layer_square_sum"] += total_D @ total_D
    return made


def collected(*cases: tuple[RoutedBatch, ChosenOutputs]) -> RoutingStatistics:
    made = RoutingStatistics()
    for batch, outputs in cases:
        made.update({LAYER: batch}, outputs={LAYER: outputs})
    return made


@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (90, 1), (90, 2), (700, 3), (40, 5)])
def test_equals_one_loop_over_tokens(tokens: int, choices: int) -> None:
    batch, outputs = case(tokens, choices)
    found = collected((batch, outputs)).layers[LAYER]
    assert found.outputs is not None
    for name, expected in brute_force(batch, outputs).items():
        torch.testing.assert_close(getattr(found.outputs, name), expected, rtol=1e-11, atol=1e-11, msg=name)
    assert torch.equal(found.outputs.gram_EE, found.outputs.gram_EE.T)
    # The saliency of REAP is with the router's own weight.
    torch.testing.assert_close(found.saliency_sum_E * 0.8, found.outputs.gated_norm_sum_E)


def test_parts_add_up_to_the_whole_and_survive_a_file(tmp_path: Path) -> None:
    cases = [case(60, 2, seed) for seed in range(3)]
    whole = collected(*cases)
    one, two = collected(cases[0]), collected(*cases[1:])
    both = one.merge(two)
    save_tensors(tmp_path / "routing.safetensors", both.tensors())
    for found in (both, load_statistics(tmp_path / "routing.safetensors")):
        # Each part numbered its own tokens from 0.
        expected = {name: one for name, one in whole.layers[LAYER].tensors().items() if name != "position"}
        for name, tensor in expected.items():
            torch.testing.assert_close(found.layers[LAYER].tensors()[name], tensor, rtol=1e-12, atol=1e-12)


def test_deleting_experts_costs_the_quadratic_form() -> None:
    """Without experts P the output changes by sum_{i, j in P} M_ij in squares: what every criterion builds on."""
    batch, outputs = case(200, 3, dropped=0.0)
    found = collected((batch, outputs)).layers[LAYER].outputs
    assert found is not None
    gone_E = torch.tensor([True, False, True, True, False])
    keep = batch.valid_T
    gated_TKD = (outputs.outputs_TKD * outputs.weights_TK[:, :, None])[keep].double()
    change_TD = (gated_TKD * gone_E[batch.chosen_TK[keep]][:, :, None]).sum(dim=1)
    p_E = gone_E.double()
    torch.testing.assert_close(p_E @ found.gram_EE @ p_E, change_TD.square().sum(), rtol=1e-6, atol=0)


def test_scaling_scales_sums_and_not_the_largest() -> None:
    found = collected(case(80, 2)).layers[LAYER].outputs
    assert found is not None
    for name, tensor in found.scaled(3.0).tensors().items():
        expected = getattr(found, name)
        torch.testing.assert_close(tensor, expected if name == "largest_norm_E" else 3 * expected)


def test_outputs_of_part_of_the_tokens_are_refused() -> None:
    batch, outputs = case(30, 2)
    made = collected((batch, outputs))
    before = {name: tensor.clone() for name, tensor in made.tensors().items()}
    with pytest.raises(ValueError, match="for all tokens or for none"):
        made.update({LAYER: batch})
    plain = RoutingStatistics()
    plain.update({LAYER: batch})
    with pytest.raises(ValueError, match="part of the tokens"):
        made.merge(plain)
    assert all(torch.equal(made.tensors()[name], tensor) for name, tensor in before.items())


def test_a_missing_or_misshapen_sum_is_named() -> None:
    tensors = collected(case(30, 2)).tensors()
    short = {name: tensor for name, tensor in tensors.items() if not name.endswith("outputs_gram_EE")}
    with pytest.raises(ValueError, match=r"'layer.0'.*'gram_EE'.*missing"):
        RoutingStatistics.from_tensors(short)
    with pytest.raises(ValueError, match=r"'layer.0'.*'gram_EE'.*shape"):
        RoutingStatistics.from_tensors(tensors | {f"{LAYER}/outputs_gram_EE": torch.zeros(2, 2)})


def test_an_output_that_is_not_finite_names_layer_and_expert() -> None:
    """Its own layer is to blame, not the one that would read it."""
    from mcsmoe.statistics.outputs import ChosenOutputs
    from mcsmoe.statistics.routing import RoutingStatistics
    from mcsmoe.types import RoutedBatch

    chosen_TK = torch.tensor([[0, 1], [1, 2]])
    weights_TK = torch.full((2, 2), 0.5)
    valid_T = torch.ones(2, dtype=torch.bool)
    batch = RoutedBatch(torch.randn(2, 4), torch.randn(2, 3), chosen_TK, chosen_TK, weights_TK, valid_T)
    outputs_TKD = torch.randn(2, 2, 4)
    outputs_TKD[1, 1, 0] = torch.inf
    statistics = RoutingStatistics()
    with pytest.raises(ValueError, match="layer 'one': the output of expert 2 is not finite"):
        statistics.update({"one": batch}, outputs={"one": ChosenOutputs(outputs_TKD, weights_TK)})
    assert not statistics.layers
