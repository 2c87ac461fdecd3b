"""Time the decomposition of all experts of a layer, and the pruner inside a training step.

Decomposition: all experts at once against one full singular value decomposition per matrix (torch.linalg.svd, thin), in
turn and again and again in the same process, both giving factors and residual; the ratio is the median over the repeats
of (full / ours) of the same repeat. "flat" matrices are random, the hardest case: their singular values lie close together. "decaying" ones have
singular values 1 / k. The excess is (our reconstruction error / the exact one) - 1, from the full decomposition in
float64. Where a full decomposition of all matrices would take too long, some of them are decomposed and the time is scaled.
The target is for whole experts, both their matrices: a full decomposition takes a tall matrix in half the time of a wide
one, ours takes the same for both. "solver" is the share of the eigenproblems in our time.

Pruner: the share of observe and apply in a whole step (forward, backward, clipping, AdamW, pruner) of a compressed Switch
with 3 + 3 sparse layers merged to 8 experts each, on 32 rows of 64 + 16 tokens.

On a machine that is busy with other work, --clock cpu --threads 1 compares processor time, which others disturb less.

Targets, on two cores: decomposition >= 4 times one full decomposition per matrix at an excess <= 1e-4; the pruner <= 5 %
of a training step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run

EXPERTS = 32
SHAPES = [(256, 1024), (768, 3072)]  # (d_model, d_ff)
RATIO, EXCESS, SHARE = 4.0, 1e-4, 0.05


def arguments() -> argparse.ArgumentParser:
    made = parser(
        (__doc__ or "").strip(), "python benchmarks/decompose.py --threads 2 --repeats 5 --out decompose.json"
    )
    made.set_defaults(threads=2)
    made.add_argument("--repeats", type=int, default=5, help="timed repeats")
    made.add_argument("--rank", type=int, default=32, help="rank of the factors")
    made.add_argument("--sample", type=int, default=8, help="matrices of d_model 768 that are fully decomposed")
    made.add_argument("--steps", type=int, default=9, help="timed training steps")
    made.add_argument("--only", choices=("decompose", "pruner"), help="time only this")
    made.add_argument("--device", default="cpu", help="device, such as cpu or cuda")
    made.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="time that passed, or processor time")
    made.add_argument("--quick", action="store_true", help="few matrices, two repeats, the small model only: seconds")
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def seconds(function: Callable[[], Any], options: argparse.Namespace) -> float:
    import torch

    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    start = clock()
    function()
    if options.device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


# -- decomposition -----------------------------------------------------------------------------------------------
def matrices(kind: str, count: int, out: int, inner: int, device: str) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    flat_Goi = torch.randn(count, out, inner, generator=generator)
    if kind == "decaying":
        small = min(out, inner)
        left = torch.linalg.qr(torch.randn(out, small, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(inner, small, generator=generator)).Q
        decaying = (left / torch.arange(1.0, small + 1)) @ right.T
        # Signs of rows and columns make the matrices differ and keep their singular values.
        flat_Goi = flat_Goi[:, :, :1].sign() * decaying * flat_Goi[:, :1, :].sign()
    return flat_Goi.to(device)


def compare(kind: str, out: int, inner: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from mcsmoe.compress.lowrank import decompose

    count = 4 if options.quick else EXPERTS
    sampled = min(count, 2 if options.quick else EXPERTS if out * inner < 10**6 else options.sample)
    stack_Goi = matrices(kind, count, out, inner, options.device)
    rank = options.rank

    def full() -> None:
        for matrix in stack_Goi[:sampled]:
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            root_R = s[:rank].sqrt()
            torch.addmm(matrix, u[:, :rank] * root_R, root_R[:, None] * v[:rank], alpha=-1)

    factors = decompose(stack_Goi[:sampled], rank)
    values = torch.linalg.svdvals(stack_Goi[:sampled].double())
    exact = values[:, rank:].square().sum(dim=1).sqrt()
    product = factors.u_GoR.double() @ factors.v_GRi.double()
    excess = float((torch.linalg.matrix_norm(stack_Goi[:sampled].double() - product) / exact - 1).max())
    torch.linalg.svd(stack_Goi[0], full_matrices=False)  # warm
    slow, fast = [], []
    for _ in range(options.repeats):
        slow.append(seconds(full, options) * count / sampled)
        fast.append(seconds(lambda: decompose(stack_Goi, rank), options))
    return {
        "matrices": kind,
        "shape": [count, out, inner],
        "full_s": statistics.median(slow),
        "ours_s": statistics.median(fast),
        "ratio": statistics.median(a / b for a, b in zip(slow, fast, strict=True)),
        "excess": excess,
        "solver_share": solver_share(stack_Goi, options) / statistics.median(fast),
    }


def solver_share(stack_Goi: Any, options: argparse.Namespace) -> float:
    """Seconds of the eigenproblems alone: what ours cannot be faster than."""
    from mcsmoe.compress import lowrank

    tall_GMm = stack_Goi if stack_Goi.shape[1] >= stack_Goi.shape[2] else stack_Goi.mT
    times = []
    for _ in range(options.repeats):
        gram_Gmm = lowrank._gram(tall_GMm)  # the solver overwrites it
        times.append(seconds(partial(lowrank._top_eigen, gram_Gmm, options.rank + 8), options))
    return statistics.median(times)


def whole_experts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Both matrices of an expert together."""
    full, ours = (sum(row[key] for row in rows) for key in ("full_s", "ours_s"))
    excess = max(row["excess"] for row in rows)
    name = f"{rows[0]['shape'][0]} experts"
    kind = rows[0]["matrices"]
    made = {"matrices": kind, "shape": [name], "full_s": full, "ours_s": ours, "ratio": full / ours, "excess": excess}
    return made | {"solver_share": sum(row["solver_share"] * row["ours_s"] for row in rows) / ours}


