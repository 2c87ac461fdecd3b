"""Time neuron alignment against one process that solves the assignments one by one, and find what bounds it.

Both run in turn, again and again, in the same process; the ratio is the median over the repeats of (one by one / ours).
"One by one" is one product of inputs, one of outputs and one call of scipy's solver per expert. The share of the solver
is its time within that; alignment cannot be faster than that share spread over the workers, whatever the rest costs.

"related" experts are copies of one, as in a model grown from a dense one, with other neuron orders and noise of half the
size of the weights; "independent" ones have nothing in common, which is the hardest case for a solver.

On a machine that others use, too, look at the processor seconds: time that was waited for a core does not count there,
so two cores of their own would take at least half of ours and, of one by one, all of the solver's share.

Target, on two cores: at least 1.5 times one by one. Solvers that are installed (lap, lapx) are timed on the same
matrices for comparison; none is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run

SHAPES = {(256, 1024): (32, 8), (768, 3072): (32, 4)}  # (d_model, d_ff): experts, and with --quick
TARGET = 1.5


def arguments() -> argparse.ArgumentParser:
    made = parser((__doc__ or "").strip(), "python benchmarks/align.py --threads 2 --repeats 5 --out align.json")
    made.set_defaults(threads=2)
    made.add_argument("--repeats", type=int, default=5, help="timed repeats")
    made.add_argument("--quick", action="store_true", help="few experts and two repeats: seconds")
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def build(kind: str, experts: int, d_model: int, d_ff: int) -> Any:
    """Stacked experts of one layer."""
    import torch

    from mcsmoe.align import apply_permutation
    from mcsmoe.types import ExpertWeights, Role

    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> ExpertWeights:
        shapes = {"wi": (d_ff, d_model), "wo": (d_model, d_ff)}
        tensors = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
        return ExpertWeights(tensors, {"wi": Role.INPUT, "wo": Role.OUTPUT})

    if kind == "independent":
        return draw(experts)
    weights, noise = draw(1).select(torch.zeros(experts, dtype=torch.int64)), draw(experts)
    order_EF = torch.stack([torch.randperm(d_ff, generator=generator) for _ in range(experts)])
    moved = apply_permutation(weights, order_EF)
    return moved.map(lambda name, tensor: tensor.add_(noise.tensors[name], alpha=0.5))


def one_by_one(weights: Any) -> Any:
    """Every expert to expert 0, one after another."""
    import torch
    from scipy.optimize import linear_sum_assignment

    wi, wo = weights.tensors["wi"], weights.tensors["wo"]
    orders = [torch.arange(wi.shape[1])]
    for expert in range(1, wi.shape[0]):
        cost_FF = wi[0] @ wi[expert].t()
        cost_FF += wo[0].t() @ wo[expert]
        orders.append(torch.from_numpy(linear_sum_assignment(cost_FF.numpy(), maximize=True)[1]))
    return torch.stack(orders)


def ours(weights: Any, workers: int) -> Any:
    import torch

    from mcsmoe.align import align_by_weight

    first_E = torch.zeros(weights.num_experts, dtype=torch.int64)
    return align_by_weight(weights, first_E, workers=workers).permutation_EF


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock and of processors, over all threads."""
    start, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - used


def solvers() -> dict[str, Callable[[Any], Any]]:
    """Assignment solvers that maximise, by name."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    from mcsmoe.align import _solve

    found: dict[str, Callable[[Any], Any]] = {
        "scipy": lambda matrix: linear_sum_assignment(matrix, maximize=True)[1],
        "scipy, columns reduced first (ours)": lambda matrix: _solve(matrix)[0],
    }
    for name in ("lap", "lapx"):
        try:
            module = import_module(name)
        except ImportError:
            continue
        found[f"{name}.lapjv"] = lambda matrix, module=module: module.lapjv(np.negative(matrix, dtype=np.float64))[1]
    return found


def measure(kind: str, experts: int, d_model: int, d_ff: int, options: argparse.Namespace) -> dict[str, Any]:
    weights = build(kind, experts, d_model, d_ff)
    matrices = [
        (
            weights.tensors["wi"][0] @ weights.tensors["wi"][e].t()
            + weights.tensors["wo"][0].t() @ weights.tensors["wo"][e]
        )
        for e in range(1, min(experts, 9))
    ]
    matrices = [matrix.numpy() for matrix in matrices]
    same = bool((one_by_one(weights) == ours(weights, options.threads)).all())  # also warms both up
    plain, fast, share, used = [], [], [], []
    by_solver: dict[str, list[float]] = {name: [] for name in solvers()}
    for _ in range(options.repeats):
        both = seconds(lambda: one_by_one(weights)), seconds(lambda: ours(weights, options.threads))
        plain.append(both[0][0])
        fast.append(both[1][0])
        used.append([both[0][1], both[1][1]])
        for name, solve in solvers().items():
            clock, _ = seconds(lambda solve=solve: [solve(one) for one in matrices])
            by_solver[name].append(clock / len(matrices))
        share.append(by_solver["scipy"][-1] * (experts - 1) / plain[-1])
    ratios = [slow / quick for slow, quick in zip(plain, fast, strict=True)]
    solved = statistics.median(by_solver["scipy, columns reduced first (ours)"]) * (experts - 1)
    return {
        "experts": kind,
        "shape": [experts, d_model, d_ff],
        "one_by_one_s": statistics.median(plain),
        "ours_s": statistics.median(fast),
        "ratio": statistics.median(ratios),
        "processor_s": [statistics.median(column) for column in zip(*used, strict=True)],
        "solver_share_one_by_one": statistics.median(share),
        "ours_over_solver_bound": statistics.median(fast) / (solved / options.threads),
        "same_permutations": same,
        "solver_ms": {name: 1e3 * statistics.median(times) for name, times in by_solver.items()},
    }


def main(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    options.repeats = 2 if options.quick else options.repeats
    found = []
    print(f"alignment to expert 0, {options.threads} threads, median of {options.repeats}; target >= {TARGET}x")
    head = (
        "experts",
        "E x D x F",
        "one by one",
        "ours",
        "ratio",
        "processors",
        "solver's share",
        "ours / bound",
        "same",
    )
    print("{:12} {:>15} {:>11} {:>9} {:>7} {:>17} {:>15} {:>13} {:>5}".format(*head))
    for (d_model, d_ff), (full, few) in SHAPES.items():
        for kind in ("related", "independent"):
            log.info("timing %s experts, d_model %d, d_ff %d", kind, d_model, d_ff)
            row = measure(kind, few if options.quick else full, d_model, d_ff, options)
            found.append(row)
            shape = " x ".join(map(str, row["shape"]))
            print(
                f"{kind:12} {shape:>15} {row['one_by_one_s']:>10.3f}s {row['ours_s']:>8.3f}s {row['ratio']:>6.2f}x "
                f"{'{:.2f}s and {:.2f}s'.format(*row['processor_s']):>17} "
                f"{row['solver_share_one_by_one']:>15.0%} {row['ours_over_solver_bound']:>12.2f}x "
                f"{'yes' if row['same_permutations'] else 'NO':>5}"
            )
    print("\nsolver alone, milliseconds per assignment")
    for row in found:
        times = ", ".join(f"{name} {value:.1f}" for name, value in row["solver_ms"].items())
        print(f"{row['experts']:12} d_ff {row['shape'][2]}: {times}")
    if options.out:
        options.out.write_text(json.dumps({"threads": options.threads, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    run(main, arguments().parse_args())
