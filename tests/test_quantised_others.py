"""The arithmetic of bitsandbytes, AutoAWQ and AutoGPTQ beside ours, with the packages themselves; on request.

for one in bitsandbytes autoawq auto-gptq; do pip install --no-deps --target FOLDER/$one $one; done
MCSMOE_QUANTISERS=FOLDER pytest tests/test_quantised_others.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised import awq, bitsandbytes, gptq

FOLDER = Path(os.environ.get("MCSMOE_QUANTISERS", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("MCSMOE_QUANTISERS"),
    reason="set MCSMOE_QUANTISERS to a folder with bitsandbytes, autoawq and auto-gptq (see the top of this file)",
)
ROWS, COLUMNS, GROUP = 48, 128, 32

BITSANDBYTES = """
import sys, torch
from safetensors.torch import save_file
import bitsandbytes.functional as library
torch.manual_seed(0)
made = {}
for kind in ("nf4", "fp4"):
    for nested in (True, False):
        for block in (64, 128):
            weight = torch.randn(48, 128) * 0.1 + 0.02
            held, state = library.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=block)
            name = f"{kind}-{nested}-{block}"
            made[f"{name}.weight"] = held
            made |= {f"{name}.weight.{part}": one for part, one in state.as_dict(packed=True).items()}
            made[f"{name}.made"] = library.dequantize_4bit(held, state)
integers, scale, _ = library.int8_vectorwise_quant((torch.randn(48, 128) * 0.1).half())
made |= {"int8.weight": integers, "int8.SCB": scale, "int8.made": library.int8_vectorwise_dequant(integers, scale)}
save_file({name: one.contiguous() for name, one in made.items()}, sys.argv[1])
"""
FOUR = [f"{kind}-{nested}-{block}" for kind in ("nf4", "fp4") for nested in (True, False) for block in (64, 128)]


def module(path: str) -> ModuleType:
    """One file of a package, without the rest of it, which takes other versions of its libraries."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, FOLDER / path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def ours(form: Any, held: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    infos = {name: TensorInfo.of(one) for name, one in held.items()}
    ((_, found),) = form.find(infos, settings, held.__getitem__)
    value: Tensor = found.value(held.__getitem__, torch.float32)
    return value


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    file = tmp_path_factory.mktemp("library") / "tensors.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER / "bitsandbytes")}
    subprocess.run([sys.executable, "-c", BITSANDBYTES, str(file)], check=True, env=environment)
    return load_file(file)


@pytest.mark.parametrize("kind", [*FOUR, "int8"])
def test_bitsandbytes(kind: str, library: dict[str, Tensor]) -> None:
    held = {name: one for name, one in library.items() if name.startswith(f"{kind}.") and not name.endswith(".made")}
    close = 1e-3 if kind == "int8" else 1e-6  # it gives 8-bit integers back in half precision
    torch.testing.assert_close(
        ours(bitsandbytes, held, {}), library[f"{kind}.made"].float().reshape(ROWS, COLUMNS), rtol=close, atol=1e-7
    )


def test_awq() -> None:
    theirs = module("autoawq/awq/utils/packing_utils.py")
    torch.manual_seed(0)
    qweight, qzeros = words(COLUMNS, ROWS // 8), words(COLUMNS // GROUP, ROWS // 8)
    scales = torch.rand(COLUMNS // GROUP, ROWS).half()
    held = {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": scales}
    want_IO = theirs.dequantize_gemm(qweight, qzeros, scales.float(), 4, GROUP)
    torch.testing.assert_close(ours(awq, held, {"bits": 4, "group_size": GROUP}), want_IO.t(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [GROUP, COLUMNS])
def test_gptq(bits: int, size: int) -> None:
    """Any words at all, so that every zero occurs, 0 (which is stored as the largest number) among them."""
    theirs = module("auto-gptq/auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py")
    torch.manual_seed(0)
    inputs, outputs = COLUMNS, 64
    linear = theirs.QuantLinear(bits, size, inputs, outputs, False, weight_dtype=torch.float32)
    linear.qweight = words(inputs * bits // 32, outputs)
    linear.qzeros = words(inputs // size, outputs * bits // 32)
    linear.scales = torch.rand(inputs // size, outputs)
    held = {f"m.{name}": getattr(linear, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    want_OI = linear(torch.eye(inputs)).t()
    torch.testing.assert_close(ours(gptq, held, {"bits": bits, "group_size": size}), want_OI, rtol=1e-6, atol=1e-7)
