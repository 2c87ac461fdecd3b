"""REAM and MergeMoE against their definitions on small cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mcsmoe.merge import mergemoe, ream
from mcsmoe.types import ExpertWeights, Grouping, Role, RouterWeights


def experts(seed: int = 0, count: int = 6, width: int = 7, model: int = 5) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "gate": torch.randn(count, width, model, generator=generator),
        "up": torch.randn(count, width, model, generator=generator),
        "down": torch.randn(count, model, width, generator=generator),
    }
    return ExpertWeights(tensors, {"gate": Role.INPUT, "up": Role.INPUT, "down": Role.OUTPUT})


def activation(given: dict[str, Tensor]) -> Tensor:
    return functional.silu(given["gate"]) * given["up"]


def run(weights: ExpertWeights, expert: int, x_TD: Tensor) -> Tensor:
    t = weights.tensors
    return (functional.silu(x_TD @ t["gate"][expert].T) * (x_TD @ t["up"][expert].T)) @ t["down"][expert].T


def test_groups_by_hand() -> None:
    # Saliency: 4 leads, then 1, then 0. Groups of at most 3: 4 takes its two nearest that are free (2, 3), 1 takes 5.
    saliency_E = torch.tensor([3.0, 4.0, 1.0, 1.0, 5.0, 2.0])
    similarity_EE = torch.eye(6)
    for i, j, value in ((4, 2, 0.9), (4, 3, 0.8), (4, 5, 0.7), (4, 1, 0.95), (1, 5, 0.2), (0, 5, 0.9)):
        similarity_EE[i, j] = similarity_EE[j, i] = value
    found = ream.pseudo_groups(saliency_E, similarity_EE, 3, size=3)
    assert found.dominant.tolist() == [0, 1, 4]
    assert found.expert_to_group.tolist() == [0, 1, 2, 2, 2, 1]
    found.validate("x")
    # With room for all, the first takes everything and the others stay alone.
    assert ream.pseudo_groups(saliency_E, similarity_EE, 3).expert_to_group.tolist() == [0, 1, 2, 2, 2, 2]
    # With room for none, everything joins its nearest.
    assert ream.pseudo_groups(saliency_E, similarity_EE, 3, size=1).expert_to_group.tolist() == [0, 1, 2, 2, 2, 0]


def test_similarity_is_that_of_mean_gated_outputs_and_of_logits() -> None:
    weights, generator = experts(), torch.Generator().manual_seed(5)
    inputs_TD = torch.randn(40, 5, generator=generator)
    router = RouterWeights(torch.randn(6, 5, generator=generator))
    logits_TE = inputs_TD @ router.weight_ED.T
    mean_ED = ream.mean_gated_outputs(weights, activation, router, inputs_TD.split([15, 25]))
    for expert in range(6):
        wanted_D = (run(weights, expert, inputs_TD) * logits_TE.softmax(dim=1)[:, expert, None]).mean(dim=0)
        assert torch.allclose(mean_ED[expert].float(), wanted_D, atol=1e-5)
    found_EE = ream.similarity(mean_ED, logits_TE.double().T @ logits_TE.double())
    columns_ET = functional.normalize(logits_TE.T, dim=1)
    distance_EE = torch.cdist(columns_ET, columns_ET)
    routing_EE = 1 - distance_EE / distance_EE.max()
    cosine_EE = functional.cosine_similarity(mean_ED[:, None], mean_ED[None], dim=2)
    assert torch.allclose(found_EE.float(), ((cosine_EE + 1) / 2 + routing_EE).float() / 2, atol=1e-3)


def test_merge_undoes_permutations_and_weighs_by_saliency() -> None:
    weights = experts()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    weights.tensors["gate"][1] = weights.tensors["gate"][0][order]
    weights.tensors["up"][1] = weights.tensors["up"][0][order]
    weights.tensors["down"][1] = weights.tensors["down"][0][:, order]
    grouping = Grouping(torch.tensor([0, 0, 1, 2, 3, 1]), torch.tensor([0, 2, 3, 4]))
    inputs_TD = torch.randn(30, 5, generator=torch.Generator().manual_seed(2))
    saliency_E = torch.tensor([1.0, 3.0, 2.0, 1.0, 1.0, 0.0])
    merged = ream.merge(weights, grouping, saliency_E, inputs_TD, activation)
    assert torch.allclose(run(merged.weights, 0, inputs_TD), run(weights, 0, inputs_TD), atol=1e-5)
    assert torch.equal(merged.weights.tensors["up"][2], weights.tensors["up"][3])
    assert merged.share_E.tolist() == pytest.approx([0.25, 0.75, 0.8, 1.0, 1.0, 0.2])  # none at all counts as 0.5
    assert merged.dropped_E is not None
    assert merged.dropped_E.tolist() == [False, True, False, False, False, True]


def test_mergemoe_solves_for_the_output_projection() -> None:
    weights = experts()
    grouping = Grouping(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 3, 5]))
    generator = torch.Generator().manual_seed(7)
    tokens = [torch.randn(count, 5, generator=generator) for count in (20, 11, 9, 0, 0, 4)]
    importance_E = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    merged = mergemoe.merge(weights, grouping, importance_E, tokens, activation, ridge=1e-9)
    share = torch.tensor([0.5, 0.25, 0.25])
    inputs_TD = torch.cat(tokens[:3])
    target_TD = sum(float(a) * run(weights, e, inputs_TD) for e, a in enumerate(share))
    gate, up = (torch.einsum("e,efd->fd", share, weights.tensors[name][:3]) for name in ("gate", "up"))
    assert torch.allclose(merged.weights.tensors["gate"][0], gate, atol=1e-6)
    hidden_TF = functional.silu(inputs_TD @ gate.T) * (inputs_TD @ up.T)
    wanted = np.linalg.lstsq(hidden_TF.double().numpy(), target_TD.double().numpy(), rcond=None)[0].T  # type: ignore
    np.testing.assert_allclose(merged.weights.tensors["down"][0].numpy(), wanted, atol=2e-3)
    # Without tokens the average stays; alone an expert stays bit by bit.
    average = torch.einsum("e,efd->fd", torch.tensor([0.75, 0.25]), weights.tensors["down"][3:5])
    assert torch.allclose(merged.weights.tensors["down"][1], average, atol=1e-6)
    assert torch.equal(merged.weights.tensors["down"][2], weights.tensors["down"][5])


def test_mergemoe_with_few_tokens_stays_near_the_average() -> None:
    weights = experts()
    grouping = Grouping(torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([0, 2, 3, 4, 5]))
    tokens = [torch.randn(1, 5, generator=torch.Generator().manual_seed(1))] + [torch.zeros(0, 5)] * 5
    merged = mergemoe.merge(weights, grouping, torch.ones(6), tokens, activation)
    assert float(merged.weights.tensors["down"][0].abs().max()) < 10 * float(weights.tensors["down"].abs().max())
