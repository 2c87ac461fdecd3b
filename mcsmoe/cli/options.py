"""Options that several commands have, and what is refused before anything heavy starts."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.workflow.method_options import add_method

if TYPE_CHECKING:
    from mcsmoe.calibration.layer_major import Options


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write; appears only once complete")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")


def add_prediction(parser: argparse._ActionsContainer) -> None:
    """What becomes of layers for multi-token prediction."""
    parser.add_argument(
        "--mtp",
        choices=("keep", "drop"),
        default="keep",
        help="layers for multi-token prediction: kept, with as many experts as the others get, or left out",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The text to calibrate on."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text: a line each (.txt), or rows with text, messages, prompt and completion, input and target, or "
        "input_ids (.jsonl, .parquet)",
    )
    add_rows(group, "rows drawn from the file")


def add_rows(group: argparse._ActionsContainer, drawn: str) -> None:
    """How much of the text is used, and how."""
    group.add_argument("--samples", type=int, default=256, help=drawn)
    group.add_argument("--batch-size", type=int, default=32, help="rows per forward pass")
    group.add_argument("--max-tokens", type=int, default=256, help="tokens of a row, per side")


def add_statistics(parser: argparse.ArgumentParser) -> None:
    """The text to calibrate on, or statistics that were collected before."""
    add_domains(parser)
    group = parser.add_argument_group("statistics to keep")
    group.add_argument("--save-statistics", type=Path, metavar="FILE", help="keep the statistics for other runs")
    add_pass(parser)


def add_domains(parser: argparse.ArgumentParser) -> None:
    """The text to calibrate on, domain by domain, or statistics that were collected before."""
    group = parser.add_argument_group("calibration")
    add_domain_files(group)
    group.add_argument("--statistics", type=Path, metavar="PATH", help="statistics collected or saved before, instead")


def add_blend(parser: argparse._ActionsContainer) -> None:
    """How much each domain counts."""
    parser.add_argument(
        "--domains",
        metavar="WEIGHTS",
        help="shares of the domains in what is decided: A=.5,B=.5, or max-min (the worst domain suffers least)",
    )


def add_domain_files(group: argparse._ActionsContainer, required: bool = False) -> None:
    """The text to calibrate on, domain by domain, and how much of it is used."""
    from mcsmoe.cli._domains import domain_file

    group.add_argument(
        "--calibration",
        type=domain_file,
        action="append",
        required=required,
        metavar="[DOMAIN=]FILE[:WEIGHT]",
        help="text (.txt, .jsonl, .parquet), once for each domain; a weight is the domain's share of the tokens",
    )
    add_rows(group, "rows drawn in all, shared by weight")
    group.add_argument(
        "--pack",
        type=int,
        metavar="LENGTH",
        help="join the texts and cut them to rows of so many tokens, in place of --max-tokens",
    )
    group.add_argument("--reservoir", type=int, default=64, help="tokens kept per expert, where they are compared")


def add_pass(parser: argparse.ArgumentParser) -> None:
    """Where a pass over all layers computes, and what it may hold."""
    group = parser.add_argument_group("pass")
    group.add_argument(
        "--device", default="auto", help="where blocks compute: auto (an accelerator if there is one), cpu, cuda"
    )
    group.add_argument(
        "--cache-memory",
        type=size,
        default="2GB",
        metavar="SIZE",
        help="hidden states held in memory; the rest waits in a file",
    )


def size(text: str) -> int:
    """Bytes of ``512MB``, ``2GB`` or a plain number.

    Raises:
        ArgumentTypeError: it is neither.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) *([kMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 512MB or 2GB")
    return int(min(float(found[1]), 1e18) * 1000 ** " kmgt".index(found[2].lower() or " "))


def pass_options(arguments: argparse.Namespace) -> Options:
    """The settings of the pass.

    Raises:
        ValueError: there is no such device; names it.
    """
    from mcsmoe import device
    from mcsmoe.calibration.layer_major import Options

    chosen = device.pick(getattr(arguments, "device", "cpu"))
    if chosen.type == "mps":
        # Sums are taken in float64, which such a device has not.
        if arguments.device != "auto":
            raise ValueError("--device mps has no float64, in which the statistics are summed; use cpu")
        chosen = device.pick("cpu")
    cache = getattr(arguments, "cache_memory", 2 * 10**9)
    reservoir, seed = getattr(arguments, "reservoir", 64), getattr(arguments, "seed", 0)
    return Options(chosen, cache, reservoir, seed)


def add_number(parser: argparse.ArgumentParser) -> None:
    """How many experts are kept."""
    parser.add_argument("--experts", type=int, help="experts to keep per layer, on average")
    parser.add_argument("--remove", type=float, metavar="SHARE", help="share of the experts to leave out, in its place")


def add_refit(group: argparse._ActionsContainer) -> None:
    """Whether and how output projections are solved for afterwards."""
    group.add_argument("--refit", action="store_true", help="solve for the output projections of what is left")
    group.add_argument(
        "--ridge",
        type=float,
        help="of the refit, over the mean diagonal of an expert's Gram matrix; held-out tokens choose one for each layer "
        "if none is given",
    )
    add_method(group, ("refit_target",))


def add_packing(group: argparse._ActionsContainer) -> None:
    """Whether experts are stored in fewer bits."""
    group.add_argument(
        "--bits",
        type=int,
        choices=(4, 8),
        help="store experts as integers of that many bits (packed layout of compressed-tensors), after everything else",
    )
    group.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale; 128, 64 or 32 if none is given"
    )


def refitting(arguments: argparse.Namespace) -> Any:
    """The refit that was asked for, or None."""
    from mcsmoe.transform.refit import LAYER, Refitting

    if arguments.ridge is not None and not arguments.ridge > 0:
        raise ValueError(f"--ridge is {arguments.ridge}; give a number above 0")
    if arguments.refit and arguments.calibration is None:
        raise ValueError("--refit solves on tokens: give --calibration FILE, not --statistics alone")
    if arguments.ridge is not None and not arguments.refit:
        raise ValueError("--ridge is of the refit, which is not asked for; give --refit too")
    target = arguments.refit_target
    if not arguments.refit:
        if target != LAYER:
            raise ValueError(f"--refit-target {target} is of the refit, which is not asked for; give --refit too")
        return None
    return Refitting(target=target) if arguments.ridge is None else Refitting((arguments.ridge,), target=target)


def add_excluded(parser: argparse._ActionsContainer) -> None:
    """Layers that a command passes over."""
    parser.add_argument("--exclude-layers", nargs="*", default=[], metavar="LAYER", help="layers that stay as they are")


def prepare(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything heavy starts; set the threads of the numerical library.

    Raises:
        ValueError: the result would replace something, or a number is out of range; names the option.
    """
    out = arguments.out
    if out.exists() and not arguments.overwrite:
        raise ValueError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    if out.resolve() == Path(arguments.model).resolve():
        raise ValueError(f"{out}: is the checkpoint that is read; give another --out")
    given, saved = getattr(arguments, "statistics", None), getattr(arguments, "save_statistics", None)
    if given is not None and arguments.calibration is not None:
        raise ValueError("--calibration and --statistics are given, of which one alone can be used; leave one out")
    if saved is not None and arguments.calibration is None:
        raise ValueError("--save-statistics keeps what --calibration FILE collects, which is not given; give it")
    for name in ("samples", "batch_size", "max_tokens", "reservoir", "pack"):
        if (1 if getattr(arguments, name, None) is None else getattr(arguments, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    import torch

    torch.set_num_threads(arguments.threads)
