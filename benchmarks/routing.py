"""Time what routing statistics add to a forward pass, and similarities from recorded logits, side by side.

A pass is 256 rows of 64 + 16 tokens through a Switch with 32 experts and 3 + 3 sparse layers, at d_model 256 / d_ff 1024
and at d_model 768 / d_ff 3072. By default every layer is sparse, which leaves the least other work to hide behind;
--dense puts a dense layer before each. All forms run in turn, again and again in the same run; a ratio is the median over
the repeats of (this form / plain pass) of the same repeat.

Targets, on two cores: all statistics <= 1.05 of the plain forward pass; router-logits similarity and usage from recorded
logits >= 100 times as fast as one cosine per pair of experts and one increment per token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run

SHAPES = {
    "256/1024": {"d_model": 256, "d_ff": 1024, "d_kv": 64, "num_heads": 4, "num_experts": 32},
    "768/3072": {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_experts": 32},
}
QUICK = {"32/64": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_experts": 8}}
SPARSE, INPUT, LABELS = 3, 64, 16
LIMIT, TIMES = 1.05, 100.0
_LEAST_MS = 20.0


def arguments() -> argparse.ArgumentParser:
    made = parser((__doc__ or "").strip(), "python benchmarks/routing.py --threads 2 --repeats 11 --out routing.json")
    made.set_defaults(threads=2)
    made.add_argument("--repeats", type=int, default=9, help="timed repeats of each form")
    made.add_argument("--rows", type=int, default=256, help="rows in a pass")
    made.add_argument("--batch-size", type=int, default=64, help="rows in a forward pass of the model")
    made.add_argument("--shape", choices=tuple(SHAPES), help="time only this shape")
    made.add_argument("--dense", action="store_true", help="a dense layer before each sparse one")
    made.add_argument("--reservoir", type=int, default=64, help="tokens per expert in the form that keeps tokens")
    made.add_argument("--device", default="cpu", help="device, such as cpu or cuda")
    made.add_argument(
        "--quick", action="store_true", help="a small shape, in seconds: checks the script, not the limits"
    )
    clock = "cpu: processor time of the process, for one thread on a machine that is busy with other work"
    made.add_argument("--clock", default="wall", choices=("wall", "cpu"), help=clock)
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def build(shape: dict[str, int], options: argparse.Namespace) -> Any:
    """A random Switch whose routers are decided enough that all experts are used."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    layers = SPARSE * (2 if options.dense else 1)
    depths = {"num_layers": layers, "num_decoder_layers": layers}
    sparse = {"num_sparse_encoder_layers": SPARSE, "num_sparse_decoder_layers": SPARSE}
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        **shape, **depths, **sparse, vocab_size=512, dropout_rate=0.0, router_jitter_noise=0.0, decoder_start_token_id=0
    )
    made = SwitchTransformersForConditionalGeneration(config).to(options.device).eval()
    for name, parameter in made.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, std=2 * config.d_model**-0.5)
    return made


