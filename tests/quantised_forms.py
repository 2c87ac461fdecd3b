"""Checkpoints quantised by hand: every number drawn as an integer or a code, packed bit by bit, and its value in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Made = tuple[dict[str, Tensor], NDArray[np.float64]]
"""Parts by the end of their names after the module's, and the values they stand for."""
FOUR_BIT_FLOATS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GROUP = 8  # inputs that share a scale
BLOCK = [16, 8]  # rows are not always a multiple


def packed(codes: NDArray[np.int64], bits: int, places: list[int] | None = None) -> Tensor:
    """Words of 32 bits along the last axis, code i of a word at place i, or at ``places[i]``."""
    each = 32 // bits
    rows, columns = codes.shape
    words = np.zeros((rows, -(-columns // each)), dtype=np.uint32)
    for column in range(columns):
        place = column % each if places is None else places[column % each]
        words[:, column // each] |= (codes[:, column].astype(np.uint32)) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def bytes_of(codes: NDArray[np.int64], high_first: bool = False) -> Tensor:
    """Two codes of four bits a byte."""
    one, two = codes[..., 0::2], codes[..., 1::2]
    return torch.from_numpy(((one << 4 | two) if high_first else (two << 4 | one)).astype(np.uint8))


def _scales(draw: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(draw.uniform(0.01, 0.03, shape)).to(torch.bfloat16)


def _eight(draw: np.random.Generator, rows: int, columns: int) -> tuple[Tensor, NDArray[np.float64]]:
    weight = torch.from_numpy(draw.normal(0, 8, (rows, columns))).to(torch.float8_e4m3fn)
    return weight, weight.double().numpy()


def _blocks(values: NDArray[np.float64], scale: NDArray[np.float64], block: list[int]) -> NDArray[np.float64]:
    made = values.copy()
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            made[row, column] *= scale[row // block[0], column // block[1]]
    return made


def fp8(draw: np.random.Generator, rows: int, columns: int) -> Made:
    weight, values = _eight(draw, rows, columns)
    scale = torch.from_numpy(draw.uniform(0.01, 0.03, (-(-rows // BLOCK[0]), -(-columns // BLOCK[1])))).float()
    return {"weight": weight, "weight_scale_inv": scale}, _blocks(values, scale.double().numpy(), BLOCK)


def fp8_powers(draw: np.random.Generator, rows: int, columns: int) -> Made:
    weight, values = _eight(draw, rows, columns)
    exponent = draw.integers(119, 123, (-(-rows // BLOCK[0]), -(-columns // BLOCK[1])))
    scale = torch.from_numpy(exponent.astype(np.uint8)).view(torch.float8_e8m0fnu)
    return {"weight": weight, "weight_scale_inv": scale}, _blocks(
        values, np.exp2(exponent - 127.0).astype(np.float64), BLOCK
    )


def fp8_tensor(draw: np.random.Generator, rows: int, columns: int) -> Made:
    weight, values = _eight(draw, rows, columns)
    scale = torch.tensor(0.0125)
    return {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(3.0)}, values * float(scale)


def fp8_channel(draw: np.random.Generator, rows: int, columns: int) -> Made:
    weight, values = _eight(draw, rows, columns)
    scale = _scales(draw, rows, 1)
    return {"weight": weight, "weight_scale": scale}, values * scale.double().numpy()


def int8(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes, zero = draw.integers(-128, 128, (rows, columns)), draw.integers(-3, 4, (rows, 1))
    scale = _scales(draw, rows, 1)
    parts = {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scale}
    parts["weight_zero_point"] = torch.from_numpy(zero).to(torch.int8)
    return parts, (codes - zero) * scale.double().numpy()


def _grouped(draw: np.random.Generator, rows: int, columns: int) -> tuple[Any, Any, Any, Any]:
    groups = columns // GROUP
    codes, zero = draw.integers(0, 16, (rows, columns)), draw.integers(1, 16, (rows, groups))
    scale = _scales(draw, rows, groups)
    wide_scale = np.repeat(scale.double().numpy(), GROUP, axis=1)
    return codes, zero, scale, (codes - np.repeat(zero, GROUP, axis=1)) * wide_scale


def w4a16(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes, zero, scale, values = _grouped(draw, rows, columns)
    return {
        "weight_packed": packed(codes, 4),
        "weight_scale": scale,
        "weight_zero_point": packed(zero.T, 4).t().contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }, values


def w4a16_symmetric(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes, _, scale, _ = _grouped(draw, rows, columns)
    parts = {"weight_packed": packed(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
    return parts, (codes - 8) * np.repeat(scale.double().numpy(), GROUP, axis=1)


def nvfp4(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes = draw.integers(0, 16, (rows, columns))
    groups = -(-columns // 16) if columns % 16 == 0 else 1
    scale = torch.from_numpy(draw.uniform(1, 4, (rows, groups))).to(torch.float8_e4m3fn)
    whole = torch.tensor([96.0])
    wide = np.repeat(scale.double().numpy(), columns // groups, axis=1)
    parts = {"weight_packed": bytes_of(codes), "weight_scale": scale, "weight_global_scale": whole}
    return parts, FOUR_BIT_FLOATS[codes] * wide / 96.0


def gptq(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes, zero, scale, _ = _grouped(draw, rows, columns)
    group = draw.permutation(np.arange(columns) // GROUP)  # inputs in the order of their activations
    parts = {
        "qweight": packed(codes, 4).t().contiguous(),
        "qzeros": packed(zero.T - 1, 4),
        "scales": scale.t().contiguous(),
        "g_idx": torch.from_numpy(group).to(torch.int32),
    }
    # Words of ``qweight`` run down the inputs: pack rows of [O, I], then turn it.
    return parts, (codes - zero[:, group]) * scale.double().numpy()[:, group]


def gptq_second(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes, zero, scale, values = _grouped(draw, rows, columns)
    parts = {
        "qweight": packed(codes, 4).t().contiguous(),
        "qzeros": packed(zero.T, 4),
        "scales": scale.t().contiguous(),
    }
    return parts, values


def awq(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes, zero, scale, values = _grouped(draw, rows, columns)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # from the lowest bits on
    places = [order.index(number) for number in range(8)]
    parts = {
        "qweight": packed(codes.T, 4, places),
        "qzeros": packed(zero.T, 4, places),
        "scales": scale.t().contiguous(),
    }
    return parts, values


def nf4(draw: np.random.Generator, rows: int, columns: int) -> Made:
    count, block = rows * columns, 16
    codes, table = draw.integers(0, 16, count), np.sort(draw.uniform(-1, 1, 16)).astype(np.float32)
    absmax = draw.uniform(0.1, 0.3, -(-count // block)).astype(np.float32)
    said = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
    parts = {
        "weight": bytes_of(codes, high_first=True).reshape(-1, 1),
        "weight.absmax": torch.from_numpy(absmax),
        "weight.quant_map": torch.from_numpy(table),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }
    return parts, (table[codes].astype(np.float64) * np.repeat(absmax, block)[:count]).reshape(rows, columns)


def nf4_twice(draw: np.random.Generator, rows: int, columns: int) -> Made:
    parts, _ = nf4(draw, rows, columns)
    blocks, count = len(parts["weight.absmax"]), rows * columns
    codes, table = draw.integers(0, 256, blocks), np.sort(draw.uniform(-1, 1, 256)).astype(np.float32)
    outer = draw.uniform(0.1, 0.3, -(-blocks // 4)).astype(np.float32)
    said = {"blocksize": 16, "shape": [rows, columns], "nested_blocksize": 4, "nested_offset": 0.25}
    absmax = table[codes].astype(np.float64) * np.repeat(outer, 4)[:blocks] + 0.25
    parts |= {
        "weight.absmax": torch.from_numpy(codes.astype(np.uint8)),
        "weight.nested_absmax": torch.from_numpy(outer),
        "weight.nested_quant_map": torch.from_numpy(table),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }
    flat = parts["weight"].numpy().reshape(-1)
    drawn = np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[:count]
    values = parts["weight.quant_map"].double().numpy()[drawn] * np.repeat(absmax, 16)[:count]
    return parts, values.reshape(rows, columns)


def bits8(draw: np.random.Generator, rows: int, columns: int) -> Made:
    codes, largest = draw.integers(-127, 128, (rows, columns)), draw.uniform(0.1, 0.3, rows).astype(np.float32)
    parts = {
        "weight": torch.from_numpy(codes).to(torch.int8),
        "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, codes * largest.astype(np.float64)[:, None] / 127


def _packing(bits: int, kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"]}


Form = tuple[Callable[[np.random.Generator, int, int], Made], dict[str, Any]]
FORMS: dict[str, Form] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": BLOCK, "modules_to_not_convert": ["lm_head"]}),
    "fp8-ue8m0": (fp8_powers, {"quant_method": "fp8", "weight_block_size": BLOCK, "scale_fmt": "ue8m0"}),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "ct-fp8": (fp8_channel, _packing(8, "float") | {"format": "float-quantized"}),
    "ct-int8": (int8, _packing(8, "int") | {"format": "int-quantized"}),
    "ct-w4a16": (w4a16, _packing(4, "int", group_size=GROUP, symmetric=False) | {"format": "pack-quantized"}),
    "ct-w4a16-symmetric": (w4a16_symmetric, _packing(4, "int", group_size=GROUP) | {"format": "pack-quantized"}),
    "ct-nvfp4": (nvfp4, _packing(4, "float", group_size=16) | {"format": "nvfp4-pack-quantized"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "gptq-v2": (
        gptq_second,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-twice": (nf4_twice, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb-int8": (bits8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def is_quantised(name: str) -> bool:
    """Whether a quantiser would take a tensor: the matrices of attention and experts."""
    return name.endswith("proj.weight")


def write(plain: Path, folder: Path, form: str, truth: Path | None = None, seed: int = 0) -> Path:
    """A checkpoint like ``plain`` with its matrices drawn anew in ``form``; at ``truth`` the same in closed form, bfloat16."""
    make, settings = FORMS[form]
    draw = np.random.default_rng(seed)
    tensors, values = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not is_quantised(name):
            tensors[name] = values[name] = tensor
            continue
        parts, value = make(draw, *tensor.shape)
        tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
        values[name] = torch.from_numpy(np.ascontiguousarray(value)).float().bfloat16()
    config = json.loads((plain / "config.json").read_text())
    for target, held, more in ((folder, tensors, {"quantization_config": settings}), (truth, values, {})):
        if target is not None:
            target.mkdir(parents=True)
            save_file(held, target / "model.safetensors", {"format": "pt"})
            (target / "config.json").write_text(json.dumps(config | more))
    return folder
