"""The command line and what it stands on: one layer at a time, the same bits as in memory, one message for an error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import refused, run
from tiny_switch import batch, logits, model

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.tables import read_table
from mcsmoe.artefacts.tensors import TensorFolder
from mcsmoe.calibration.evidence import Evidence
from mcsmoe.calibration.files import load_statistics
from mcsmoe.checkpoint.format import layer_specs
from mcsmoe.checkpoint.save import save_model
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli import main as cli
from mcsmoe.methods import MERGES
from mcsmoe.transform.align import AlignmentSettings, align_layers
from mcsmoe.transform.group import GroupSettings, group_layers
from mcsmoe.transform.layers import ModelLayers
from mcsmoe.transform.merge import MergeSettings, merge_layers


def rows(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 96, (length,), generator=generator).tolist()

    return [{"input_ids": ids(4 + row % 7), "labels": ids(3 + row % 4)} for row in range(count)]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    mcsmoe.save(model(), tmp_path / "full")
    (tmp_path / "tokens.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    return tmp_path / "full"


# -- streaming ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["switch", "mixtral", "qwen2_moe", "gpt_oss", "nllb_moe"])
@pytest.mark.filterwarnings("ignore:transformers 5.23 lets experts")
def test_a_streamed_model_gives_the_logits_of_the_loaded_one(family: str, tmp_path: Path) -> None:
    made = model() if family == "switch" else tiny_models.model(family)
    mcsmoe.save(made, tmp_path / "full")
    inputs = batch()
    if not made.config.is_encoder_decoder:
        del inputs["labels"]
    source = Streamed(tmp_path / "full")
    with source.runnable() as running:
        assert torch.equal(logits(running, inputs), logits(mcsmoe.load(tmp_path / "full"), inputs))
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_damage_is_refused_by_name_before_anything_is_written(full: Path, tmp_path: Path) -> None:
    run("merge", full, "--calibration", tmp_path / "tokens.jsonl", "--experts", 2, "--out", tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: altered"):
        Streamed(tmp_path / "merged")
    (full / "model.safetensors").write_bytes((full / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        Streamed(full)


# -- merge -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        ("--alignment", "none"),
        ("--similarity", "weight", "--budget", "uniform"),
        ("--method", "zipit", "--alignment", "none", "--similarity", "expert-output", "--grouping", "hierarchical"),
        ("--method", "drop", "--alignment", "none"),
        ("--method", "reap", "--alignment", "none"),
        ("--alignment", "activation-dominant"),
    ],
)
def test_merging_gives_what_the_stages_give_in_memory(options: tuple[str, ...], full: Path, tmp_path: Path) -> None:
    statistics = tmp_path / "statistics.safetensors"
    run(
        *("merge", full, "--calibration", tmp_path / "tokens.jsonl", "--experts", 3, "--out", tmp_path / "merged"),
        *("--save-statistics", statistics, "--batch-size", 8, *options),
    )
    given = dict(zip(options[::2], options[1::2], strict=True))
    made = mcsmoe.load(full)
    adapter = adapter_for(made)
    evidence = Evidence(load_statistics(statistics), {}, {})
    alignment = given.get("--alignment", "weight")
    method = given.get("--method", "frequency")
    layers = ModelLayers(made, adapter)
    if alignment == "weight":
        align_layers(layers, AlignmentSettings())
    settings = GroupSettings(
        experts=3,
        similarity=given.get("--similarity", "router-logits"),
        grouping=given.get("--grouping", "dominant"),
        budget=given.get("--budget", MERGES[method].budget),
        merge=method,
    )
    groupings = group_layers(layers, settings, evidence).groupings
    merge_layers(layers, groupings, MergeSettings(method, alignment), evidence)
    back = mcsmoe.load(tmp_path / "merged")
    assert torch.equal(logits(back, batch()), logits(made, batch()))
    table = read_table(tmp_path / "merged" / "groups.parquet", "groups")
    assert table.groupby("layer")["group"].nunique().sum() == 3 * 5
    save_model(made, tmp_path / "memory")
    names = ("merged", "memory")
    one, two = (TensorFolder(tmp_path / name) for name in names)
    assert one.fingerprint == two.fingerprint
    if not MERGES[method].drops:  # else tensors lie in the file as they did before, which is another order
        assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()


def test_statistics_do_not_depend_on_how_they_were_collected(full: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    common = ("--experts", 3, "--alignment", "none", "--method", "uniform")
    run(
        "merge",
        full,
        "--calibration",
        tmp_path / "tokens.jsonl",
        "--save-statistics",
        kept,
        *common,
        "--out",
        tmp_path / "a",
    )
    run("merge", full, "--statistics", kept, *common, "--out", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    counted = load_statistics(kept).layers["decoder.block.0.layer.2.mlp"].valid_tokens
    assert int(counted) == sum(len(row["labels"]) for row in rows())


def test_text_files_are_calibrated_on_with_the_models_tokenizer(tmp_path: Path) -> None:
    from mcsmoe.train.tokenizer import train_tokenizer

    words = ["one two three four five six seven eight", "a b c d e f g", "seven eight one two"] * 5
    tokenizer = train_tokenizer(words, 64, sentinels=2, lowercase=True)
    mcsmoe.save(model(), tmp_path / "full", tokenizer=tokenizer)
    (tmp_path / "lines.txt").write_text("\n".join(words))
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"input": w, "target": w[:5]}) for w in words))
    for name in ("lines.txt", "pairs.jsonl"):
        out = tmp_path / f"from {name}"
        run("merge", tmp_path / "full", "--calibration", tmp_path / name, "--experts", 2, "--out", out)
        assert mcsmoe.load_tokenizer(out).vocab_size == tokenizer.vocab_size
        assert sorted(read_table(out / "groups.parquet", "groups")["layer"].unique()) == sorted(Streamed(out).layers)


# -- the whole way -----------------------------------------------------------------------------------------------
def test_merge_compress_inspect_export(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "tokens.jsonl"
    first = "encoder.block.1.layer.1.mlp"
    run("merge", full, "--calibration", tokens, "--experts", 2, "--out", tmp_path / "m", "--exclude-layers", first)
    run("compress", tmp_path / "m", "--rank", 3, "--keep", 0.25, "--out", tmp_path / "c")
    specs = layer_specs(tmp_path / "c")
    assert first not in specs
    for spec in specs.values():
        assert spec.compression.rank == 3
        assert sum(spec.compression.kept_rows["wi"]) == round(0.25 * 24 * spec.num_groups)
        assert sum(spec.compression.kept_rows["wo"]) == round(0.25 * 16 * spec.num_groups)
    run("inspect", tmp_path / "c")
    shown = capsys.readouterr().out
    for word in (first, "compact checkpoint of a SwitchTransformersForConditionalGeneration", "mcsmoe compress"):
        assert word in shown
    run("inspect", tmp_path / "c", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["parameters"] == sum(p.numel() for p in mcsmoe.load(tmp_path / "c").parameters())
    assert [row["layer"] for row in found["layers"]] == _natural(Streamed(full).layers)
    assert {row["layer"]: row["groups"] for row in found["layers"]} == {
        layer: specs[layer].num_groups if layer in specs else 6 for layer in Streamed(full).layers
    }
    run("export", tmp_path / "c", "--form", "dense", "--out", tmp_path / "d")
    back = type(model()).from_pretrained(tmp_path / "d").eval()
    assert (logits(back, batch()) - logits(mcsmoe.load(tmp_path / "c"), batch())).abs().max() < 5e-6
    run("inspect", tmp_path / "d", "--json")
    assert {row["groups"] for row in json.loads(capsys.readouterr().out)["layers"]} == {6}
    run("merge", full, "--calibration", tokens, "--experts", 2, "--out", tmp_path / "u", "--budget", "uniform")
    run("export", tmp_path / "u", "--form", "stock", "--calibration", tokens, "--recover", 10, "--out", tmp_path / "s")
    assert type(model()).from_pretrained(tmp_path / "s").config.num_experts == 2


def _natural(layers: list[str]) -> list[str]:
    return sorted(layers, key=lambda layer: [int(part) if part.isdigit() else part for part in layer.split(".")])


def test_rows_kept_by_their_effect_lose_less_on_the_calibration_tokens(full: Path, tmp_path: Path) -> None:
    tokens, kept = tmp_path / "tokens.jsonl", tmp_path / "statistics.safetensors"
    run("compress", full, "--rank", 1, "--keep", 0.2, "--out", tmp_path / "plain")
    aware = ("--calibration", tokens, "--save-statistics", kept, "--out", tmp_path / "aware")
    run("compress", full, "--rank", 1, "--keep", 0.2, *aware)
    made, statistics = mcsmoe.load(full), load_statistics(kept)
    adapter = adapter_for(made)
    errors = {"plain": 0.0, "aware": 0.0}
    for layer in adapter.layers(made):
        for name in errors:
            other = mcsmoe.load(tmp_path / name)
            got, want = (adapter.read_experts(one, layer).tensors["wi"] for one in (other, made))
            for expert, inputs_TD in enumerate(statistics.layers[layer].tokens(layer)):
                errors[name] += float(((got - want)[expert] @ inputs_TD.T).square().sum())
    assert errors["aware"] < 0.95 * errors["plain"]
    assert len(layer_specs(tmp_path / "aware")) == 5


# -- refusals ----------------------------------------------------------------------------------------------------
def test_errors_are_one_message_and_status_1(full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, out = tmp_path / "tokens.jsonl", tmp_path / "out"

    def error(*words: object) -> str:
        return refused(caplog, *words)

    assert "experts is 7" in error("merge", full, "--calibration", tokens, "--experts", 7, "--out", out)
    assert "--calibration FILE" in error("merge", full, "--experts", 2, "--out", out)
    assert "absent.txt: no such file" in error(
        *("merge", full, "--calibration", tmp_path / "absent.txt", "--experts", 2, "--out", out)
    )
    assert "needs gradients" in error(
        *("merge", full, "--calibration", tokens, "--experts", 2, "--out", out, "--similarity", "gradient")
    )
    assert "nowhere: no such checkpoint folder" in error("compress", tmp_path / "nowhere", "--out", out)
    assert "keep is 0.0" in error("compress", full, "--keep", 0.0, "--out", out)
    assert "rank is 17" in error("compress", full, "--rank", 17, "--out", out)
    assert "no config.json" in error("inspect", tmp_path)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    out.mkdir()
    (out / "precious").write_text("kept")
    assert "exists already" in error("compress", full, "--rank", 2, "--out", out)
    assert (out / "precious").read_text() == "kept"
    run("compress", full, "--rank", 2, "--out", out, "--overwrite")
    assert not (out / "precious").exists()
    assert "is compressed already" in error("compress", out, "--rank", 2, "--out", tmp_path / "twice")
    assert "is the checkpoint that is read" in error("compress", full, "--out", full, "--overwrite")
    assert "--recover trains" in error("export", out, "--form", "stock", "--recover", 3, "--out", tmp_path / "s")


def test_help_is_quick_and_has_an_example() -> None:
    assert {"merge", "compress", "inspect", "export"} <= set(cli.commands())
    for command in cli.commands():
        code = (
            f"import sys\nfrom mcsmoe.cli import main as cli\ntry:\n    cli.main([{command!r}, '--help'])\n"
            "except SystemExit as stopped:\n    assert stopped.code == 0\n"
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert f"mcsmoe {command} " in done.stdout
        assert "example:" in done.stdout


def test_the_package_and_the_installed_program_are_commands() -> None:
    for program in ([sys.executable, "-m", "mcsmoe"], [Path(sys.executable).with_name("mcsmoe")]):
        done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
        for name, command in cli.commands().items():
            assert name in done.stdout
            assert command.HELP.splitlines()[0].split()[0] in done.stdout


# -- memory ------------------------------------------------------------------------------------------------------
_MEASURE = """
import ctypes, json, os, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which count what is not used
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.initialization import no_init_weights
from mcsmoe.checkpoint.format import layer_specs
from mcsmoe.checkpoint.save import save_model
from mcsmoe.cli import main as cli
from mcsmoe.evaluate.cost import peak_memory