def interleaved(
    forms: dict[str, Callable[[], Any]], repeats: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Milliseconds of each form, by repeat; the order turns from repeat to repeat.

    A form of a millisecond is called until 20 have gone by, as one call would time the waking of the threads.
    """
    import torch

    clock = time.perf_counter if options.clock == "wall" else time.process_time
    names, times = list(forms), {name: [] for name in forms}
    for repeat in range(-1, repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start, calls, spent = clock(), 0, 0.0
            while spent < _LEAST_MS:
                forms[name]()
                if options.device.startswith("cuda"):
                    torch.cuda.synchronize()
                calls, spent = calls + 1, 1000 * (clock() - start)
            if repeat >= 0:  # the first is a warm-up
                times[name].append(spent / calls)
    return times


def row(
    what: str, form: str, times: list[float], base: list[float], limit: str, inverse: bool = False
) -> dict[str, Any]:
    ratios = [(other / mine if inverse else mine / other) for mine, other in zip(times, base, strict=True)]
    spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
    median, ratio = statistics.median(times), statistics.median(ratios)
    return {"what": what, "form": form, "median_ms": median, "ratio": ratio, "spread": spread, "limit": limit}


# -- collecting ----------------------------------------------------------------------------------------------------
def collecting(name: str, shape: dict[str, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from mcsmoe.adapters.switch import SwitchAdapter
    from mcsmoe.statistics.routing import RoutingStatistics

    model, adapter = build(shape, options), SwitchAdapter()
    draw = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(2, 512, (size, INPUT), generator=draw).to(options.device),
            "attention_mask": torch.ones(size, INPUT, dtype=torch.int64, device=options.device),
            "labels": torch.randint(2, 512, (size, LABELS), generator=draw).to(options.device),
        }
        for size in [options.batch_size] * (options.rows // options.batch_size)
    ]

    def plain() -> None:
        for batch in batches:
            model(**batch, use_cache=False)

    def captured() -> None:
        with adapter.capture(model):
            plain()

    def collected(**settings: Any) -> RoutingStatistics:
        found = RoutingStatistics(**settings)
        with adapter.capture(model) as captured:
            for batch in batches:
                model(**batch, use_cache=False)
                found.update(captured.batches)
        return found

    forms: dict[str, Callable[[], Any]] = {
        "plain forward": plain,
        "capture alone": captured,
        "all statistics": collected,
        f"and {options.reservoir} tokens per expert": lambda: collected(reservoir=options.reservoir),
        "and input Gram matrices": lambda: collected(whiten=True),
    }
    used = [int((one.computed_E > 0).sum()) for one in collected().layers.values()]
    log.info("%s: experts used in the sparse layers: %s of %d", name, used, shape["num_experts"])
    times = interleaved(forms, options.repeats, options)
    base = times["plain forward"]
    return [
        row(name, form, its, base, f"<= {LIMIT:g}" if form == "all statistics" else "") for form, its in times.items()
    ]


# -- from what was recorded ----------------------------------------------------------------------------------------
def recorded(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One encoder layer's router logits: similarity and usage, ours and by one operation per pair and per token.

    Usage is counted from recorded choices, as routers report them, and from the logits themselves.
    """
    import torch
    from torch.nn import functional

    from mcsmoe.similarity.base import cosine, finish, gram, mapped

    tokens, experts = options.rows * INPUT, 8 if options.quick else 32
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).to(options.device)
    chosen_T = logits_TE.argmax(dim=1)

    def alike() -> torch.Tensor:
        return finish(mapped(cosine(gram([logits_TE.T]))))

    def alike_pair_by_pair() -> torch.Tensor:
        made_EE = torch.eye(experts)
        for i in range(experts):
            for j in range(i + 1, experts):
                found = functional.cosine_similarity(logits_TE[:, i], logits_TE[:, j], dim=0)
                made_EE[i, j] = made_EE[j, i] = (found + 1) / 2
        return made_EE

    def used(choices: Any) -> torch.Tensor:
        usage_E = torch.zeros(experts)
        for expert in choices:
            usage_E[expert] += 1
        return usage_E

    pairs = {
        "choices recorded": (
            lambda: (alike(), torch.bincount(chosen_T, minlength=experts)),
            lambda: (alike_pair_by_pair(), used(chosen_T)),
        ),
        "choices from logits": (
            lambda: (alike(), torch.bincount(logits_TE.argmax(dim=1), minlength=experts)),
            lambda: (alike_pair_by_pair(), used(logits_E.argmax() for logits_E in logits_TE)),
        ),
    }
    rows, forms = [], {}
    for name, (ours, slow) in pairs.items():
        left, right = ours(), slow()
        torch.testing.assert_close(left[0].float(), right[0].cpu(), rtol=0, atol=1e-5)
        torch.testing.assert_close(left[1].float(), right[1].to(left[1].device), rtol=0, atol=0)
        forms |= {f"{name}, one by one": slow, f"{name}, ours": ours}
    times = interleaved(forms, options.repeats, options)
    for form, its in times.items():
        base = times[form.rpartition(",")[0] + ", one by one"]
        limit = f">= {TIMES:g}" if form.endswith("ours") else ""
        rows.append(row(f"{tokens} x {experts} logits", form, its, base, limit, inverse=True))
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print("\n| what | form | median ms | ratio | spread | limit |\n|---|---|---|---|---|---|")
    for one in rows:
        print(
            f"| {one['what']} | {one['form']} | {one['median_ms']:.1f} | {one['ratio']:.3f} | {one['spread']} "
            f"| {one['limit']} |"
        )


def main(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    if options.repeats < 2:
        raise ValueError(f"--repeats is {options.repeats}; at least 2 are needed for a spread")
    if not 1 <= options.batch_size <= options.rows:
        raise ValueError(f"--batch-size is {options.batch_size}; give a number from 1 to --rows, {options.rows}")
    shapes = QUICK if options.quick else {options.shape: SHAPES[options.shape]} if options.shape else SHAPES
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name, shape in shapes.items():
            rows += collecting(f"d_model/d_ff {name}", shape, options)
        rows += recorded(options)
    print_table(rows)
    if options.out:
        from mcsmoe.artefacts.atomic import write_json

        settings = {key: value for key, value in vars(options).items() if key not in ("out", "log")}
        write_json(options.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    run(main, arguments().parse_args())
