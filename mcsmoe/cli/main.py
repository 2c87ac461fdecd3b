"""The command line: what it can do to a checkpoint without the workflow.

A command is a module of this package that has ``NAME``, ``HELP``, ``EXAMPLE``, ``add_arguments`` and ``run``; what commands
share beside their options is in modules with an underscore. Nothing heavy is imported before a command runs, so that
``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol, cast

import mcsmoe.cli
from mcsmoe import console
from mcsmoe.artefacts.atomic import claimed


class Command(Protocol):
    """What the module of a command holds; the first line of ``HELP`` stands in the list of commands."""

    NAME: str
    HELP: str
    EXAMPLE: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def commands() -> dict[str, Command]:
    """Every command by its name."""
    names = sorted(module.name for module in pkgutil.iter_modules(mcsmoe.cli.__path__))
    light = [name for name in names if name != "main" and not name.startswith("_")]
    modules = [importlib.import_module(f"mcsmoe.cli.{name}") for name in light]
    found = [cast(Command, module) for module in modules if hasattr(module, "NAME")]
    return {command.NAME: command for command in found}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = argparse.ArgumentParser(prog="mcsmoe", description=(__doc__ or "").splitlines()[0])
    choices = whole.add_subparsers(required=True, metavar="COMMAND")
    for command in commands().values():
        base = console.parser(command.HELP, command.EXAMPLE)
        added = choices.add_parser(
            command.NAME,
            parents=[base],
            add_help=False,
            help=command.HELP.strip().splitlines()[0],
            description=base.description,
            epilog=base.epilog,
            formatter_class=base.formatter_class,
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return whole


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``mcsmoe``; exit status 1 for an error of the user's, with one message."""
    arguments = parser().parse_args(argv)
    console.command = shlex.join(["mcsmoe", *(sys.argv[1:] if argv is None else argv)])
    try:
        console.run(_run, arguments)
    finally:
        console.command = None


def _run(arguments: argparse.Namespace) -> None:
    """Run a command, which has what it writes for itself."""
    out = getattr(arguments, "out", None)
    with claimed(out) if out is not None else nullcontext():
        try:
            arguments.run(arguments)
        except KeyboardInterrupt:
            # Who stops a command wants nothing of it; what a kill leaves is gone on with.
            if out is not None:
                from mcsmoe.cli._beside import forget_beside

                forget_beside(out)
            raise
