"""Costs against closed forms: parameters, FLOPs of known layers, memory of a fresh process, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny_models
import tiny_switch
import torch
from torch import nn

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.tables import SCHEMAS
from mcsmoe.evaluate import cost
from mcsmoe.types import Novices
from mcsmoe.workflow import forkserver

ROOT = Path(__file__).resolve().parents[1]

SETTINGS = cost.Settings(batch_size=3, input_tokens=7, label_tokens=4, threads=1, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("a checkpoint") / "full"
    tiny_switch.model().save_pretrained(path)
    return path


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_with_novices_is_measured(rank: int, tmp_path: Path) -> None:
    """A constant novice costs nothing but its sum, one of rank r two thin products; the layer is counted beside the full one."""
    model = tiny_models.model("qwen3_moe").eval()
    adapter = adapter_for(model)
    layer = adapter.layers(model)[0]
    experts, width = adapter.num_experts(model, layer), model.config.hidden_size
    inputs = cost.batch(model, SETTINGS)
    with torch.no_grad():
        before = cost.count_flops(lambda: model(**inputs))
        with adapter.capture(model) as captured:
            model(**inputs)
    by_novices = int((captured.batches[layer].chosen_TK != 0).sum())
    weights = adapter.read_experts(model, layer).select(torch.arange(1))
    factors = (torch.randn(experts - 1, width, rank), torch.randn(experts - 1, rank, width)) if rank else (None, None)
    novices = Novices(torch.randn(experts - 1, width), *factors)
    adapter.write_novices(model, layer, weights, torch.arange(experts), novices)
    mcsmoe.save(model, tmp_path / "made")
    found = cost.measure_here(tmp_path / "made", SETTINGS, 1, lambda: mcsmoe.load(tmp_path / "made"))
    expert, novice = 3 * 2 * width * model.config.moe_intermediate_size, 2 * 2 * width * rank
    assert by_novices > 0
    assert found["flops"] == before - by_novices * (expert - novice)


def test_flops_of_a_linear_layer_are_the_closed_form() -> None:
    layer = nn.Linear(24, 40)
    assert cost.count_flops(lambda: layer(torch.randn(5, 24))) == 2 * 5 * 24 * 40


def test_flops_of_cpu_attention_and_grouped_products_are_counted() -> None:
    query = torch.randn(2, 3, 8, 16)
    attention = cost.count_flops(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    assert attention == 2 * (2 * 2 * 3 * 8 * 8 * 16)
    rows, weight = torch.randn(8, 16), torch.randn(3, 16, 24)
    ends = torch.tensor([3, 5, 8], dtype=torch.int32)
    assert cost.count_flops(lambda: torch._grouped_mm(rows, weight, offs=ends)) == 2 * 8 * 16 * 24


def test_flops_of_a_switch_model_are_the_closed_form() -> None:
    model = tiny_switch.model()
    inputs = cost.batch(model, SETTINGS)
    with torch.inference_mode():
        counted = cost.count_flops(lambda: model(**inputs))
    config = model.config
    b, s, t = SETTINGS.batch_size, SETTINGS.input_tokens, SETTINGS.label_tokens
    d, f, e, inner = config.d_model, config.d_ff, config.num_experts, config.num_heads * config.d_kv

    def attention(queries: int, keys: int) -> int:
        projections = 2 * b * d * inner * (2 * queries + 2 * keys)
        return projections + 2 * (2 * b * queries * keys * inner)

    def feed_forward(tokens: int, sparse: bool) -> int:
        # Each token goes through one expert (no capacity is reached here) and the router.
        return b * tokens * (2 * 2 * d * f + (2 * d * e if sparse else 0))

    expected = sum(attention(s, s) + feed_forward(s, block in (1, 3)) for block in range(config.num_layers))
    expected += sum(attention(t, t) + attention(t, s) + feed_forward(t, True) for _ in range(config.num_decoder_layers))
    expected += 2 * b * t * d * config.vocab_size
    assert counted == expected


def test_tied_parameters_count_once_and_zeros_are_told_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
            self.second.weight = self.first.weight
            self.first.weight.data.fill_(1.0)
            self.first.weight.data[0, :3] = 0.0

    assert cost.count_parameters(Tied()) == (24, 21)


def test_spread_is_the_interquartile_range() -> None:
    assert cost.spread([4.0, 1.0, 2.0, 3.0, 100.0]) == pytest.approx(4.0 - 2.0)
    assert cost.spread([7.0]) == 0.0


def test_batch_is_the_same_every_time() -> None:
    model = tiny_switch.model()
    first, again = cost.batch(model, SETTINGS), cost.batch(model, SETTINGS)
    assert first["input_ids"].shape == (3, 7)
    assert first["decoder_input_ids"].shape == (3, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert int(first["input_ids"].min()) >= 3


def test_latency_excludes_the_warm_up() -> None:
    calls: list[int] = []
    times = cost._time(lambda: calls.append(1), repeats=4, device=torch.device("cpu"))
    assert len(times) == 4
    assert len(calls) == 4 + cost._WARM_UP


@pytest.mark.workflow
def test_a_fresh_process_measures_the_checkpoint(folder: Path) -> None:
    # Memory held here must not show: resource.getrusage in a child would report it.
    ballast = torch.ones(1 << 28)
    result = cost.measure(folder, batch_size=3, input_tokens=7, label_tokens=4, repeats=3)
    assert ballast.nbytes == 1 << 30
    columns = SCHEMAS["cost"].names
    assert list(result) == columns[columns.index("stage") + 1 :]
    model = tiny_switch.model()
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result["bytes_on_disk"] == (folder / "model.safetensors").stat().st_size
    assert result["bytes_on_disk"] == pytest.approx(4 * result["parameters"], rel=0.1)
    assert result["experts_per_layer"] == [6] * 5
    assert 100 << 20 < result["peak_memory_bytes"] < ballast.nbytes
    assert result["throughput"] == pytest.approx(3000 / result["latency_ms"])
    assert result["parameter_bytes"] == 4 * result["parameters"]
    assert 0 <= result["resident_memory_bytes"] < 50 << 20
    assert result["flops_per_second"] == pytest.approx(1000 * result["flops"] / result["latency_ms"])
    assert result["generate_tokens_per_second"] == pytest.approx(3 * 4 * 1000 / result["generate_latency_ms"])
    with torch.inference_mode():
        inputs = cost.batch(model, SETTINGS)
        assert result["flops"] == cost.count_flops(lambda: model(**inputs))


@pytest.mark.workflow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="jobs are forked on Linux only")
def test_a_job_measures_the_same_memory_whether_it_is_forked_or_a_process_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MCSMOE_FORKSERVER", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    forkserver.start()
    words = (
        f"--task COPA --variant full --experts 6 --stage full --device cpu --repeats 2 --model {folder.name}".split()
    )
    rows = {}
    for how, server in (("own", ""), ("forked", os.environ["MCSMOE_FORKSERVER"])):
        monkeypatch.setenv("MCSMOE_FORKSERVER", server)
        table, usage = tmp_path / f"{how}.parquet", tmp_path / f"{how}.tsv"
        launch = [sys.executable, str(ROOT / "mcsmoe" / "workflow" / "launch.py"), "--usage", str(usage)]
        script = str(ROOT / "workflow_scripts" / "profile_cost.py")
        done = subprocess.run(
            [*launch, "--measured", script, *words, "--table", str(table)],
            cwd=folder.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        rows[how] = {**pd.read_parquet(table).iloc[0], "job": pd.read_csv(usage, sep="\t")["max_rss"].iloc[0] * 2**20}
    forkserver.stop()
    own, forked = rows["own"], rows["forked"]
    for column in ("parameters", "flops", "bytes_on_disk"):
        assert own[column] == forked[column]
    # A process of its own differs from another by as much; libraries that were not counted would make tens of percent.
    for column in ("peak_memory_bytes", "job"):
        assert forked[column] == pytest.approx(own[column], rel=0.05)
    assert forked["resident_memory_bytes"] == pytest.approx(own["resident_memory_bytes"], abs=4 << 20)
    # Measured before the table's libraries came.
    assert forked["peak_memory_bytes"] < forked["job"] - (10 << 20)


def test_generation_makes_exactly_the_tokens_asked_for() -> None:
    model = tiny_switch.model()
    model.generation_config.eos_token_id = 5  # would end rows early
    made = cost._generation(model, cost.batch(model, SETTINGS), SETTINGS)()
    assert made.shape == (3, 1 + SETTINGS.label_tokens)
    assert cost._generates(model)
    assert not cost._generates(nn.Linear(1, 1))


def test_bad_settings_and_folders_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        cost.measure(folder, repeats=0)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        cost.measure(folder, dtype="int8")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        cost.measure(tmp_path)


def test_what_loading_refuses_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers"}')
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises((ValueError, RuntimeError), match="safetensors"):
        cost.measure(tmp_path)


def test_the_module_is_light() -> None:
    code = "import sys, mcsmoe.evaluate.cost; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
