"""Time stock, merged and compressed sparse layers, and whole models of switch-base-32's shape, side by side.

Every form is timed in the same run, in turn and again and again, so that whatever else the machine does falls on all
of them; the ratio is the median over the repeats of (stock time / this form's time) of the same repeat.

Targets, on two cores in float32: one layer compressed >= 3x as fast as the stock layer, merged not slower; a 12 + 12
layer model end to end compressed >= 1.3x as fast, merged at least as fast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run

SHAPE = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_experts": 32}
QUICK = {"d_model": 96, "d_ff": 192, "d_kv": 16, "num_heads": 6, "num_experts": 8}
ROWS, LENGTH = 8, 256
BLOCKS = 12
TARGETS = {
    ("layer", "compressed"): 3.0,
    ("layer", "merged"): 1.0,
    ("model", "compressed"): 1.3,
    ("model", "merged"): 1.0,
}


def arguments() -> argparse.ArgumentParser:
    made = parser(
        (__doc__ or "").strip(), "python benchmarks/layers.py --threads 2 --repeats 21 --out benchmarks/layers.json"
    )
    made.set_defaults(threads=2)
    made.add_argument(
        "--repeats", type=int, default=15, help="timed repeats of one layer; a model is timed a third as often"
    )
    made.add_argument("--groups", type=int, default=8, help="experts left in a merged layer")
    made.add_argument("--rank", type=int, default=32, help="rank of the compressed matrices")
    made.add_argument("--keep", type=float, default=0.1, help="share of residual rows kept")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="number format")
    made.add_argument("--device", default="cpu", help="device, such as cpu or cuda")
    made.add_argument("--labels", type=int, nargs="*", default=[256, 8], help="decoder tokens of the models timed")
    made.add_argument("--only", choices=("layer", "model"), help="time only this")
    made.add_argument(
        "--quick", action="store_true", help="a small shape, in seconds: checks the script, not the targets"
    )
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


# -- what is timed -----------------------------------------------------------------------------------------------
def build(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Three random models that share what merging leaves alone: ``stock``, ``merged`` and ``compressed``."""
    import torch
    from transformers import SwitchTransformersForConditionalGeneration
    from transformers.initialization import no_init_weights

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.types import CompressionSpec, LayerSpec

    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    experts, groups = config.num_experts, min(options.groups, config.num_experts)
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty(tensor.shape, dtype=dtype)
        if tensor.ndim == 1:
            return made.fill_(1.0).to(device)
        # Unit outputs for unit inputs; routers a good deal more decided, so that all experts are used.
        scale = 4.0 if ".router." in name else 1.0
        return made.normal_(0, scale * tensor.shape[-1] ** -0.5, generator=generator).to(device)

    shared: dict[str, Any] = {}

    def model(compression: Callable[[str, int], CompressionSpec | None] | None) -> Any:
        with torch.device("meta"), no_init_weights():
            made = SwitchTransformersForConditionalGeneration(config)
        made.tie_weights()
        adapter = adapter_for(made)
        if compression is not None:
            for layer in adapter.layers(made)[1:]:  # the paper leaves the first one alone
                table = [expert % groups for expert in range(experts)]
                adapter.install(made, layer, LayerSpec(groups, table, compression(layer, groups)))
        for path, module in made.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                full = f"{path}.{name}"
                if full not in shared:
                    shared[full] = torch.nn.Parameter(fill(full, parameter), requires_grad=False)
                setattr(module, name, shared[full])
            if hasattr(module, "row_index_N"):
                out = module.shape[1]
                rows = [torch.randperm(out, generator=generator)[:kept].sort()[0] for kept in module.kept_rows]
                module.row_index_N = torch.cat(rows).to(device=device, dtype=torch.int32)
            if hasattr(module, "expert_to_group"):
                module.expert_to_group = module.expert_to_group.to(device)
        made.tie_weights()
        return made.eval()

    def packed(_layer: str, count: int) -> CompressionSpec:
        sizes = {"wi": config.d_ff, "wo": config.d_model}
        return CompressionSpec(options.rank, {name: [round(options.keep * n)] * count for name, n in sizes.items()})

    return {"stock": model(None), "merged": model(lambda *_: None), "compressed": model(packed)}


def shape(options: argparse.Namespace, **changes: Any) -> Any:
    from transformers import SwitchTransformersConfig

    values = {
        **(QUICK if options.quick else SHAPE),
        "vocab_size": 512 if options.quick else 32128,
        "num_layers": 4 if options.quick else BLOCKS,
        "num_decoder_layers": 4 if options.quick else BLOCKS,
        "num_sparse_encoder_layers": 2 if options.quick else 6,
        "num_sparse_decoder_layers": 2 if options.quick else 6,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
        "decoder_start_token_id": 0,
    }
    return SwitchTransformersConfig(**{**values, **changes})