# -- pruner ------------------------------------------------------------------------------------------------------
def compressed(d_model: int, d_ff: int, options: argparse.Namespace) -> Any:
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    from mcsmoe.adapters.switch import SwitchAdapter
    from mcsmoe.compress.lowrank import decompose

    torch.manual_seed(0)
    layers = 1 if d_model > 256 else 3
    config = SwitchTransformersConfig(
        vocab_size=32128,
        d_model=d_model,
        d_ff=d_ff,
        d_kv=64,
        num_heads=d_model // 64,
        num_layers=layers,
        num_decoder_layers=layers,
        num_sparse_encoder_layers=layers,
        num_sparse_decoder_layers=layers,
        num_experts=8,
        decoder_start_token_id=0,
    )
    model, adapter = SwitchTransformersForConditionalGeneration(config), SwitchAdapter()
    for layer in adapter.layers(model):
        weights = adapter.read_experts(model, layer)
        factors = {name: decompose(weights.tensors[name], options.rank) for name in weights.tensors}
        adapter.write_compressed(model, layer, factors, {}, torch.arange(8))
    return model.to(options.device).train()


def prune(d_model: int, d_ff: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from mcsmoe.compress.residual import KeptSchedule, ResidualPruner
    from mcsmoe.modules import residuals

    model = compressed(d_model, d_ff, options)
    # Half-way down the schedule, where rows are both kept and zeroed.
    pruner = ResidualPruner(residuals(model), KeptSchedule(0.1, 1000, 0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows, start = 8 if options.quick else 32, 250
    batch = {
        "input_ids": torch.randint(2, 32128, (rows, 64), device=options.device),
        "labels": torch.randint(2, 32128, (rows, 16), device=options.device),
    }
    whole, part = [], []
    for step in range(options.steps + 2):  # the first two warm up

        def gradients() -> None:
            model(**batch).loss.backward()

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        times = [
            seconds(gradients, options),
            seconds(pruner.observe, options),
            seconds(update, options),
            seconds(partial(pruner.apply, start + step), options),
        ]
        whole.append(sum(times))
        part.append(times[1] + times[3])
    return {
        "shape": [d_model, d_ff],
        "residual_entries": sum(one.numel() for one in residuals(model).values()),
        "step_s": statistics.median(whole[2:]),
        "pruner_s": statistics.median(part[2:]),
        "share": statistics.median(a / b for a, b in zip(part[2:], whole[2:], strict=True)),
    }


def main(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    if options.quick:
        options.repeats, options.steps = 2, 3
    found: dict[str, list[dict[str, Any]]] = {"decompose": [], "pruner": []}
    if options.only != "pruner":
        print(f"rank {options.rank}, {options.threads} threads, median of {options.repeats}; target >= {RATIO}x")
        print(f"{'matrices':10} {'G x o x i':>16} {'full':>9} {'ours':>9} {'ratio':>7} {'excess':>9} {'solver':>7}")
        for kind in ("flat", "decaying"):
            for d_model, d_ff in SHAPES:
                log.info("timing %s matrices, d_model %d, d_ff %d", kind, d_model, d_ff)
                rows = [compare(kind, d_ff, d_model, options), compare(kind, d_model, d_ff, options)]
                rows.append(whole_experts(rows))
                found["decompose"] += rows
                for row in rows:
                    shape = " x ".join(map(str, row["shape"]))
                    missed = len(row["shape"]) == 1 and (row["ratio"] < RATIO or row["excess"] > EXCESS)
                    print(
                        f"{kind:10} {shape:>16} {row['full_s']:>8.3f}s {row['ours_s']:>8.3f}s {row['ratio']:>6.2f}x "
                        f"{row['excess']:>9.1e} {row['solver_share']:>6.0%}{'  missed' if missed else ''}"
                    )
    if options.only != "decompose":
        print(f"pruner in a training step, median of {options.steps}; target <= {SHARE:.0%}")
        print(f"{'D x F':>12} {'residual':>9} {'step':>9} {'pruner':>9} {'share':>7}")
        for d_model, d_ff in [(256, 1024)] if options.quick else [(256, 1024), (768, 3072)]:
            log.info("timing the pruner, d_model %d", d_model)
            row = prune(d_model, d_ff, options)
            found["pruner"].append(row)
            print(
                f"{d_model:>5} x {d_ff:>4} {row['residual_entries'] / 1e6:>8.1f}M {row['step_s']:>8.3f}s "
                f"{row['pruner_s']:>8.4f}s {row['share']:>6.1%}{'  missed' if row['share'] > SHARE else ''}"
            )
    if options.out:
        options.out.write_text(json.dumps({"threads": options.threads, **found}, indent=1) + "\n")


if __name__ == "__main__":
    run(main, arguments().parse_args())
