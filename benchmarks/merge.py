"""Measure merging against the memory's speed: bytes it must move, share of the copy bandwidth reached, extra memory.

Merging has to read every expert once and write every merged expert once; it can be no faster than that traffic at the
speed of a plain copy between two buffers that exist. Copy and merge run in turn, again and again; the share is the
median over the repeats of (bytes / time) over (bytes copied / time) of the same repeat. "first touch" is the same copy
into memory that the system must still hand out, as it must for the merged experts: the bound is what has to be read, at
the speed of a copy, and what has to be written, at that of a first touch.

Extra memory is the peak of the process during the call over what it held before, the merged experts included. Target:
apart from the merged experts at most one layer's experts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run

SHAPES = ((256, 1024), (768, 3072))  # d_model, d_ff
METHODS = ("frequency", "uniform", "fisher", "prune", "git-rebasin")


def arguments() -> argparse.ArgumentParser:
    made = parser((__doc__ or "").strip(), "python benchmarks/merge.py --threads 2 --repeats 15 --out merge.json")
    made.set_defaults(threads=2)
    made.add_argument("--experts", type=int, default=32, help="experts of the layer")
    made.add_argument("--groups", type=int, default=8, help="experts it is merged to")
    made.add_argument("--repeats", type=int, default=9, help="timed repeats")
    made.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="number format of the weights"
    )
    made.add_argument("--quick", action="store_true", help="the small shape, two repeats and no alignment: seconds")
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def inputs(options: argparse.Namespace, d_model: int, d_ff: int) -> Any:
    import torch

    from mcsmoe.merge.base import MergeInputs
    from mcsmoe.types import ExpertWeights, Grouping, Role

    generator = torch.Generator().manual_seed(0)
    dtype, experts, groups = getattr(torch, options.dtype), options.experts, options.groups
    shapes = {"wi": (d_ff, d_model), "wo": (d_model, d_ff)}
    tensors = {name: torch.randn(experts, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    weights = ExpertWeights(tensors, {"wi": Role.INPUT, "wo": Role.OUTPUT})
    grouping = Grouping(torch.arange(experts) % groups, torch.arange(groups))
    frequency_E = torch.rand(experts, generator=generator).softmax(dim=0)
    fisher = weights.map(lambda _, tensor: tensor.square())
    return MergeInputs("layer", weights, grouping, frequency_E, fisher=fisher, workers=options.threads)


def size(weights: Any) -> int:
    """Bytes of stacked experts."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.tensors.values())


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    made = function()
    spent = time.perf_counter() - start
    del made
    return spent


def peak_over_held(function: Callable[[], Any]) -> int:
    """Bytes by which the process grows at most during a call (Linux)."""
    libc = ctypes.CDLL("libc.so.6")
    # Give freed memory back first: what is reused would not show as growth.
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    made = function()
    peak = _status("VmHWM")
    del made
    return peak - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}; this measurement needs Linux")


def measure(options: argparse.Namespace, d_model: int, d_ff: int) -> list[dict[str, Any]]:
    import torch

    from mcsmoe.merge import METHODS as MERGE

    given = inputs(options, d_model, d_ff)
    source = given.weights.tensors["wi"]
    target, copied = torch.empty_like(source), 2 * source.numel() * source.element_size()
    target.copy_(source)
    rows = []
    for method in METHODS:
        if options.quick and method == "git-rebasin":
            continue
        merge = MERGE[method]
        log.info("%s at d_model %d, d_ff %d", method, d_model, d_ff)
        layer, merged = size(given.weights), size(merge(given).weights)
        read = {"fisher": layer + size(given.fisher), "prune": layer + merged}.get(method, layer)
        times, shares, copies, touches, bounds = [], [], [], [], []
        for _ in range(1 if method == "git-rebasin" else options.repeats):
            copies.append(seconds(lambda: target.copy_(source)))
            touches.append(seconds(source.clone))
            times.append(seconds(lambda merge=merge: merge(given)))
            shares.append((read + merged) / times[-1] / (copied / copies[-1]))
            bounds.append((read / copied * copies[-1] + 2 * merged / copied * touches[-1]) / times[-1])
        rows.append(
            {
                "method": method,
                "shape": [options.experts, options.groups, d_model, d_ff],
                "moved_bytes": read + merged,
                "seconds": statistics.median(times),
                "bandwidth": (read + merged) / statistics.median(times),
                "copy_bandwidth": copied / statistics.median(copies),
                "first_touch_bandwidth": copied / statistics.median(touches),
                "share_of_copy": statistics.median(shares),
                "share_of_bound": statistics.median(bounds),
                "extra_over_output": (peak_over_held(lambda merge=merge: merge(given)) - merged) / layer,
            }
        )
    return rows


def main(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    options.repeats = 2 if options.quick else options.repeats
    found = []
    print(
        f"{options.experts} experts to {options.groups}, {options.dtype}, {options.threads} threads, "
        f"median of {options.repeats}; extra memory in layers of experts, merged ones not counted, target <= 1"
    )
    head = ("method", "D x F", "moved", "time", "GB/s", "copy", "first touch", "share of copy", "of bound", "extra")
    print("{:12} {:>12} {:>9} {:>9} {:>7} {:>7} {:>12} {:>14} {:>9} {:>7}".format(*head))
    for d_model, d_ff in SHAPES[:1] if options.quick else SHAPES:
        for row in measure(options, d_model, d_ff):
            found.append(row)
            print(
                f"{row['method']:12} {f'{d_model} x {d_ff}':>12} {row['moved_bytes'] / 2**20:>5.0f} MiB "
                f"{1e3 * row['seconds']:>6.1f} ms {row['bandwidth'] / 1e9:>7.2f} {row['copy_bandwidth'] / 1e9:>7.2f} "
                f"{row['first_touch_bandwidth'] / 1e9:>12.2f} {row['share_of_copy']:>14.0%} "
                f"{row['share_of_bound']:>9.0%} "
                f"{row['extra_over_output']:>7.2f}"
            )
    if options.out:
        options.out.write_text(json.dumps({"threads": options.threads, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    run(main, arguments().parse_args())
