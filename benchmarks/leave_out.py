"""Leave experts out of a checkpoint in its files, and copy the same bytes with ``cp``: rates side by side.

The checkpoint is that of ``benchmarks/collect.py``. Files are dropped from the cache before each copy, and the copies take
turns, so that a disk that gets slower or faster on the way does not decide.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mcsmoe.console import log, parser, run


def arguments() -> argparse.ArgumentParser:
    made = parser(
        (__doc__ or "").strip(), "python benchmarks/leave_out.py --folder /tmp --out benchmarks/leave_out.json"
    )
    made.add_argument("--layers", type=int, default=7, help="blocks; 7 are 8.5 GB")
    made.add_argument("--width", type=int, default=2048, help="model width")
    made.add_argument("--experts", type=int, default=128, help="experts of a layer; every other one is kept")
    made.add_argument("--repeats", type=int, default=3, help="copies of each kind")
    made.add_argument("--quick", action="store_true", help="an eighth of the width and of the experts, 2 blocks")
    made.add_argument("--folder", type=Path, help="where the checkpoint is put for the time being")
    made.add_argument("--keep", type=Path, help="make the checkpoint here, or use the one that is here, and leave it")
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def forget(folder: Path) -> None:
    """Take the files of ``folder`` out of the system's cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size(folder: Path) -> int:
    """Bytes of the weights in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(options: argparse.Namespace) -> None:
    import torch
    from collect import make

    from mcsmoe.artefacts.atomic import write_json
    from mcsmoe.checkpoint.slicing import leave_experts
    from mcsmoe.checkpoint.streaming import Streamed

    if options.quick:
        options.width, options.experts, options.layers = options.width // 8, options.experts // 8, 2
    rates: dict[str, list[float]] = {"leave out": [], "cp": []}
    with tempfile.TemporaryDirectory(dir=options.keep.parent if options.keep else options.folder) as place:
        full = options.keep or Path(place) / "full"
        if not (full / "config.json").is_file():
            log.info("making the checkpoint")
            make(options, full)
        for _ in range(options.repeats):
            small, copy = Path(place) / "small", Path(place) / "copy"
            source = Streamed(full)
            kept = {layer: torch.arange(0, options.experts, 2) for layer in source.layers}
            forget(full)
            started = time.perf_counter()
            if not leave_experts(source, small, kept, {}):
                raise ValueError(f"{full}: its experts cannot be left out in the files")
            rates["leave out"].append(size(small) / (time.perf_counter() - started))
            forget(small)
            started = time.perf_counter()
            subprocess.run(["cp", "-r", str(small), str(copy)], check=True)
            rates["cp"].append(size(copy) / (time.perf_counter() - started))
            shutil.rmtree(small)
            shutil.rmtree(copy)
    rows = {name: statistics.median(found) for name, found in rates.items()}
    print("| way | GB/s, median | least | most |\n|---|---|---|---|")
    for name, found in rates.items():
        print(f"| {name} | {rows[name] / 1e9:.2f} | {min(found) / 1e9:.2f} | {max(found) / 1e9:.2f} |")
    print(f"\nleaving out runs at {rows['leave out'] / rows['cp']:.0%} of the rate of cp")
    if options.out:
        hidden = ("out", "log", "folder", "keep")
        settings = {key: value for key, value in vars(options).items() if key not in hidden}
        write_json(options.out, {"settings": settings, "bytes_per_second": rates})


if __name__ == "__main__":
    run(main, arguments().parse_args())
