"""What people put around a model: pipelines, compilers, caches, accelerate. And why the compact form is no quantiser's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibration_text import tokenizer
from test_checkpoint_faithful import merge
from tiny_models import batch, logits, model

import mcsmoe
from mcsmoe.checkpoint.streaming import Streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("around")
    mcsmoe.save(model("qwen3_moe"), place / "model", tokenizer=tokenizer())
    merge(Streamed(place / "model"), place / "merged", groups=3)
    return place / "merged"


@pytest.fixture(scope="module")
def merged(folder: Path) -> Any:
    return mcsmoe.load(folder)


def test_a_pipeline_generates_what_the_model_does(folder: Path, merged: Any) -> None:
    from transformers import pipeline

    made = pipeline("text-generation", model=str(folder), device="cpu")
    given = made.tokenizer("counts", return_tensors="pt")
    expected = merged.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
    (answer,) = made("counts", max_new_tokens=4, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == made.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_static_cache_gives_the_same_tokens(merged: Any) -> None:
    ids = batch()["input_ids"][:1]
    usual, static = (merged.generate(ids, max_new_tokens=5, do_sample=False, **how) for how in CACHES)
    assert torch.equal(usual, static)


CACHES: tuple[dict[str, str], ...] = ({}, {"cache_implementation": "static"})


def test_compiled_a_merged_layer_gives_the_same(merged: Any) -> None:
    """By tracing alone, which is where a model fails; how the pieces are then compiled is torch's own."""
    torch._dynamo.reset()
    layer, states = merged.model.layers[0].mlp, torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager")(states), layer(states))
    torch._dynamo.reset()


def test_accelerate_prepares_it_and_what_it_unwraps_is_saved(folder: Path, merged: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(mcsmoe.load(folder))
    assert torch.equal(logits(prepared, batch()), logits(merged, batch()))
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path / "out")
    assert torch.equal(logits(mcsmoe.load(tmp_path / "out"), batch()), logits(merged, batch()))


def test_offloaded_to_disk_it_gives_the_same(folder: Path, merged: Any, tmp_path: Path) -> None:
    from accelerate import disk_offload

    far = disk_offload(mcsmoe.load(folder), tmp_path / "far", execution_device=torch.device("cpu"))
    assert torch.equal(logits(far, batch()), logits(merged, batch()))


def test_a_quantiser_that_is_not_known_is_passed_over_and_not_refused() -> None:
    """So a ``quant_method`` of our own would let readers without the project start experts at random."""
    from transformers.quantizers.auto import AutoHfQuantizer

    assert AutoHfQuantizer.supports_quant_method({"quant_method": "mcsmoe"}) is False
