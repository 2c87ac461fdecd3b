"""Integers in place of weights: the best scale, the packed words, and checkpoints that hold them.

The layout is checked against compressed-tensors itself where MCSMOE_COMPRESSED_TENSORS names an interpreter that has it
(and transformers): it is no dependency of this project.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import refused, run
from safetensors.torch import load_file
from torch import Tensor

import mcsmoe
from mcsmoe.artefacts.tensors import TensorFolder
from mcsmoe.compress.quantise import dequantise, group_size, pack, packed_bytes, quantise, unpack

WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}


def words_by_hand(integers: list[int], bits: int) -> list[int]:
    """Packed words of one row, from the binary digits of its entries."""
    digits = "".join(f"{value + 2 ** (bits - 1):0{bits}b}"[::-1] for value in integers)
    digits += "0" * (-len(digits) % 32)
    words = [int(digits[start : start + 32][::-1], 2) for start in range(0, len(digits), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 40, 5])
def test_packed_words_are_the_digits_of_the_integers(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    integer_oi = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, columns), generator=generator).to(torch.int8)
    packed = pack(integer_oi, bits)
    assert packed.tolist() == [words_by_hand(row, bits) for row in integer_oi.tolist()]
    assert torch.equal(unpack(packed, bits, columns), integer_oi)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_scale_is_near_the_best_of_a_fine_search(bits: int, dtype: torch.dtype) -> None:
    weight_oi = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    integer_oi, scale_og = quantise(weight_oi, bits, 32)
    assert integer_oi.dtype == torch.int8
    assert (scale_og.dtype, scale_og.shape) == (dtype, (6, 2))
    high, total, least = 2 ** (bits - 1) - 1, 0.0, 0.0
    for row in range(6):
        for place in range(2):
            group = weight_oi[row, place * 32 : place * 32 + 32].double()
            mine = integer_oi[row, place * 32 : place * 32 + 32].double() * scale_og[row, place].double()
            total += float((mine - group).square().sum())
            least += min(
                float(((group / scale).round().clamp(-high - 1, high) * scale - group).square().sum())
                for scale in (group.abs().max() / high * share for share in torch.linspace(0.5, 1.1, 600).double())
            )
    # Of 600 scales one fits fine integers by luck, which is no matter of where the largest entry is cut.
    assert total <= (1.1 if bits == 4 else 1.4) * least
    plain = weight_oi.float().view(6, 2, 32)
    step = plain.abs().amax(dim=2, keepdim=True) / high
    rounded = (plain / step).round() * step
    error = (dequantise(integer_oi, scale_og.float()) - weight_oi.float()).square().sum()
    assert error <= (rounded - plain).square().sum() * 1.001


def test_weights_that_are_zero_or_alike_are_exact() -> None:
    for weight_oi in (torch.zeros(2, 32), torch.full((2, 32), 0.5), torch.full((2, 32), -3.0)):
        for bits in (4, 8):
            assert torch.allclose(dequantise(*quantise(weight_oi, bits, 32)), weight_oi, rtol=1e-6)


def test_groups_are_parts_of_rows() -> None:
    assert group_size([256, 128]) == 128
    assert group_size([256, 96]) == 32
    with pytest.raises(ValueError, match=r"rows of 48 weights are not whole groups of 128, 64 and 32.*--group-size"):
        group_size([64, 48])
    with pytest.raises(ValueError, match="rows of 64 weights are not whole groups of 48"):
        group_size([64, 48], 48)


# -- checkpoints -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    mcsmoe.save(tiny_models.model("qwen3_moe", **WIDE).to(torch.bfloat16), folder / "full")
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 96, (11,), generator=generator).tolist()} for _ in range(20)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["prune", folder / "full", "--experts", 3, "--calibration", folder / "text.jsonl", "--refit"]
    run(*words, "--out", folder / "plain")
    for bits in (4, 8):
        run(*words, "--bits", bits, "--out", folder / f"packed-{bits}")
    return folder


def unpacked(folder: Path, bits: int) -> dict[str, Tensor]:
    """The state of a packed checkpoint in the names of a plain one."""
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        rows, columns = state.pop(f"{stem}_shape").tolist()
        integers = unpack(state.pop(name), bits, columns)
        assert integers.shape == (rows, columns)
        state[stem] = dequantise(integers, state.pop(f"{stem}_scale"))
    return state


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_of_a_result_are_packed(bits: int, place: Path) -> None:
    folder = place / f"packed-{bits}"
    plain = load_file(place / "plain" / "model.safetensors")
    found = unpacked(folder, bits)
    assert found.keys() == plain.keys()
    experts = 0
    for name, tensor in plain.items():
        if ".experts." in name:
            experts += 1
            error = (found[name].float() - tensor.float()).square().sum() / tensor.float().square().sum()
            assert 0 < error < (0.01 if bits == 4 else 5e-5)
        else:
            assert torch.equal(found[name], tensor), name
    assert experts == 2 * 3 * 3
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == json.loads((place / "plain" / "config.json").read_text())
    weights = said["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (bits, 32, True)
    assert {name.removesuffix(".weight") for name in plain if ".experts." not in name} <= set(said["ignore"])
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["weights"] == TensorFolder(folder).fingerprint
    assert provenance["settings"]["bits"] == bits
    summed = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, capture_output=True)
    assert summed.returncode == 0, summed.stdout
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_are_those_that_were_foretold(bits: int, place: Path) -> None:
    plain, packed = TensorFolder(place / "plain").infos, TensorFolder(place / f"packed-{bits}").infos
    for name, info in plain.items():
        if ".experts." in name:
            own = sum(packed[f"{name}_{part}"].nbytes for part in ("packed", "scale", "shape"))
            assert own == packed_bytes(info.shape, info.dtype.itemsize, bits, 32)


def test_merges_that_delete_rows_are_packed_too(place: Path, tmp_path: Path) -> None:
    words = ["merge", place / "full", "--method", "ream", "--experts", 3, "--calibration", place / "text.jsonl"]
    run(*words, "--bits", 4, "--out", tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    )


def test_what_cannot_be_packed_is_refused(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = ["prune", place / "full", "--experts", 3, "--calibration", place / "text.jsonl", "--out", tmp_path / "out"]
    for words, message in (
        (["--dropped", "constant"], "packs a stock checkpoint"),
        (["--budget", "predicted"], "packs a stock checkpoint"),
        (
            ["--group-size", 48],
            "rows of 32 weights are not whole groups of 48; give a --group-size that divides [32, 64]",
        ),
    ):
        assert message in refused(caplog, *given, "--bits", 4, *words)
    assert "--group-size is of --bits, which is not given" in refused(caplog, *given, "--group-size", 32)
    mcsmoe.save(tiny_models.model("gpt_oss"), tmp_path / "stacked")
    stacked = ["prune", tmp_path / "stacked", *given[2:]]
    assert "only those of 0 are stored matrix by matrix" in refused(caplog, *stacked, "--bits", 4)
    assert not (tmp_path / "out").exists()


CHECK = """
import sys, torch
from pathlib import Path
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, plain, bits = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
state, whole = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
for name in [name for name in state if name.endswith("_packed")]:
    stem = name.removesuffix("_packed")
    integers = unpack_from_int32(state[name], bits, state[stem + "_shape"])
    assert torch.equal(pack_to_int32(integers, bits), state[name])
    scale = state[stem + "_scale"]
    whole[stem] = integers.to(scale.dtype) * scale.repeat_interleave(integers.shape[1] // scale.shape[1], 1)
ids = torch.arange(2, 42).view(2, 20)
reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()
packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
import copy, tempfile, shutil
from safetensors.torch import save_file
with tempfile.TemporaryDirectory() as place:
    shutil.copy(plain / "config.json", place)
    save_file(whole, Path(place) / "model.safetensors", {"format": "pt"})
    wanted = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
with torch.no_grad():
    one, two, three = (model(input_ids=ids).logits for model in (packed, wanted, reference))
assert torch.equal(one, two), (one - two).abs().max()
assert not torch.equal(one, three)
print("agrees")
"""


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_reads_it(bits: int, place: Path) -> None:
    python = os.environ.get("MCSMOE_COMPRESSED_TENSORS")
    if not python:
        pytest.skip("on request: MCSMOE_COMPRESSED_TENSORS names a Python with compressed-tensors and transformers 5")
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [python, "-c", CHECK, place / f"packed-{bits}", place / "plain", str(bits)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "agrees", done.stderr[-3000:]
