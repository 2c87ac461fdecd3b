"""Everything that ``mcsmoe prune`` can do goes with everything else, or is refused before any work."""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import refused, run

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.methods import AUTO, DROPPED, PRUNING_BUDGETS

CHOICES: dict[str, tuple[str, ...]] = {
    "--criterion": ("gram", AUTO),  # test_criteria has them all
    "--dropped": DROPPED,
    "--budget": (*PRUNING_BUDGETS, AUTO),
    "--refit": ("no", "yes", "stream"),
    "--bits": ("no", "4", "8"),
    "from": ("text", "statistics"),
}
Combination = tuple[str, ...]


def impossible(one: Combination) -> str | None:
    """What the command says of a combination that cannot be; None where it can."""
    criterion, dropped, budget, refit, bits, given = one
    if given == "statistics" and refit != "no":
        return "--refit solves on tokens"
    if given == "statistics" and dropped in ("constant", "affine"):
        return f"--dropped {dropped} is fitted to tokens"
    if bits != "no" and (dropped != "delete" or budget != "uniform"):
        return f"--bits {bits} packs a stock checkpoint"
    if given == "statistics" and AUTO in (criterion, budget):
        return "give --calibration FILE, not --statistics alone"
    return None


EVERY = list(product(*CHOICES.values()))
POSSIBLE = [one for one in EVERY if impossible(one) is None]


def covering() -> list[Combination]:
    """Few combinations in which every two choices that go together do so: greedily, the most new pairs first."""

    def pairs(one: Combination) -> set[tuple[int, str, int, str]]:
        return {(i, one[i], j, one[j]) for i, j in combinations(range(len(one)), 2)}

    missing = {pair for one in POSSIBLE for pair in pairs(one)}
    chosen = []
    while missing:
        best = max(POSSIBLE, key=lambda one: len(pairs(one) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composition")
    wide = {"hidden_size": 32, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}
    mcsmoe.save(tiny_models.model("qwen3_moe", **wide), folder / "full")
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 96, (11,), generator=generator).tolist()} for _ in range(20)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run("collect", folder / "full", "--calibration", folder / "text.jsonl", "--out", folder / "statistics")
    return folder


def words(one: Combination, place: Path, out: Path) -> list[object]:
    made: list[object] = ["prune", place / "full", "--experts", 3, "--rank", 4, "--out", out]
    for option, value in zip(CHOICES, one, strict=True):
        if option == "from":
            made += (
                ["--calibration", place / "text.jsonl"] if value == "text" else ["--statistics", place / "statistics"]
            )
        elif value == "stream":
            made += ["--refit", "--refit-target", "stream"]
        elif value != "no":
            made += [option] if value == "yes" else [option, value]
    return made


@pytest.mark.parametrize("one", covering(), ids=" ".join)
def test_what_goes_together_gives_a_model(one: Combination, place: Path, tmp_path: Path) -> None:
    run(*words(one, place, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = [
        len(layer["kept"]) for layer in json.loads((tmp_path / "out" / "experts.json").read_text())["layers"].values()
    ]
    assert sum(kept) == 6
    assert ("quantization_config" in config) == (one[4] != "no")
    assert (tmp_path / "out" / "candidates.json").exists() == (AUTO in one)
    if one[4] != "no":
        return  # read in test_quantise
    model = mcsmoe.load(tmp_path / "out")
    adapter = adapter_for(model)
    assert [adapter.read_experts(model, layer).num_experts for layer in adapter.layers(model)] == kept
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=tiny_models.batch()["input_ids"]).logits).all())


def test_what_does_not_is_refused_before_any_work(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_given: object, **_more: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("mcsmoe.calibration.layer_major.LayerMajor.blocks", work)
    monkeypatch.setattr("mcsmoe.checkpoint.streaming.Streamed.rewrite", work)
    # One of each kind of reason and each criterion and budget it can be met with is enough.
    seen = set()
    for one in EVERY:
        said = impossible(one)
        if said is None or (said, one[2]) in seen:
            continue
        seen.add((said, one[2]))
        assert said in refused(caplog, *words(one, place, tmp_path / "out")), one
    assert not (tmp_path / "out").exists()
