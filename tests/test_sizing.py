"""A size is asked for: experts and bits are found, and what is written has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import refused, run

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.tensors import TensorFolder
from mcsmoe.calibration.files import load_statistics
from mcsmoe.calibration.layer_major import DomainBatch, Options
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.compress.novices import fit_affine
from mcsmoe.compress.quantise import dequantise, quantise
from mcsmoe.transform.in_sequence import Texts
from mcsmoe.transform.layers import ModelLayers, SparseLayer
from mcsmoe.transform.novices import expert_outputs
from mcsmoe.transform.on_disk import CheckpointLayers
from mcsmoe.transform.sizing import Sizes, rounding_errors
from mcsmoe.transform.sizing_novices import CONSTANT, remainders

WIDE = {"hidden_size": 32, "moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizing")
    mcsmoe.save(tiny_models.model("qwen3_moe", **WIDE).to(torch.bfloat16), folder / "full")
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 96, (11,), generator=generator).tolist()} for _ in range(20)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run("collect", folder / "full", "--calibration", folder / "text.jsonl", "--out", folder / "statistics")
    return folder


def bytes_of(folder: Path) -> int:
    return sum(info.nbytes for info in TensorFolder(folder).infos.values())


@pytest.mark.parametrize("share", [0.95, 0.7, 0.6])
def test_the_result_has_the_size_that_was_foretold(share: float, place: Path, tmp_path: Path) -> None:
    target = int(share * bytes_of(place / "full"))
    given = ["prune", place / "full", "--statistics", place / "statistics", "--target-size", target, "--group-size", 32]
    run(*given, "--out", tmp_path / "out")
    page = json.loads((tmp_path / "out" / "sizes.json").read_text())
    table = page["alternatives"]
    assert page["target"] == target
    assert [row["error"] for row in table] == sorted(row["error"] for row in table)
    assert all(row["bytes"] <= target for row in table)
    assert {row["bits"] for row in table} == {None, 4, 8}
    assert bytes_of(tmp_path / "out") == table[0]["bytes"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= target
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    experts = config.get("num_experts", config.get("num_local_experts"))
    assert experts == table[0]["experts"]
    assert ("quantization_config" in config) == (table[0]["bits"] is not None)
    for row in table:  # each alternative is as large as the command makes it
        bits = [] if row["bits"] is None else ["--bits", row["bits"], "--group-size", 32]
        again = ["--experts", row["experts"], "--statistics", place / "statistics", *bits, "--overwrite"]
        run("prune", place / "full", *again, "--out", tmp_path / "again")
        assert bytes_of(tmp_path / "again") == row["bytes"]
        break


def test_layers_may_differ(place: Path, tmp_path: Path) -> None:
    target = int(0.7 * bytes_of(place / "full"))
    given = ["prune", place / "full", "--statistics", place / "statistics", "--target-size", target]
    run(*given, "--budget", "predicted", "--out", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "sizes.json").read_text())["alternatives"]
    assert (row["budget"], row["bits"], row["rounded"]) == ("predicted", None, 0)
    assert bytes_of(tmp_path / "out") <= target


def test_rounding_is_measured_on_the_tokens_of_each_expert(place: Path) -> None:
    model = mcsmoe.load(place / "full").float()
    adapter = adapter_for(model)
    (name, *_) = adapter.layers(model)
    layer = SparseLayer(model, adapter, name)
    statistics = load_statistics(place / "statistics").layers[name]
    found = rounding_errors(layer, statistics, [4, 8], 32)
    weights = layer.read_experts()
    for bits in (4, 8):
        coarse = weights.map(lambda _, t, b=bits: torch.stack([dequantise(*quantise(one, b, 32)) for one in t]))
        for expert, (inputs, gates) in enumerate(zip(statistics.tokens(), statistics.gates(), strict=True)):
            exact, rough = (
                one.output(expert, one.hidden(expert, inputs.float(), layer.activation)) for one in (weights, coarse)
            )
            wanted = float(((rough - exact).double() * gates.double()[:, None]).square().sum())
            wanted *= float(statistics.computed_E[expert]) / max(1, len(inputs))
            assert float(found[bits][expert]) == pytest.approx(wanted, rel=1e-4)
    assert bool((found[8] < found[4] / 50).all())
    assert ModelLayers(model, adapter).ids[0] == name


def test_sizes_add_up_to_the_checkpoint(place: Path) -> None:
    source = Streamed(place / "full")
    sizes = Sizes.of(CheckpointLayers(source), bytes_of(place / "full"), 1000, 32, (4,))
    every = dict.fromkeys(source.layers, 6)
    assert sizes.bytes(every, None) == bytes_of(place / "full")
    assert sizes.bytes(every, 4) < 0.6 * bytes_of(place / "full")


def test_what_has_no_size_is_refused(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = ["prune", place / "full", "--statistics", place / "statistics", "--out", tmp_path / "out"]
    for words, message in (
        (["--target-size", "1GB", "--experts", 3], "leave out --experts and --remove"),
        (["--target-size", "1GB", "--dropped", "redirect"], "no error of --dropped redirect; take delete, constant,"),
        (["--target-size", "1GB", "--dropped", "auto"], "--dropped auto is fitted to tokens: give --calibration FILE"),
        (["--experts", 3, "--dropped", "auto"], "--dropped auto is of --target-size, which is not given"),
        (["--target-size", "1GB", "--budget", "adaptive"], "take --budget uniform, predicted or auto"),
        (["--target-size", "1GB", "--budget", "predicted", "--bits", 4], "--bits 4 packs a stock checkpoint"),
        (["--target-size", 1000], "nothing comes down to 0.000 GB: the least is 0.0"),
    ):
        assert message in refused(caplog, *given, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dropped", "budget"), [("auto", "auto"), ("affine", "uniform"), ("constant", "predicted")])
def test_novices_are_among_the_ways(dropped: str, budget: str, place: Path, tmp_path: Path) -> None:
    target = int(0.75 * bytes_of(place / "full"))
    given = [
        "prune",
        place / "full",
        "--calibration",
        place / "text.jsonl",
        "--target-size",
        target,
        "--budget",
        budget,
    ]
    run(*given, "--dropped", dropped, "--group-size", 32, "--out", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "sizes.json").read_text())["alternatives"]
    assert [row["error"] for row in table] == sorted(row["error"] for row in table)
    ranks = {row["rank"] for row in table if row["dropped"] == "affine"}
    assert ranks == (set() if dropped == "constant" else {4, 16})
    kinds = {row["dropped"] for row in table}
    assert kinds == ({"delete", "constant", "affine"} if dropped == "auto" else {dropped})
    assert bytes_of(tmp_path / "out") == table[0]["bytes"] <= target
    stock = tmp_path / "out" / "provenance.json"  # a compact result says it in its configuration
    told = json.loads((stock if stock.exists() else tmp_path / "out" / "config.json").read_text())
    settings = told.get("mcsmoe", {}).get("provenance", told)["settings"]
    assert (settings["dropped"], settings["rank"]) == (table[0]["dropped"], table[0]["rank"] or 16)
    for row in table if dropped == "auto" else ():  # each way is as large as the command makes it
        if row["dropped"] == "delete" or row["budget"] != "uniform":
            continue
        more = ["--experts", row["experts"], "--dropped", row["dropped"], "--rank", row["rank"] or 1, "--overwrite"]
        run("prune", place / "full", "--calibration", place / "text.jsonl", *more, "--out", tmp_path / "again")
        assert bytes_of(tmp_path / "again") == row["bytes"]


def test_the_error_of_novices_is_what_they_leave_on_held_out_tokens(place: Path, tmp_path: Path) -> None:
    """Independent truth: every set of experts of a layer, its outputs in float64, one token after another."""
    source = Streamed(place / "full")
    rows = [json.loads(line)["input_ids"] for line in (place / "text.jsonl").read_text().splitlines()]
    ids = torch.tensor(rows)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    texts = Texts([DomainBatch("all", batch)])
    found = remainders(place / "full", texts, [CONSTANT, 4], Options(reservoir=4), tmp_path / "work")
    model = mcsmoe.load(place / "full")
    adapter = adapter_for(model)
    (name, *_) = adapter.layers(model)
    weights, activation = adapter.read_experts(model, name), adapter.activation(model, name)
    with adapter.capture(model) as seen, torch.no_grad():
        model(**batch)
    routed, row_T = seen.batches[name], torch.arange(ids.numel()) // ids.shape[1]
    held_T = row_T % 10 == 9
    for rank in (CONSTANT, 4):
        gram = torch.zeros(6, 6, dtype=torch.float64)
        pieces: dict[int, torch.Tensor] = {}
        for expert in range(6):
            here_TK = routed.chosen_TK == expert
            mine_T = here_TK.any(dim=1)
            gate_T = (routed.weights_TK.double() * here_TK).sum(dim=1)
            given = expert_outputs(weights, expert, routed.inputs_TD, activation)
            fitted = mine_T & ~held_T
            if rank:
                pairs = [(routed.inputs_TD[fitted], given[fitted], gate_T[fitted].square())]
                constant, u, v = fit_affine(pairs, rank, weights.d_model)
                answer = constant + routed.inputs_TD.double() @ v.T @ u.T
            else:
                answer = given[fitted].double().mean(dim=0).expand(len(given), -1)
            left = (given.double() - answer) * gate_T[:, None] * (mine_T & held_T)[:, None]
            pieces[expert] = left
        for one in range(6):
            for other in range(6):
                gram[one, other] = (pieces[one] * pieces[other]).sum() * len(held_T) / held_T.sum()
        outputs = found[name][rank].outputs
        assert outputs is not None
        torch.testing.assert_close(outputs.gram_EE, gram, rtol=2e-2, atol=2e-3 * float(gram.diagonal().max()))
    assert source.layers[0] == name
