"""Tokens whose target is the whole model's residual stream, against models in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import every_family
import pytest
import tiny_models
import tiny_switch
import torch
from command_line import refused, run
from torch import Tensor, nn

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options
from mcsmoe.calibration.passes import routing_inputs
from mcsmoe.calibration.replay import block_of
from mcsmoe.calibration.states import States
from mcsmoe.calibration.streams import stream_factor
from mcsmoe.checkpoint.streaming import Streamed

FAMILIES = ["qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v3", "switch"]


def built(family: str) -> nn.Module:
    if family == "granitemoe":
        return tiny_models.model(family, residual_multiplier=0.25)
    return tiny_switch.model() if family == "switch" else tiny_models.model(family)


def halve(model: Any, layer: str) -> None:
    adapter = adapter_for(model)
    adapter.write_experts(model, layer, adapter.read_experts(model, layer).map(lambda _, tensor: tensor * 0.5))


def streams(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """By layer, what its block returns."""
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, Tensor] = {}
    hooks = []
    for layer in adapter_for(model).layers(model):
        block = block_of(layer, lists)
        assert block is not None

        def seen(_module: Any, _inputs: Any, output: Any, layer: str = layer) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        hooks.append(model.get_submodule(block).register_forward_hook(seen))
    with torch.no_grad():
        model(**routing_inputs(model, batch), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def targets(folder: Path, work: Path, batch: dict[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """By layer the targets of all its tokens, those held out included, every layer halved once it was seen."""
    beside = States(work / "whole", 0) if whole else None
    given = [DomainBatch("all", batch)]
    major = LayerMajor(Streamed(folder), given, States(work / "own", 0), Options(reservoir=2), whole=beside)
    found: dict[str, Tensor] = {}

    def reduce(layer: str, _statistics: Any, tokens: Any) -> None:
        found[layer] = torch.cat([one.target_TD for one in tokens.batches()])
        halve(major.source.model, layer)

    with major.open():
        for _ in major.blocks(reduce):
            pass
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_makes_up_for_what_the_stream_lacks(family: str, tmp_path: Path) -> None:
    """Independent truth: the whole model, and one whose earlier layers are halved, in memory with hooks."""
    model = built(family)
    # Without padding every position is a token, in the order of the batch.
    batch = tiny_switch.batch(rows=2, length=9) if family == "switch" else tiny_models.batch(rows=1, length=40)
    model.save_pretrained(tmp_path / "full")
    whole = streams(model, batch)
    plain = targets(tmp_path / "full", tmp_path / "plain", batch, whole=False)
    towards = targets(tmp_path / "full", tmp_path / "towards", batch, whole=True)
    factor = 0.25 if family == "granitemoe" else 1.0
    layers = adapter_for(model).layers(model)
    if family == "switch":
        layers = [layer for layer in layers if layer.startswith("encoder")]
    for number, layer in enumerate(layers):
        before = streams(model, batch)[layer]
        missing = ((whole[layer] - before) / factor).reshape(-1, before.shape[-1])
        if family == "switch":
            missing = missing[batch["attention_mask"].flatten().bool()]
        assert (float(missing.abs().max()) > 1e-3) == (number > 0)
        torch.testing.assert_close(towards[layer] - plain[layer], missing, rtol=1e-3, atol=2e-5)
        halve(model, layer)


def test_a_layer_that_is_not_added_as_it_is_has_no_factor() -> None:
    torch.manual_seed(0)
    inner, norm, given = nn.Linear(8, 8), nn.LayerNorm(8), torch.randn(20, 8)
    ways: dict[str, Callable[[], Any]] = {
        "as it is": lambda: given + inner(given),
        "with a factor": lambda: (given - 0.3 * inner(given), None),
        "through a norm": lambda: given + norm(inner(given)),
        "not at all": lambda: given,
        "of another width": lambda: inner(given)[:, :4],
    }
    with torch.no_grad():
        assert stream_factor("x", inner, ways["as it is"], 20, 8) == pytest.approx(1)
        assert stream_factor("x", inner, ways["with a factor"], 20, 8) == pytest.approx(-0.3)
        for name in ("through a norm", "not at all", "of another width"):
            with pytest.raises(ValueError, match=r"layer 'x': .*refit towards the layer"):
                stream_factor("x", inner, ways[name], 20, 8)
    assert not inner._forward_hooks


def test_a_model_without_one_stream_is_refused(tmp_path: Path) -> None:
    odd = every_family.build("inkling2_text", "Inkling2ForCausalLM")
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.mlp': .*refit towards the layer"):
        targets(tmp_path / "odd", tmp_path / "work", every_family.inputs_of(odd), whole=True)
    tiny_models.model("qwen3_moe").save_pretrained(tmp_path / "full")
    given = [DomainBatch("all", tiny_models.batch())]
    beside = States(tmp_path / "whole", 0)
    major = LayerMajor(Streamed(tmp_path / "full"), given, States(tmp_path / "own", 0), Options(), whole=beside)
    major.replay.lasting.add("model.layers.0")
    with major.open(), pytest.raises(ValueError, match=r"\(model\.layers\.0\) are read by more than the next one"):
        list(major.blocks(lambda *_: None))


def test_a_target_without_a_refit_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_models.model("qwen3_moe").save_pretrained(tmp_path / "full")
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [2, 3, 4]}\n')
    words = [
        "prune",
        tmp_path / "full",
        "--calibration",
        tmp_path / "rows.jsonl",
        "--experts",
        3,
        "--out",
        tmp_path / "o",
    ]
    assert "--refit-target stream is of the refit" in refused(caplog, *words, "--refit-target", "stream")
    run(*words, "--refit-target", "stream", "--refit")
    assert '"refit_target": "stream"' in (tmp_path / "o" / "provenance.json").read_text()
