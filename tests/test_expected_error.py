"""What calibration lets expect of a layer is what it loses: on the same tokens to the last digits, gates as they were."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.atomic import write_json
from mcsmoe.calibration.layer_errors import LayerErrors
from mcsmoe.calibration.layer_major import DomainBatch, Options
from mcsmoe.checkpoint.lineage import EXPECTED, PROVENANCE, expected_errors
from mcsmoe.checkpoint.load import load_model
from mcsmoe.statistics.outputs import OutputSums
from mcsmoe.transform import expected_error
from mcsmoe.transform.in_sequence import Texts, reduced_in_sequence
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.reduce import Pruning, Reduced, Reduction
from mcsmoe.transform.refit import RefitReport, Refitting
from mcsmoe.transform.unfinished import Unfinished

BATCHES = [{"input_ids": torch.randint(2, 96, (5, 12), generator=torch.Generator().manual_seed(n))} for n in range(4)]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected") / "full"
    tiny_models.model("qwen3_moe", num_hidden_layers=3).save_pretrained(folder)
    return folder


def reduced(full: Path, work: Path, how: Pruning, refitting: Refitting | None = None) -> dict[str, Reduced]:
    """Every layer reduced to half of its experts, as a stopped run would find them again."""
    layers = tiny_layers(full)
    kept = {layer: experts // 2 for layer, experts in layers.items()}
    run = Unfinished(work, {}, 2**20, True, refitting is not None and refitting.target == "stream")
    texts = Texts([DomainBatch("", batch) for batch in BATCHES])
    made = list(reduced_in_sequence(full, texts, Reduction(how, refitting), kept, Options(), run))
    assert [layer for layer, _ in made] == list(layers)
    for layer, one in made:
        assert run.get(layer).expected == one.expected
    found = {layer: run.get(layer) for layer in layers}
    run.close()
    return found


def tiny_layers(full: Path) -> dict[str, int]:
    model = load_model(full)
    adapter = adapter_for(model)
    return {layer: adapter.num_experts(model, layer) for layer in adapter.layers(model)}


def measured(full: Path, made: dict[str, Reduced]) -> dict[str, float]:
    """The same by hooks on both models, on the calibration tokens."""
    reference, model = load_model(full), load_model(full)
    for layer, one in made.items():
        one.install(SparseLayer(model, adapter_for(model), layer))
    errors = LayerErrors(model, reference)
    with errors.watching(), torch.no_grad():
        for batch in BATCHES:
            reference(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    return {name.partition("/")[2]: score.value for name, score in errors.scores(10, 0)}


@pytest.mark.parametrize(("dropped", "rank"), [("constant", 1), ("affine", 2)])
def test_where_gates_stay_it_is_what_the_layer_loses(dropped: str, rank: int, full: Path, tmp_path: Path) -> None:
    made = reduced(full, tmp_path / "work", Pruning("gram", dropped, rank))
    found = measured(full, made)
    first, second = made
    assert found[first] == pytest.approx(made[first].expected, rel=1e-3)
    # A later layer was reduced on what the reduced one before it gives, and is measured on the full model's inputs.
    assert found[second] == pytest.approx(made[second].expected, rel=0.5)


def test_a_router_that_shares_out_anew_loses_otherwise(full: Path, tmp_path: Path) -> None:
    made = reduced(full, tmp_path / "work", Pruning("gram"))
    found = measured(full, made)
    assert all(one.expected is not None and one.expected > 0 for one in made.values())
    assert found[next(iter(made))] != pytest.approx(next(iter(made.values())).expected, rel=1e-3)


def test_a_refit_is_expected_to_lose_what_it_does_on_held_out_tokens(full: Path, tmp_path: Path) -> None:
    made = reduced(full, tmp_path / "work", Pruning("gram"), Refitting())
    first = next(iter(made))
    report = made[first].refit
    assert report is not None
    assert made[first].expected == pytest.approx(report.held_after * scale(full, first), rel=1e-4)


def test_a_refit_that_is_not_kept_changes_nothing() -> None:
    """Closed form: the error on held-out tokens, as a share of what the layer gives, is one of the stream behind it."""
    outputs = OutputSums.measured(torch.ones(6, 1, 4), torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), 2)
    outputs = replace(outputs, stream_square_sum=torch.tensor(48.0, dtype=torch.float64))
    statistics: Any = SimpleNamespace(outputs=outputs)
    for kept, error in ((True, 0.1), (False, 0.3)):
        report = RefitReport(0.2, 0.05, 0.3, 0.1, 0.01, kept)
        # Six tokens whose outputs have the square 4, before streams whose squares sum to 48.
        assert expected_error.of_refit(report, "layer", statistics) == pytest.approx(error * 24 / 48)
        assert expected_error.of_refit(report, "stream", statistics) is None
        assert expected_error.of_refit(replace(report, shared="mlp.shared"), "layer", statistics) is None


def test_where_nothing_tells_it_nothing_is_said(full: Path, tmp_path: Path) -> None:
    redirected = reduced(full, tmp_path / "one", Pruning("gram", "redirect"))
    towards_the_stream = reduced(full, tmp_path / "two", Pruning("gram"), Refitting(target="stream"))
    by_score = reduced(full, tmp_path / "three", Pruning("reap", "constant"))
    for made in (redirected, towards_the_stream, by_score):
        assert [one.expected for one in made.values()] == [None, None]


@pytest.mark.parametrize("told", [{"model.layers.0.mlp": 0.25}, {}, "much", {"model.layers.0.mlp": "much"}])
def test_a_checkpoint_says_it_again(told: object, full: Path, tmp_path: Path) -> None:
    shutil.copytree(full, tmp_path / "made")
    write_json(tmp_path / "made" / PROVENANCE, {"stage": "reduce", EXPECTED: told})
    assert expected_errors(tmp_path / "made") == (told if told == {"model.layers.0.mlp": 0.25} else {})


def scale(full: Path, layer: str) -> float:
    """Energy of what the full model's layer gives over that of the stream behind it, on all tokens."""
    model = load_model(full)
    seen: dict[str, float] = {}
    block = model.get_submodule(layer.rpartition(".")[0])

    def add(name: str, given: object) -> None:
        tensor = given if isinstance(given, torch.Tensor) else given[0]  # type: ignore[index]
        seen[name] = seen.get(name, 0.0) + float(tensor.double().square().sum())

    model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: add("layer", output))
    block.register_forward_hook(lambda _m, _i, output: add("stream", output))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    return seen["layer"] / seen["stream"]
