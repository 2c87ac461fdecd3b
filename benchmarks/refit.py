"""Measure the refit of one sparse layer against a pass of its tokens through that layer, in processor seconds.

Tokens, weights and routing are random: nothing here depends on their values. Figures are ratios of processor time of one
thread, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mcsmoe.console import log, parser, run


def arguments() -> argparse.ArgumentParser:
    made = parser((__doc__ or "").strip(), "python benchmarks/refit.py --threads 1")
    made.set_defaults(threads=1)
    made.add_argument("--width", type=int, default=256, help="model width")
    made.add_argument("--inner", type=int, default=96, help="width of an expert")
    made.add_argument("--experts", type=int, default=16, help="experts that are left")
    made.add_argument("--choices", type=int, default=4, help="experts of a token")
    made.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="tokens, one figure for each")
    made.add_argument("--repeats", type=int, default=3, help="runs of each; the fastest counts")
    made.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return made


def fastest(repeats: int, work: Callable[[], object]) -> float:
    """Processor seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def measure(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Seconds of a pass through the layer's experts, and of refits with one ridge and with all candidates."""
    import torch

    from mcsmoe.refit.ridge import RIDGES, Block, RefitBatch, refit
    from mcsmoe.statistics.outputs import OutputSums

    generator = torch.Generator().manual_seed(0)
    width, inner, experts = options.width, options.inner, options.experts

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / size[-1] ** 0.5

    gates, ups, downs = draw(experts, inner, width), draw(experts, inner, width), draw(experts, width, inner)
    inputs_TD, target_TD = draw(tokens, width), draw(tokens, width)
    chosen_TK = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, : options.choices]
    weight_TK = torch.rand(tokens, options.choices, generator=generator)

    def hidden(expert: int, inputs_ND: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(inputs_ND @ gates[expert].T) * (inputs_ND @ ups[expert].T)

    outputs_TKD = torch.empty(tokens, options.choices, width)

    def forward() -> None:
        for expert in range(experts):
            token_N, choice_N = (chosen_TK == expert).nonzero(as_tuple=True)
            outputs_TKD[token_N, choice_N] = hidden(expert, inputs_TD[token_N]) @ downs[expert].T

    blocks = [Block(lambda x, e=e: hidden(e, x), downs[e]) for e in range(experts)]  # type: ignore[misc]
    cut = tokens * 9 // 10
    fitted, held = (
        [RefitBatch.of(inputs_TD[part], target_TD[part], chosen_TK[part], weight_TK[part], experts)]
        for part in (slice(0, cut), slice(cut, tokens))
    )
    with torch.no_grad():
        once = fastest(options.repeats, forward)
        return {
            "tokens": tokens,
            "pass": once,
            "sums over outputs": fastest(
                options.repeats, lambda: OutputSums.measured(outputs_TKD, chosen_TK, weight_TK, experts)
            )
            / once,
            "refit, one ridge": fastest(options.repeats, lambda: refit(blocks, fitted, held, RIDGES[-1:])) / once,
            "refit, ridge chosen": fastest(options.repeats, lambda: refit(blocks, fitted, held)) / once,
        }


def main(options: argparse.Namespace) -> None:
    """Measure and say."""
    import torch

    torch.set_num_threads(options.threads)
    found = [measure(options, tokens) for tokens in options.tokens]
    for row in found:
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row.items() if name not in ("tokens", "pass"))
        log.info("%d tokens: a pass takes %.3f s; over it: %s", row["tokens"], row["pass"], ratios)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run(main, arguments().parse_args())
