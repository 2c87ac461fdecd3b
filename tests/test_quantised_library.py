"""compressed-tensors' own arithmetic beside ours, with an interpreter that has it; on request."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.quantised import compressed

PYTHON = os.environ.get("MCSMOE_COMPRESSED_TENSORS", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="set MCSMOE_COMPRESSED_TENSORS to a Python that has compressed-tensors"
)
SCRIPT = """
import json, sys, torch
from safetensors.torch import save_file
import compressed_tensors.compressors as c
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
torch.manual_seed(0)
rows, columns = 24, 64
def parts(kind, args, scale, zero=None, whole=None):
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    given = {"weight": torch.randn(rows, columns) * 0.1, "weight_scale": scale}
    if zero is not None: given["weight_zero_point"] = zero
    if whole is not None: given["weight_global_scale"] = whole
    held = kind.compress(given, scheme)
    made = kind.decompress(dict(held), scheme)["weight"]
    return {n: t.contiguous() for n, t in held.items()}, made.float().contiguous()
draw = lambda *shape: torch.rand(*shape) * 0.02 + 0.01
four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
found = {
    "packed": parts(c.PackedQuantizationCompressor, four | {"symmetric": True}, draw(rows, 4)),
    "zeros": parts(c.PackedQuantizationCompressor, four | {"symmetric": False}, draw(rows, 4),
                   torch.randint(-8, 8, (rows, 4)).to(torch.int8)),
    "eight": parts(c.PackedQuantizationCompressor,
                   {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, draw(rows, 1) * 0.1),
    "int8": parts(c.IntQuantizationCompressor,
                  {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, draw(rows, 1) * 0.1),
    "fp8": parts(c.FloatQuantizationCompressor,
                 {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}, draw(rows, 1)),
    "blocks": parts(c.FloatQuantizationCompressor,
                    {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]}, draw(3, 4)),
    "nvfp4": parts(c.NVFP4PackedCompressor,
                   {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
                    "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"},
                   draw(rows, 4) * 3000, whole=torch.tensor([3000.0])),
}
save_file({f"{n}.{p}": t for n, (held, made) in found.items() for p, t in {**held, "made": made}.items()}, sys.argv[1])
"""
SETTINGS: dict[str, Any] = {
    "packed": {"num_bits": 4},
    "zeros": {"num_bits": 4},
    "eight": {"num_bits": 8},
    "int8": {"num_bits": 8},
    "fp8": {"num_bits": 8},
    "blocks": {"num_bits": 8, "block_structure": [8, 16]},
    "nvfp4": {"num_bits": 4},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    file = tmp_path_factory.mktemp("library") / "tensors.safetensors"
    subprocess.run([PYTHON, "-c", SCRIPT, str(file)], check=True)
    return load_file(file)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_the_library_gives_the_same_numbers(kind: str, library: dict[str, torch.Tensor]) -> None:
    held = {name: one for name, one in library.items() if name.startswith(f"{kind}.") and not name.endswith(".made")}
    infos = {name: TensorInfo.of(one) for name, one in held.items()}
    settings = json.loads(json.dumps({"config_groups": {"group_0": {"weights": SETTINGS[kind]}}}))
    ((name, found),) = compressed.find(infos, settings, held.__getitem__)
    assert name == f"{kind}.weight"
    # Of NVFP4 the library gives bfloat16.
    close = 2**-8 if kind == "nvfp4" else 1e-6
    torch.testing.assert_close(
        found.value(held.__getitem__, torch.float32), library[f"{kind}.made"], rtol=close, atol=0
    )
