"""llama.cpp's own quantiser, as its bindings for node carry it in a library: what ``llama-quantize`` calls.

    python quantise_gguf.py LIBRARIES SOURCE OUT TYPE

Writes SOURCE.gguf as TYPE (F32 copies it, Q8_0, Q4_K_M) into OUT.gguf, and into OUT.json, by tensor, the type that it is
stored in and a digest of its bytes, of each expert's where they are experts' (the router's rows too). Needs the package gguf.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, LlamaFileType


class Settings(ctypes.Structure):
    """The first fields of llama.cpp's ``llama_model_quantize_params``; the others stay as the library gives them."""

    _fields_ = (("threads", ctypes.c_int32), ("kind", ctypes.c_int32), ("others", ctypes.c_byte * 1016))


def quantise(libraries: Path, source: Path, out: Path, kind: str) -> None:
    for name in ("libggml-base.so", "libggml.v*.so"):  # the last library is linked with these
        ctypes.CDLL(str(next(libraries.glob(name))), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(next(libraries.glob("libllama.v*.so"))))
    llama.llama_model_quantize_default_params.restype = Settings
    settings = llama.llama_model_quantize_default_params()
    settings.kind = LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"].value
    paths = [ctypes.c_char_p(str(file).encode()) for file in (source, out)]
    if failed := llama.llama_model_quantize(*paths, ctypes.byref(settings)):
        raise SystemExit(f"{source}: llama_model_quantize gives {failed}")


def told(file: Path) -> dict[str, dict[str, object]]:
    """Type and digests of each tensor."""
    found: dict[str, dict[str, object]] = {}
    for tensor in GGUFReader(file).tensors:
        by_expert = tensor.data.ndim == 3 or "ffn_gate_inp" in tensor.name
        parts = tensor.data if by_expert else tensor.data[None]
        digests = [hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in parts]
        found[tensor.name] = {"type": tensor.tensor_type.name, "digests": digests}
    return found


if __name__ == "__main__":
    source, out = (Path(f"{word}.gguf") for word in sys.argv[2:4])
    quantise(Path(sys.argv[1]), source, out, sys.argv[4])
    out.with_suffix(".json").write_text(json.dumps(told(out)))
