"""``--target-size``: how many experts, in how many bits or with what novices, by what is predicted to lose least."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

from mcsmoe.checkpoint.quantised.settings import settings_of
from mcsmoe.cli._calibrated import Calibrated
from mcsmoe.cli._reduce import all_limits, least_fewest, workspace
from mcsmoe.cli.options import pass_options
from mcsmoe.compress.quantise import BITS
from mcsmoe.console import log
from mcsmoe.criteria.quadratic import Limits
from mcsmoe.export.packed import Packing
from mcsmoe.methods import AUTO, TRIED_BUDGETS, TRIED_CRITERIA
from mcsmoe.transform.on_disk import CheckpointLayers
from mcsmoe.transform.sizing import Alternative, Sizes, Wanted, alternatives, novice_alternatives
from mcsmoe.transform.sizing_novices import CONSTANT, RANKS, remainders
from mcsmoe.types import LayerId

SIZES = "sizes.json"
"""The ways to come down to the size that was asked for, and the error predicted for each."""


def check(arguments: argparse.Namespace) -> None:
    """Refuse what has no size of its own to be found.

    Raises:
        ValueError: a number of experts is given too, or another one answers for a dropped expert, or the budget is not by
            error, or options contradict each other; names the option.
    """
    if arguments.experts is not None or arguments.remove is not None:
        raise ValueError("--target-size finds the number of experts: leave out --experts and --remove")
    if arguments.dropped == "redirect":
        raise ValueError("--target-size predicts no error of --dropped redirect; take delete, constant, affine or auto")
    if arguments.dropped not in ("delete", AUTO) and arguments.bits is not None:
        raise ValueError(f"--bits {arguments.bits} packs a stock checkpoint: leave out --dropped {arguments.dropped}")
    if arguments.budget not in (*TRIED_BUDGETS, AUTO):
        raise ValueError(f"--target-size predicts errors: take --budget {', '.join(TRIED_BUDGETS)} or {AUTO}")
    if arguments.budget == "predicted" and arguments.bits is not None:
        raise ValueError(f"--bits {arguments.bits} packs a stock checkpoint: take --budget uniform or {AUTO}")


def fit(calibrated: Calibrated, limits: Mapping[LayerId, Limits]) -> dict[str, Any]:
    """Settle number of experts, budget, bits and what becomes of dropped experts, in the command's arguments.

    Returns:
        The table of all alternatives, as a JSON page by name.

    Raises:
        ValueError: nothing comes down to the size.
    """
    source, arguments = calibrated.source, calibrated.arguments
    target = arguments.target_size
    budgets = TRIED_BUDGETS if arguments.budget == AUTO else (arguments.budget,)
    bits = BITS if arguments.bits is None else (arguments.bits,)
    group = None
    if "uniform" in budgets and not settings_of(source.config):
        try:
            group = Packing(bits[0], arguments.group_size).check(
                source.folder, source.tensors.infos, len(source.layers)
            )
        except ValueError as error:
            if arguments.bits is not None:
                raise
            log.info("fewer bits are no way here: %s", error)
    layers = CheckpointLayers(source)
    weights = sum(info.nbytes for info in source.tensors.infos.values())
    sizes = Sizes.of(layers, weights, source.weight_bytes - weights, group, bits)
    criterion = TRIED_CRITERIA[0] if arguments.criterion == AUTO else arguments.criterion
    bounds = all_limits(calibrated, True, limits)
    found: list[Alternative] = []
    statistics = calibrated.layers(source.layers)
    if arguments.dropped in ("delete", AUTO):
        wanted = Wanted(target, sizes, budgets, bounds, criterion, least_fewest(calibrated, True))
        # Novices may come down to a size that deleting cannot: a router that is cut must find enough to choose from.
        with suppress(ValueError) if arguments.dropped == AUTO else nullcontext():
            found += alternatives(layers, statistics, wanted, group)
    if arguments.dropped != "delete":
        # The router is as it was, so that any number of experts will do.
        bounds = all_limits(calibrated, False, limits)
        wanted = Wanted(target, sizes, budgets, bounds, criterion, least_fewest(calibrated, False))
        with workspace(arguments) as work:
            ranks = _ranks(arguments, min(layers.structure(layer).read_experts().d_model for layer in source.layers))
            left = remainders(source.folder, calibrated.texts(), ranks, pass_options(arguments), work)
        found += novice_alternatives(left, statistics, wanted)
    if arguments.bits is not None:
        found = [one for one in found if one.bits is not None] or found
    if not found:
        raise ValueError(
            f"nothing comes down to {target / 1e9:.3f} GB; give another --target-size, or --dropped {AUTO}"
        )
    found.sort(key=lambda one: one.error)
    for number, one in enumerate(found):
        log.info("%s: %s", "taken" if not number else "not taken", _words(one))
    chosen = found[0]
    arguments.experts, arguments.budget, arguments.bits = chosen.experts, chosen.budget, chosen.bits
    arguments.group_size = None if chosen.bits is None else group
    arguments.dropped, arguments.rank = chosen.dropped, chosen.rank or arguments.rank
    return {SIZES: {"target": target, "alternatives": [vars(one) | {"error": one.error} for one in found]}}


def _ranks(arguments: argparse.Namespace, width: int) -> list[int]:
    """Ranks of novices that are looked at; ``CONSTANT`` for none."""
    affine = [rank for rank in RANKS if rank < width] if arguments.rank is None else [arguments.rank]
    constant = [CONSTANT] if arguments.dropped in ("constant", AUTO) else []
    return constant + (affine if arguments.dropped in ("affine", AUTO) else [])


def _words(one: Alternative) -> str:
    bits = "weights as they are" if one.bits is None else f"{one.bits} bits a weight"
    others = {"delete": "", "constant": ", constant novices", "affine": f", novices of rank {one.rank}"}[one.dropped]
    return (
        f"{one.experts} experts a layer ({one.budget}){others}, {bits}: {one.bytes / 1e9:.3f} GB, predicted error {one.error:.4f} "
        f"({one.pruned:.4f} of pruning, {one.rounded:.4f} of rounding)"
    )
