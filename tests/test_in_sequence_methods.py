"""Methods that reduce layers in sequence: how they are named and refused, what is drawn for them, and rounded weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from mcsmoe import methods
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.compress.bits import GROUP, bits_a_weight
from mcsmoe.compress.rounding import rounded
from mcsmoe.data.collate import Tokenised, domain_batches
from mcsmoe.evaluate.cost import count_parameters, packed_bytes
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.rounding import round_layer
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow.compared_methods import resolve


def complete(**more: Any) -> dict[str, Any]:
    return configuration.complete({"tasks": ["COPA"], "experts": [4], **more}, check_data=False)


# -- methods -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", methods.CRITERIA)
def test_every_criterion_is_a_method_with_and_without_a_refit(name: str) -> None:
    called = name if name in methods.BUILTIN and methods.BUILTIN[name].criterion else f"{name}-pruning"
    config = complete(variants=["full", called, f"{called}-refit"])
    known = resolve(config)
    plain, refitted = known[called], known[f"{called}-refit"]
    assert (plain.criterion, plain.refit, refitted.criterion, refitted.refit) == (name, False, name, True)
    for method in (plain, refitted):
        assert method.in_sequence
        assert method.fewer
        assert method.budget == "uniform"
        assert methods.stages(method) == ["merged"]


def test_what_is_done_in_sequence_and_what_is_not() -> None:
    known = resolve(complete(variants=["msmoe", "msmoe-refit", "4-bit", "ream", "mcsmoe"]))
    assert [known[name].in_sequence for name in ("msmoe", "msmoe-refit", "4-bit", "ream", "mcsmoe", "full")] == [
        *(False, True, True, True, False, False)
    ]
    assert methods.stages(known["msmoe-refit"]) == ["merged", "recovered"]
    assert methods.stages(known["4-bit"]) == ["merged"]
    assert [known[name].fewer for name in ("4-bit", "full", "mcsmoe", "ream")] == [False, False, True, True]


def test_in_sequence_experts_are_aligned_to_the_leader_of_their_group() -> None:
    mine = {
        "refitted": {"base": "msmoe", "refit": True},
        "as-said": {"base": "msmoe", "refit": True, "alignment": "weight"},
        "by-weights": {"base": "msmoe", "refit": True, "similarity": "weight"},
    }
    names = ["full", "msmoe", "msmoe-refit", "averaging-refit", *mine]
    known = resolve(complete(variants=names, methods=mine))
    assert {name: known[name].alignment for name in names[1:]} == {
        "msmoe": "weight",
        "msmoe-refit": "weight-dominant",
        "averaging-refit": "none",
        "refitted": "weight-dominant",
        "as-said": "weight",
        "by-weights": "weight",
    }


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"criterion": "grams"}, "criterion is 'grams', which is not known"),
        ({"base": "msmoe", "criterion": "gram"}, "which prunes, and the method merges"),
        ({"dropped": "affine"}, "dropped is 'affine', which takes a criterion"),
        ({"refit": True}, "refit is true, but no expert is left out or merged"),
        ({"base": "task-specific", "refit": True}, "is trained and not reduced in sequence"),
        ({"base": "gram", "bits": 4, "recover": True}, "bits is 4, and the method trains afterwards"),
        ({"bits": 20}, "bits is 20; it must be at most 16"),
        ({"base": "msmoe", "budget": "predicted"}, "budget is 'predicted', which takes a method that reduces"),
        ({"base": "gram", "mixture": "min-max"}, "mixture is 'min-max'; correct it"),
        ({"base": "gram", "mixture": {"code": -1}}, "mixture.code is -1; it must be at least 0"),
    ],
)
def test_contradictions_are_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete(variants=["full", "mine"], methods={"mine": method})


# -- rows ----------------------------------------------------------------------------------------------------------
def test_a_mixture_draws_of_each_domain_its_share() -> None:
    offsets = np.arange(0, 404, 4)
    ids = np.repeat(np.arange(101), 4)[:400].astype(np.int32)
    rows = Tokenised(ids, offsets[:101], ids, offsets[:101], 0)
    groups = ["code" if number % 2 else "prose" for number in range(100)]
    plain = domain_batches(rows, groups, 20, 8, seed=0)
    assert {domain for domain, _ in plain} == {"all"}
    assert sum(len(batch["row"]) for _, batch in plain) == 20
    found = domain_batches(rows, groups, 20, 8, seed=0, mixture={"code": 3, "prose": 1})
    counted = {"code": 0, "prose": 0}
    for domain, batch in found:
        counted[domain] += len(batch["row"])
        assert {groups[row] for row in batch["row"].tolist()} == {domain}
    assert counted == {"code": 15, "prose": 5}
    assert {domain for domain, _ in domain_batches(rows, groups, 20, 8, 0, {"code": 1, "prose": 0})} == {"code"}
    with pytest.raises(ValueError, match="mixture names domain 'maths'"):
        domain_batches(rows, groups, 20, 8, 0, {"maths": 1})


# -- rounding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("width", [5, 32, 70])
def test_rounding_moves_no_weight_by_more_than_half_a_step(bits: int, width: int) -> None:
    weight = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(bits))
    found = rounded(weight, bits)
    for start in range(0, width, GROUP):
        part, now = weight[..., start : start + GROUP], found[..., start : start + GROUP]
        step = (part.amax(-1) - part.amin(-1)) / (2**bits - 1)
        assert ((now - part).abs() <= step[..., None] / 2 + 1e-6).all()
        levels = [len(torch.unique(row)) for row in now.flatten(0, 1)]
        assert max(levels) <= 2**bits
    assert torch.allclose(rounded(found, bits), found, atol=1e-5)  # what is rounded stays


def test_constant_groups_and_bad_bits() -> None:
    assert torch.equal(rounded(torch.full((2, 40), 0.3), 2), torch.full((2, 40), 0.3))
    with pytest.raises(ValueError, match="bits is 0"):
        rounded(torch.ones(2, 2), 0)


def test_the_bytes_of_rounded_experts_are_those_of_their_bits() -> None:
    model: Any = tiny_models.model("qwen3_moe")
    adapter: Any = adapter_for(model)
    total, _ = count_parameters(model)
    matrices = sum(
        tensor.numel()
        for layer in adapter.layers(model)
        for tensor in adapter.read_experts(model, layer).tensors.values()
    )
    assert packed_bytes(model, None) == 2 * total
    assert packed_bytes(model, bits_a_weight(4)) == round(2 * (total - matrices) + matrices * 5 / 8)
    layer = adapter.layers(model)[0]
    before = adapter.read_experts(model, layer)
    round_layer(SparseLayer(model, adapter, layer), 3)
    for name, tensor in adapter.read_experts(model, layer).tensors.items():
        assert torch.equal(tensor, rounded(before.tensors[name], 3))