def attainable(options: argparse.Namespace, config: Any) -> Callable[[], Any]:
    """One dense feed-forward product of the same width on all tokens at once: the rate a sparse layer could reach."""
    import torch

    dtype, tokens = getattr(torch, options.dtype), ROWS * LENGTH
    left = torch.randn(tokens, config.d_model).to(options.device, dtype)
    right = torch.randn(config.d_ff, config.d_model).to(options.device, dtype)
    return lambda: torch.nn.functional.linear(left, right)


# -- timing ------------------------------------------------------------------------------------------------------
def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` runs of each, in turn, after two rounds of warm-up."""
    import torch

    def wait() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, once in runs.items():
            wait()
            start = time.perf_counter()
            once()
            wait()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1000)
    return times


def report(
    what: str, kind: str, runs: dict[str, Callable[[], Any]], rate_flops: int, repeats: int, device: str
) -> list[Any]:
    from mcsmoe.evaluate.cost import count_flops, spread

    flops = {name: rate_flops if name == "attainable" else count_flops(once) for name, once in runs.items()}
    times = interleaved(runs, repeats, device)
    peak = flops["attainable"] / statistics.median(times["attainable"])
    rows = []
    for name in [name for name in runs if name != "attainable"]:
        ratios = [stock / this for stock, this in zip(times["stock"], times[name], strict=True)]
        median = statistics.median(times[name])
        rows.append(
            {
                "what": what,
                "form": name,
                "median_ms": median,
                "spread_ms": spread(times[name]),
                "times_as_fast": statistics.median(ratios),
                "spread_ratio": spread(ratios),
                "gflop": flops[name] / 1e9,
                "flops_ratio": flops["stock"] / flops[name],
                "share_of_attainable": flops[name] / median / peak,
                "target": TARGETS.get((kind, name)),
            }
        )
    return rows


def print_table(rows: list[Any], peak: str) -> None:
    print(f"\nattainable matrix-multiply rate: {peak}\n")
    print(
        "| what | form | median ms | spread ms | times as fast | spread | by FLOPs | GFLOP | of attainable | target |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        target = "" if row["target"] is None else f">= {row['target']:g}"
        print(
            f"| {row['what']} | {row['form']} | {row['median_ms']:.1f} | {row['spread_ms']:.1f} "
            f"| {row['times_as_fast']:.2f} | {row['spread_ratio']:.2f} | {row['flops_ratio']:.2f} | {row['gflop']:.1f} "
            f"| {row['share_of_attainable']:.0%} | {target} |"
        )


def main(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    if options.repeats < 2:
        raise ValueError(f"--repeats is {options.repeats}; at least 2 are needed for a spread")
    rows: list[Any] = []
    rate = attainable(options, shape(options))
    rate_flops = 2 * ROWS * LENGTH * shape(options).d_model * shape(options).d_ff
    with torch.inference_mode():
        if options.only != "model":
            # One sparse layer is the second of the smallest model that has two: the first is left alone.
            small = {"num_layers": 2, "num_sparse_encoder_layers": 2, "num_decoder_layers": 1}
            models = build(options, shape(options, **small, num_sparse_decoder_layers=0, vocab_size=512))
            # What a sparse layer gets: normalised states.
            inputs = torch.randn(ROWS, LENGTH, shape(options).d_model).to(options.device, getattr(torch, options.dtype))
            place = "encoder.block.1.layer.1.mlp"
            runs: dict[str, Callable[[], Any]] = {
                name: partial(made.get_submodule(place), inputs) for name, made in models.items()
            }
            what = f"one layer, {ROWS * LENGTH} tokens"
            rows += report(what, "layer", {**runs, "attainable": rate}, rate_flops, options.repeats, options.device)
            del models, runs
        if options.only != "layer":
            config = shape(options)
            models = build(options, config)
            draw = torch.Generator().manual_seed(0)
            for labels in options.labels:
                tokens = {
                    "input_ids": torch.randint(3, config.vocab_size, (ROWS, LENGTH), generator=draw),
                    "decoder_input_ids": torch.randint(3, config.vocab_size, (ROWS, labels), generator=draw),
                }
                tokens = {name: ids.to(options.device) for name, ids in tokens.items()}
                runs = {name: partial(made, **tokens, use_cache=False) for name, made in models.items()}
                what = f"12 + 12 layers, {ROWS} x {LENGTH} in, {ROWS} x {labels} out"
                log.info("timing %s", what)
                repeats = max(3, options.repeats // 3)
                rows += report(what, "model", {**runs, "attainable": rate}, rate_flops, repeats, options.device)
        times = interleaved({"attainable": rate}, 10, options.device)["attainable"]
    peak = f"{rate_flops / statistics.median(times) / 1e6:.0f} GFLOP/s ({options.threads} threads, {options.dtype})"
    print_table(rows, peak)
    if options.out:
        from mcsmoe.artefacts.atomic import write_json

        settings = {key: value for key, value in vars(options).items() if key not in ("out", "log")}
        write_json(options.out, {"settings": settings, "attainable": peak, "rows": rows})


if __name__ == "__main__":
    run(main, arguments().parse_args())