place = Path(sys.argv[1])
blocks = {name: 12 for name in
    ("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers")}

def make(name, **shape):
    with no_init_weights():
        made = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(
            vocab_size=96, d_kv=16, num_heads=4, num_experts=16, router_jitter_noise=0.0, decoder_start_token_id=0,
            **blocks, **shape))
    for parameter in made.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    save_model(made, place / name)

def measure(words):
    for size in ("small", "large"):  # the first brings in libraries and kernels
        before = peak_memory(torch.device("cpu"))
        cli.main([word.replace("SIZE", size) for word in words])
        used = (peak_memory(torch.device("cpu")) - before) / 1e6
    print(used)

for task in sys.argv[2:]:
    if os.fork() == 0:  # its account of memory begins anew
        if task == "make":
            make("small", d_model=16, d_ff=24)
            make("large", d_model=192, d_ff=768)
        else:
            measure(json.loads(task))
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, task
"""


def test_peak_memory_is_that_of_a_layer_not_of_the_model(tmp_path: Path) -> None:
    """A model of 460 MB, 19 MB a layer, is calibrated on, merged and compressed in 150 MB more than a tiny one."""
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text("\n".join(json.dumps(row) for row in rows()))

    full, merged, out = (f"{tmp_path}/SIZE{part}" for part in ("", "-merged", "-compressed"))
    merging = ["merge", full, "--calibration", str(tokens), "--experts", "4", "--alignment", "none", "--out", merged]
    compressing = ["compress", merged, "--rank", "8", "--out", out]
    line = [sys.executable, "-c", _MEASURE, str(tmp_path), "make", json.dumps(merging), json.dumps(compressing)]
    # What the allocator keeps for later is not what the program holds: let it give freed memory back at once.
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    size = (tmp_path / "large" / "model.safetensors").stat().st_size / 1e6
    numbers = [float(line) for line in done.stdout.splitlines() if re.fullmatch(r"\d+\.\d+", line)]
    assert len(numbers) == 2
    for words, used in zip((merging, compressing), numbers, strict=True):
        assert used < 150 < size / 3, (words[0], used, size)
