"""Decoder-only models built from scratch: their sizes, their tokenizer, and batches of next tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.train.decoder import FAMILIES, NextToken, build_decoder, train_byte_tokenizer
from mcsmoe.train.objectives import TaskObjective
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow.consistency import layer_names
from mcsmoe.workflow.schema import fill, section

SIZES = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 12,
    "num_heads": 2,
    "num_layers": 3,
    "num_experts": 5,
    "experts_per_token": 2,
}
TEXTS = ["def f(x):\n    return  x\n", "Ünïcode — text\t\n\n", "a  b   c"] * 5


def architecture(family: str) -> dict[str, Any]:
    return fill({**SIZES, "family": family}, section("model")["architecture"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_sizes_asked_for_and_learns(family: str) -> None:
    model = build_decoder(architecture(family), 50, 64, seed=0, end=1, pad=0)
    again = build_decoder(architecture(family), 50, 64, seed=0, end=1, pad=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.config.model_type == family
    adapter: Any = adapter_for(model)
    layers = adapter.layers(model)
    assert layers == layer_names(architecture(family))
    assert [adapter.num_experts(model, layer) for layer in layers] == [5, 5, 5]
    weights = adapter.read_experts(model, layers[0])
    assert (weights.d_model, weights.width) == (16, 12)

    batch = NextToken(np.arange(400) % 50, 8, 4, seed=0).batch(0)
    objective = TaskObjective(adapter, 0.1)
    terms = objective(model, batch, objective.prepare(batch))
    logits = model(input_ids=batch["input_ids"]).logits
    wanted = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"
    )
    last = functional.cross_entropy(logits[:, -1], batch["labels"][:, -1], reduction="sum")
    assert float(terms["task_loss"]) == pytest.approx(float(wanted + last) / 32, rel=1e-5)
    assert float(terms["balance_loss"]) > 0
    terms["loss"].backward()
    assert all(torch.isfinite(one.grad).all() for one in model.parameters() if one.grad is not None)


def test_batches_are_windows_with_the_token_after_each() -> None:
    stream = np.arange(103)
    batches = NextToken(stream, window=10, batch_size=2, seed=3)
    assert (batches.windows, batches.steps_per_epoch) == (10, 5)
    seen = []
    for step in range(5):
        batch = batches.batch(step)
        assert torch.equal(batch["labels"], batch["input_ids"] + 1)
        seen += batch["input_ids"].flatten().tolist()
    assert len(set(seen)) == 100
    assert torch.equal(batches.batch(7)["input_ids"], NextToken(stream, 10, 2, 3).batch(7)["input_ids"])
    with pytest.raises(ValueError, match="the corpus has 103 tokens"):
        NextToken(stream, window=60, batch_size=2, seed=0)


def test_tokens_over_bytes_are_the_text_whatever_it_is() -> None:
    tokenizer = train_byte_tokenizer(TEXTS, 280)
    for text in [*TEXTS[:3], "日本 \r\n\t  x", "<div>  </div>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    with pytest.raises(ValueError, match="vocab_size is 200"):
        train_byte_tokenizer(TEXTS, 200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 9}, "experts_per_token is 9, but model.architecture.num_experts only 5"),
        ({"num_heads": 3}, "heads of a decoder-only model share the width"),
        ({"d_kv": 5}, "share the width in even parts"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration.complete(_config(change), check_data=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"variants": ["full", "dense"]}, "no dense model is built like one of family 'qwen3_moe'"),
        ({"variants": ["full", "reap"], "experts": [1]}, "a token takes 2 experts and reap leaves no more than 1"),
        ({"model": {"architecture": {**SIZES, "family": "gpt"}}}, "use one of switch, qwen3_moe, olmoe"),
        ({"merge": {"exclude_layers": ["decoder.block.1.layer.2.mlp"]}}, "model.layers.0.mlp"),
    ],
)
def test_methods_that_it_cannot_have_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration.complete(_config({}) | more, check_data=False)


def _config(change: dict[str, int]) -> dict[str, Any]:
    return {
        "tasks": ["Language"],
        "variants": ["full", "msmoe"],
        "experts": [2],
        "model": {"architecture": {**SIZES, "family": "qwen3_moe", **change}, "tokenizer": {"vocab_size": 500}},
    }
