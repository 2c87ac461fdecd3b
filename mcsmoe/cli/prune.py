"""``mcsmoe prune``: fewer experts, the others left out; what is left may be refitted to answer for them."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import methods
from mcsmoe.cli import options

NAME = "prune"
HELP = """Leave out the experts of a Mixture-of-Experts checkpoint that a criterion says are needed least.

With --calibration layers are pruned in sequence, each on what the pruned layers before it give. What becomes of dropped
experts: delete (their router rows go too: a stock checkpoint), redirect (a kept one answers), constant or affine (a novice
answers: a vector, or two thin matrices). --refit solves for the output projections of what is left, in closed form, so that
the layer gives what it gave; it is worth more than any criterion.
"""
EXAMPLE = "mcsmoe prune full --calibration text.jsonl --experts 8 --criterion gram --refit --out pruned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="stock checkpoint folder, or a model on the hub")
    options.add_number(parser)
    options.add_out(parser)
    options.add_domains(parser)
    options.add_pass(parser)
    group = parser.add_argument_group("method")
    group.add_argument("--criterion", choices=tuple(methods.CRITERIA), default="gram", help="which experts stay")
    group.add_argument("--dropped", choices=methods.DROPPED, default="delete", help="what becomes of the others")
    group.add_argument("--rank", type=int, default=16, help="of affine novices")
    group.add_argument("--budget", choices=methods.PRUNING_BUDGETS, default="uniform", help="spread over the layers")
    options.add_refit(group)
    group.add_argument(
        "--protect", metavar="LIST", help="experts that stay: super (those with outlying outputs), or a JSON file"
    )
    group.add_argument("--drop", metavar="FILE", type=Path, help="experts that go: a JSON file of numbers by layer")
    group.add_argument(
        "--fewest",
        type=int,
        default=1,
        metavar="N",
        help="experts that every layer keeps at least, where the budget spreads them",
    )


def run(arguments: argparse.Namespace) -> None:
    """Prune every layer and write the result."""
    options.prepare(arguments)
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli import _reduce
    from mcsmoe.transform.reduce import Pruning, Reduction

    how = Pruning(arguments.criterion, arguments.dropped, arguments.rank)
    refitting = options.refitting(arguments)
    source = Streamed(arguments.model)
    _reduce.check_whole(source)
    counts = _reduce.counts(source, arguments, arguments.dropped == "delete", arguments.criterion)
    limits = _reduce.limits(source, arguments)
    for layer, limit in limits.items():
        limit.quota(counts[layer], layer)
    settings = {
        name: getattr(arguments, name)
        for name in ("experts", "remove", "criterion", "dropped", "rank", "budget", "refit", "ridge", "seed")
    }
    provenance = {"stage": "prune", "tool": "mcsmoe prune", "settings": settings, **source.origin}
    _reduce.reduce_checkpoint(source, arguments, Reduction(how, refitting, limits, arguments.seed), counts, provenance)
