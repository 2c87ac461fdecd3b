"""Similarities against the numbers recorded from the published implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from similarity_cases import given_of
from torch import Tensor

from mcsmoe.adapters.switch import SwitchAdapter
from mcsmoe.similarity import BASES, similarity
from mcsmoe.similarity import tokens as token_bases
from mcsmoe.similarity.base import SimilarityInputs
from mcsmoe.types import ExpertWeights


# -- real models, recorded numbers -----------------------------------------------------------------------------------
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
