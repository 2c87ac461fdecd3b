"""What travels with a model unread: tokenizer, chat templates, licence, code, notes."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from mcsmoe.artefacts.digests import SUMS
from mcsmoe.artefacts.tensors import INDEX
from mcsmoe.checkpoint.lineage import PROVENANCE
from mcsmoe.console import log

_OURS = (
    *("config.json", INDEX, PROVENANCE, SUMS, "groups.parquet", "experts.json"),
    *("candidates.json", "domains.json", "sizes.json"),
)
# What quantisers write beside a model; config.json says the same, and is kept true of a result.
_SETTINGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_WEIGHTS = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".ggml",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".npz",
    ),
    *(".index.json", ".pkl", ".pickle", ".distcp", ".nemo", ".llamafile", ".zip", ".tar", ".gz"),
)
_MOST = 256 << 20  # bytes of one file; what is larger is weights under another name
_DEEPEST = 3


def companions(folder: Path) -> Iterator[str]:
    """Names, relative to ``folder``, of the files that belong to the model and are not its weights or configuration."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts) or len(name.parts) > _DEEPEST:
            continue
        if name.as_posix() in (*_OURS, *_SETTINGS) or file.name.endswith(_WEIGHTS):
            continue
        try:
            mode = file.stat()
        except OSError:
            continue
        if stat.S_ISREG(mode.st_mode) and _belongs(file, folder):
            if mode.st_size > _MOST:
                log.warning("%s: is %.0f MB long and not copied", file, mode.st_size / 1e6)
                continue
            yield name.as_posix()


def _belongs(file: Path, folder: Path) -> bool:
    """Whether a file lies where it is named: a link out of the folder may lead to anything of this user's.

    The hub's cache is the exception: its snapshots are links to files of the same repository.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    return file.resolve().is_relative_to(root)


def copy_companions(source: Path, target: Path) -> None:
    """Copy them as they are; none of them is read or executed."""
    for name in companions(source):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, place)
