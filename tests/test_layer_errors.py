"""Error by layer: what a reduced layer gives otherwise on the full model's inputs, against documents taken one by one."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import pytest
import tiny_models
import tiny_switch
import torch
from torch import Tensor

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.calibration.layer_errors import LayerErrors
from mcsmoe.data.tasks import load_task
from mcsmoe.evaluate import documents
from mcsmoe.train.tokenizer import train_tokenizer
from mcsmoe.types import Role

TEXTS = [f"the {one} of the {two}" + " is on the shelf" * length for length, one in enumerate("abcd") for two in "efg"]
EXAMPLES = load_task("Language").examples(
    pd.DataFrame({"idx": list(map(str, range(len(TEXTS)))), "domain": "one", "text": TEXTS}), "validation"
)
LIMITS = {"max_input": 12, "max_label": 8}


def reduced(model: Any) -> Any:
    """A copy whose expert 1 answers for 0 and 1, in the first sparse layer only."""
    made = copy.deepcopy(model)
    adapter = adapter_for(made)
    layer, experts = adapter.layers(made)[0], adapter.num_experts(made, adapter.layers(made)[0])
    weights = adapter.read_experts(made, layer).select(torch.arange(1, experts))
    adapter.write_experts(made, layer, weights, (torch.arange(experts) - 1).clamp(min=0))
    return made


@torch.no_grad()
def brute(model: Any, reference: Any, tokenizer: Any, layer: str) -> tuple[float, float]:
    """Squared change and energy of one layer, summed over documents that go through the model one by one."""
    change = energy = 0.0
    for first, second in EXAMPLES[["input", "target"]].itertuples(index=False):
        seen: dict[str, Tensor] = {}
        block = reference.get_submodule(layer)
        # In both families the module that holds the sparse block returns the residual stream behind it.
        behind = reference.get_submodule(
            layer.rpartition(".")[0] if "layers" in layer else layer.partition(".layer")[0]
        )
        hooks = [
            block.register_forward_pre_hook(lambda _m, given, seen=seen: seen.__setitem__("x", given[0])),
            behind.register_forward_hook(
                lambda _m, _i, out, seen=seen: seen.__setitem__("s", out if isinstance(out, Tensor) else out[0])
            ),
        ]
        end = tokenizer.eos_token_id
        if reference.config.is_encoder_decoder:
            ids = [*tokenizer(first)["input_ids"][:-1][-(LIMITS["max_input"] - 1) :], end]
            target = tokenizer(second)["input_ids"][:-1][: LIMITS["max_label"]]
            given = {"decoder_input_ids": torch.tensor([[0, *target[:-1]]])}
        else:
            ids, given = tokenizer(first + second)["input_ids"][:-1][: sum(LIMITS.values())], {}
        reference(input_ids=torch.tensor([ids]), **given)
        for hook in hooks:
            hook.remove()
        mine, theirs = (one.get_submodule(layer)(seen["x"]) for one in (model, reference))
        mine, theirs = (one if isinstance(one, Tensor) else one[0] for one in (mine, theirs))
        change += float((mine - theirs).double().square().sum())
        energy += float(seen["s"].double().square().sum())
    return change, energy


@pytest.mark.parametrize("family", ["switch", "olmoe"])
def test_errors_are_those_of_documents_one_by_one(family: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 80, 4, lowercase=True)
    made = tiny_switch.model if family == "switch" else lambda **sizes: tiny_models.model("olmoe", **sizes)
    reference = made(vocab_size=len(tokenizer)).eval()
    model = reduced(reference)
    errors = LayerErrors(model, reference)
    with errors.watching():
        documents.predict_texts(
            model, tokenizer, EXAMPLES, batch_size=5, reference=reference, continuations=2, show=False, **LIMITS
        )
    found = dict(errors.scores(200, 0))
    layers = adapter_for(reference).layers(reference)
    assert list(found) == [f"layer_error/{layer}" for layer in layers]
    for layer in layers:
        change, energy = brute(model, reference, tokenizer, layer)
        one = found[f"layer_error/{layer}"]
        assert one.value == pytest.approx(change / energy, rel=1e-4)
        assert one.low <= one.value <= one.high
        assert one.n == len(EXAMPLES)
        assert (one.value > 0) == (layer == layers[0])


def test_a_layer_that_gives_nothing_loses_what_it_gave() -> None:
    """Closed form: outputs of zero change the stream by the whole output of the layer."""
    tokenizer = train_tokenizer(TEXTS, 80, 4, lowercase=True)
    reference = tiny_models.model("olmoe", vocab_size=len(tokenizer)).eval()
    model, adapter = copy.deepcopy(reference), adapter_for(reference)
    layer = adapter.layers(reference)[0]
    weights = adapter.read_experts(model, layer)
    (output,) = weights.names(Role.OUTPUT)
    adapter.write_experts(model, layer, weights.map(lambda name, one: one * 0 if name == output else one))
    errors = LayerErrors(model, reference)
    kept: list[Tensor] = []
    hook = reference.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: kept.append((out if isinstance(out, Tensor) else out[0]).detach())
    )
    with errors.watching():
        documents.predict_texts(model, tokenizer, EXAMPLES[:1], batch_size=1, reference=reference, show=False, **LIMITS)
    hook.remove()
    assert float(errors._error[layer][0]) == pytest.approx(float(kept[0].double().square().sum()), rel=1e-5)


def test_a_router_with_fewer_outputs_is_watched_where_the_model_asks_for_router_logits() -> None:
    """What the library gathers of the full model's routers must not have the reduced ones among it."""
    tokenizer = train_tokenizer(TEXTS, 80, 4, lowercase=True)
    reference = tiny_models.model("qwen3_moe", vocab_size=len(tokenizer)).eval()
    model, adapter = copy.deepcopy(reference), adapter_for(reference)
    layer = adapter.layers(model)[0]
    experts = adapter.num_experts(model, layer)
    dropped_E = torch.arange(experts) >= experts // 2
    kept = adapter.read_experts(model, layer).select(torch.arange(experts // 2))
    adapter.drop_experts(model, layer, kept, torch.arange(experts).clamp(max=experts // 2 - 1), dropped_E)
    found = []
    for asked in (False, True):
        reference.config.output_router_logits = model.config.output_router_logits = asked
        errors = LayerErrors(model, reference)
        with errors.watching():
            table = documents.predict_texts(
                model, tokenizer, EXAMPLES, batch_size=5, reference=reference, show=False, **LIMITS
            )
        found.append((table.drop(columns=["looping", "distinct_4grams"]), list(errors.scores(100, 0))))
    pd.testing.assert_frame_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][1][0][1].value > 0
