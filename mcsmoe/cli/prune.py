"""``mcsmoe prune``: fewer experts, the others left out; what is left may be refitted to answer for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mcsmoe import methods
from mcsmoe.cli import options

RANK = 16

NAME = "prune"
HELP = """Leave out the experts of a Mixture-of-Experts checkpoint that a criterion says are needed least.

With --calibration layers are pruned in sequence, each on what the pruned layers before it give. What becomes of dropped
experts: delete (their router rows go too: a stock checkpoint), redirect (a kept one answers), constant or affine (a novice
answers: a vector, or two thin matrices). --refit solves for the output projections of what is left, in closed form, so that
the layer gives what it gave; it is worth more than any criterion.
"""
EXAMPLE = "mcsmoe prune full --calibration text.jsonl --experts 8 --criterion gram --refit --out pruned"

_SETTINGS = (
    *("experts", "remove", "target_size", "criterion", "dropped", "rank", "budget", "domains"),
    *("refit", "ridge", "refit_target", "bits", "group_size", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="stock checkpoint folder, or a model on the hub")
    options.add_number(parser)
    parser.add_argument(
        "--target-size",
        type=options.size,
        metavar="SIZE",
        help="bytes of the result, such as 12GB, in place of a number of experts: experts and bits by predicted error",
    )
    options.add_out(parser)
    options.add_prediction(parser)
    options.add_domains(parser)
    options.add_pass(parser)
    options.add_blend(parser)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--criterion",
        choices=(*methods.CRITERIA, methods.AUTO),
        default="gram",
        help="which experts stay; auto tries gram, mass and reap and takes what loses least on held-out rows",
    )
    group.add_argument(
        "--dropped",
        choices=(*methods.DROPPED, methods.AUTO),
        default="delete",
        help="what becomes of the others; auto, with --target-size, takes what is predicted to lose least",
    )
    group.add_argument(
        "--rank", type=int, help=f"of affine novices; {RANK} if none is given, or what --target-size finds"
    )
    group.add_argument(
        "--budget",
        choices=(*methods.PRUNING_BUDGETS, methods.AUTO),
        default="uniform",
        help="spread over the layers; auto tries uniform and predicted on held-out rows",
    )
    options.add_refit(group)
    options.add_packing(group)
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
    from mcsmoe.cli import _reduce, _size
    from mcsmoe.cli._calibrated import Calibrated
    from mcsmoe.cli._choose import CANDIDATES, choose
    from mcsmoe.cli._outputs import say_engines
    from mcsmoe.transform.reduce import Pruning, Reduction
    from mcsmoe.types import LayerId

    refitting = options.refitting(arguments)
    sized = arguments.target_size is not None
    if arguments.dropped == methods.AUTO and not sized:
        raise ValueError(f"--dropped {methods.AUTO} is of --target-size, which is not given; name one, or give a size")
    rank = RANK if arguments.rank is None else arguments.rank
    fitted = arguments.dropped == methods.AUTO or Pruning(dropped=arguments.dropped, rank=rank).needs_tokens
    if fitted and arguments.calibration is None:
        raise ValueError(
            f"--dropped {arguments.dropped} is fitted to tokens: give --calibration FILE, not --statistics alone"
        )
    source = Streamed(arguments.model)
    source.keeps_prediction = arguments.mtp == "keep"
    _reduce.check_whole(source)
    deletes = arguments.dropped == "delete"
    if sized:
        _size.check(arguments)
    else:
        packing = _reduce.packing(source, arguments, deletes)
    calibrated = Calibrated(source, arguments)
    if not sized:
        uniform = _reduce.counts(calibrated, deletes, budget="uniform")
    limits = _reduce.limits(calibrated)
    pages: dict[str, Any] = {}
    if sized:
        pages |= _size.fit(calibrated, limits)
        deletes = arguments.dropped == "delete"
        packing = _reduce.packing(source, arguments, deletes)
        uniform = _reduce.counts(calibrated, deletes, budget="uniform")
    arguments.rank = RANK if arguments.rank is None else arguments.rank
    if deletes:
        say_engines(source, uniform.values())
    if arguments.budget in ("uniform", methods.AUTO):
        for layer, limit in limits.items():
            limit.quota(uniform[layer], layer)
    first = methods.TRIED_CRITERIA[0] if arguments.criterion == methods.AUTO else arguments.criterion
    pages |= _reduce.mix(calibrated, uniform, first, limits)

    def plan(criterion: str, budget: str) -> tuple[Reduction, Mapping[LayerId, int]]:
        counts = _reduce.counts(calibrated, deletes, criterion, budget, limits)
        for layer, limit in limits.items():
            limit.quota(counts[layer], layer)
        how = Pruning(criterion, arguments.dropped, arguments.rank)
        return Reduction(how, refitting, limits, arguments.seed), counts

    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    auto = methods.AUTO in (arguments.criterion, arguments.budget)
    with _reduce.workspace(arguments) if auto else nullcontext() as work:
        layers, criterion, budget = None, arguments.criterion, arguments.budget
        if work is not None:
            found = choose(calibrated, criterion, budget, plan, work)
            layers, criterion, budget = found.layers, found.criterion, found.budget
            pages[CANDIDATES] = {"candidates": found.table}
            settings |= {"chosen_criterion": criterion, "chosen_budget": budget}
        reduction, counts = plan(criterion, budget)
        provenance = {"stage": "prune", "tool": "mcsmoe prune", "settings": settings, **source.origin}
        _reduce.reduce_checkpoint(calibrated, reduction, counts, provenance, layers, pages, packing)
