"""``mcsmoe recover``: a pruned model is trained nearer to the full one, and only where it was asked to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import refused, run
from torch import Tensor

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.methods import HEALED


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    mcsmoe.save(tiny_models.model("qwen2_moe").to(torch.bfloat16), folder / "full")
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 96, (16,), generator=generator).tolist()} for _ in range(40)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = ("--calibration", folder / "text.jsonl")
    run("prune", folder / "full", "--experts", 4, *text, "--out", folder / "pruned")
    run("prune", folder / "full", "--experts", 4, *text, "--dropped", "constant", "--out", folder / "novices")
    return folder


def state(folder: Path) -> dict[str, Tensor]:
    return dict(mcsmoe.load(folder).state_dict())


def distance(folder: Path, full: Path) -> float:
    models: list[Any] = [mcsmoe.load(one).float() for one in (full, folder)]
    ids = torch.randint(2, 96, (8, 16), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        own, other = (model(input_ids=ids).logits.log_softmax(-1) for model in models)
    return float((own.exp() * (own - other)).sum(-1).mean())


@pytest.mark.parametrize(("what", "start"), [*((what, "pruned") for what in HEALED), ("experts", "novices")])
def test_what_is_asked_for_is_trained_and_nothing_else(what: str, start: str, place: Path, tmp_path: Path) -> None:
    given = ("--teacher", place / "full", "--text", place / "text.jsonl", "--batch-size", 8, "--steps", 12)
    run(
        "recover",
        place / start,
        *given,
        "--train",
        what,
        "--learning-rate",
        5e-3 if what == "all" else 2e-2,
        "--out",
        tmp_path / "healed",
    )
    before, after = state(place / start), state(tmp_path / "healed")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    model = mcsmoe.load(place / start)
    routers = set(adapter_for(model).router_parameters(model))
    experts = {name for name in before if ".experts." in name}
    allowed = {"routers": routers, "experts": experts, "all": set(before)}.get(what, set(before) - routers - experts)
    assert changed
    assert changed <= allowed
    if what == "adapters":
        assert all(before[name].ndim == 2 for name in changed)
        assert "lm_head.weight" not in changed
    assert distance(tmp_path / "healed", place / "full") < distance(place / start, place / "full")
    for file in ("groups.parquet", "experts.json"):
        assert (tmp_path / "healed" / file).read_bytes() == (place / start / file).read_bytes()


def test_without_a_gain_on_held_out_rows_the_weights_stay(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("--teacher", place / "full", "--text", place / "text.jsonl", "--batch-size", 8, "--steps", 2)
    run("recover", place / "pruned", *given, "--train", "all", "--learning-rate", 5, "--out", tmp_path / "healed")
    before, after = state(place / "pruned"), state(tmp_path / "healed")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "the weights stay as they were" in caplog.text


def test_what_cannot_be_healed_is_refused(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mcsmoe.save(tiny_models.model("qwen3_moe", vocab_size=90), tmp_path / "other")
    given = ["recover", place / "pruned", "--text", place / "text.jsonl", "--out", tmp_path / "out"]
    teacher = ["--teacher", place / "full"]
    for words, message in (
        (["--teacher", tmp_path / "other"], "has another vocabulary; give the model that it came from"),
        ([*teacher, "--steps", 0], "steps is 0; it must be at least 1"),
        ([*teacher, "--learning-rate", 0], "--learning-rate is 0.0; it must be a number above 0"),
        ([*teacher, "--batch-size", 64], "gives one batch, of which none could be held out; lower --batch-size"),
    ):
        assert message in refused(caplog, *given, *words)
    assert not (tmp_path / "out").exists()
