"""What must hold for every family of experts, each as a function of a small model that raises where it does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from every_family import clone, inputs_of, logits_of
from torch import Tensor, nn
from two_passes import assert_equal, in_memory, streamed

import mcsmoe
from mcsmoe.adapters.base import Adapter
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.types import LayerId

KEPT = torch.tensor([1, 3, 4, 6])
TABLE = torch.tensor([0, 1, 2, 0, 3, 1, 2, 3])


def near(one: Tensor, two: Tensor, tolerance: float = 1e-4) -> None:
    assert one.shape == two.shape
    assert torch.isfinite(one).all()
    apart = float((one - two).abs().max()) / float(two.std())
    assert apart < tolerance, f"logits differ by {apart:.3g} of their standard deviation"


def _each(model: nn.Module) -> Iterator[tuple[Adapter, LayerId]]:
    adapter = adapter_for(model)
    for layer in adapter.layers(model):
        yield adapter, layer


def permuted_neurons(model: nn.Module, _folder: Path) -> None:
    """Hidden neurons of an expert may stand in any order."""
    adapter_for(model)  # which repairs what the library does wrong
    expected = logits_of(model)
    for adapter, layer in _each(model):
        weights = adapter.read_experts(model, layer)
        order = torch.randperm(weights.width, generator=torch.Generator().manual_seed(3))
        moved = weights.map(
            lambda name, tensor, weights=weights, order=order: (
                tensor if (axis := weights.neuron_axis(name)) is None else tensor.index_select(axis, order)
            )
        )
        adapter.write_experts(model, layer, moved)
    near(logits_of(model), expected)


def merged_by_hand(model: nn.Module, folder: Path) -> None:
    """Groups behind a redirect table compute what the family does with each group's mean in every member's place."""
    adapter_for(model)
    whole = clone(model)
    for adapter, layer in _each(model):
        weights = adapter.read_experts(model, layer)
        member_GE = (TABLE[None, :] == torch.arange(4)[:, None]).double()
        mean_GE = member_GE / member_GE.sum(dim=1, keepdim=True)
        merged = weights.map(
            lambda _, tensor, mean_GE=mean_GE: torch.tensordot(mean_GE, tensor.double(), 1).to(tensor.dtype)
        )
        adapter.write_experts(whole, layer, merged.select(TABLE))
        adapter.write_experts(model, layer, merged, TABLE)
    expected = logits_of(whole)
    near(logits_of(model), expected)
    mcsmoe.save(model, folder / "merged")
    near(logits_of(mcsmoe.load(folder / "merged")), expected)


def identical_experts(model: nn.Module, _folder: Path) -> None:
    """Merging experts that are the same changes nothing."""
    for adapter, layer in _each(model):
        adapter.write_experts(
            model, layer, adapter.read_experts(model, layer).select(torch.zeros(8, dtype=torch.int64))
        )
    expected = logits_of(model)
    for adapter, layer in _each(model):
        adapter.write_experts(model, layer, adapter.read_experts(model, layer).select(torch.arange(4)), TABLE)
    near(logits_of(model), expected)


def pruned_by_hand(model: nn.Module, folder: Path) -> None:
    """Dropped experts are as ones that the router may not choose, and the library itself loads the result."""
    adapter_for(model)
    expected = masked_logits(clone(model))
    for adapter, layer in _each(model):
        adapter.check_dropping(model, layer, len(KEPT))
        dropped_E = torch.ones(8, dtype=torch.bool).index_fill_(0, KEPT, False)
        table = torch.searchsorted(KEPT, torch.arange(8)).clamp(max=3)
        kept = adapter.read_experts(model, layer).select(KEPT)
        adapter.drop_experts(model, layer, kept, table, dropped_E)
    near(logits_of(model), expected)
    mcsmoe.save(model, folder / "pruned")
    near(logits_of(mcsmoe.load(folder / "pruned")), expected)


def captured_routing(model: nn.Module, _folder: Path) -> None:
    """Chosen experts, combine weights and inputs are those that the experts computed, batch after batch."""
    adapter = adapter_for(model)
    with adapter.capture(model) as captured:
        for _ in range(2):
            logits_of(model)
            batches = dict(captured.batches)
            idle = set(adapter.layers(model)) - set(batches)
            if idle:
                raise ValueError(f"layer {min(idle)!r} is never called on text")
    for batch in batches.values():
        tokens, choices = batch.wanted_TK.shape
        assert batch.inputs_TD.shape[0] == batch.logits_TE.shape[0] == tokens
        assert batch.logits_TE.shape[1] == 8
        assert int(batch.wanted_TK.max()) < 8
        assert int(batch.wanted_TK.min()) >= 0
        assert batch.weights_TK.shape == (tokens, choices)
    assert inputs_of(model)["input_ids"].numel() in {batch.inputs_TD.shape[0] for batch in batches.values()}


def streamed_statistics(model: nn.Module, folder: Path) -> None:
    """Statistics of the checkpoint, a block at a time, are those of the model in memory: counts exactly, over batches."""
    adapter_for(model)
    whole = inputs_of(model)
    batches = [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 2), slice(2, 3))]
    expected = in_memory(model, batches)
    model.save_pretrained(folder / "full")
    found, _ = streamed(folder / "full", batches, folder)
    assert list(found) == list(expected)
    for layer, statistics in expected.items():
        assert_equal(found[layer], statistics)


def half_precision(model: nn.Module, folder: Path) -> None:
    """Merged in bfloat16 every tensor keeps its number format, and values are those of the mean, rounded once."""
    kept = _in_float32(model)
    adapter_for(model)
    model = model.to(torch.bfloat16)
    for name, tensor in kept.items():
        _set(model, name, tensor)
    model.config.dtype = torch.bfloat16
    formats = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    wanted: dict[LayerId, Any] = {}
    for adapter, layer in _each(model):
        weights = adapter.read_experts(model, layer)
        member_GE = (TABLE[None, :] == torch.arange(4)[:, None]).double()
        mean_GE = member_GE / member_GE.sum(dim=1, keepdim=True)
        wanted[layer] = weights.map(lambda _, tensor, mean_GE=mean_GE: torch.tensordot(mean_GE, tensor.double(), 1))
        adapter.write_experts(model, layer, wanted[layer], TABLE)
    mcsmoe.save(model, folder / "half")
    back = mcsmoe.load(folder / "half")
    for name, tensor in back.state_dict().items():
        assert formats.get(name, tensor.dtype) == tensor.dtype, name
    for adapter, layer in _each(back):
        for name, tensor in adapter.read_experts(back, layer).tensors.items():
            assert torch.equal(tensor, wanted[layer].tensors[name].to(torch.bfloat16)), f"{layer}: {name}"


def _in_float32(model: Any) -> dict[str, Tensor]:
    """What a family keeps in float32 whatever the rest is stored in."""
    parts = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        fresh = type(model)(model.config)  # a router may be built in float32 whatever the rest is built in
    finally:
        torch.set_default_dtype(usual)
    made = [*fresh.named_parameters(), *fresh.named_buffers()]
    built = {name for name, tensor in made if tensor.dtype == torch.float32}
    return {
        name: tensor.detach().clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name in built or any(part in name for part in parts)
    }


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    held = getattr(model.get_submodule(path), last)
    held.data = tensor


LAWS: dict[str, Callable[[nn.Module, Path], None]] = {
    "neurons in any order": permuted_neurons,
    "identical experts": identical_experts,
    "merged by hand": merged_by_hand,
    "pruned by hand": pruned_by_hand,
    "routing": captured_routing,
    "streamed": streamed_statistics,
    "bfloat16": half_precision,
}


# -- a router that may not choose some experts, without the library under test -------------------------------------
def masked_logits(model: Any) -> Tensor:
    """Logits of ``model`` if its routers could choose only ``KEPT``: by a correction of the choice where there is one,
    else by the scores."""
    dropped_E = torch.ones(8, dtype=torch.bool).index_fill_(0, KEPT, False)
    routers: set[int] = set()
    for _, layer in _each(model):
        block = model.get_submodule(layer)
        tensors = {
            name: tensor
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]
            if "expert" not in name.split(".")[0] or name == "expert_bias"
        }
        linear = [
            tensor
            for tensor in tensors.values()
            if tensor.ndim == 2 and tensor.shape[0] in (8, 9) and tensor.shape[1] == 32
        ]
        correction = [
            tensor
            for name, tensor in tensors.items()
            if re.search("correction|expert_bias", name) and tensor.numel() == 8
        ]
        if correction:
            correction[0].data.masked_fill_(dropped_E.reshape(correction[0].shape), -1e9)
        else:
            routers.add(linear[0].data_ptr())
    with _masking(routers, dropped_E):
        return logits_of(model)


@contextmanager
def _masking(routers: set[int], dropped_E: Tensor) -> Iterator[None]:
    usual = nn.functional.linear

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = usual(inputs, weight, bias)
        return outputs.masked_fill(dropped_E, float("-inf")) if weight.data_ptr() in routers else outputs

    nn.functional.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear = usual


def holds(kind: str, cls: str, folder: Path, build: Callable[[str, str], nn.Module]) -> dict[str, str]:
    """By law ``yes``, or why it is refused; a law that is broken raises."""
    found: dict[str, str] = {}
    made = build(kind, cls)
    for name, law in LAWS.items():
        try:
            law(clone(made), folder / name.replace(" ", "-"))
        except ValueError as error:
            found[name] = str(error)
        else:
            found[name] = "yes"
    return found
