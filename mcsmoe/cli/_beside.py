"""Statistics that a command takes on its way: in a folder beside its output, so that a killed command goes on with them."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mcsmoe.calibration.collect import collect
from mcsmoe.calibration.folder import FolderLayers, open_statistics
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli._domains import domains
from mcsmoe.cli.options import pass_options
from mcsmoe.statistics.routing import RoutingStatistics


def folder_beside(out: Path) -> Path:
    """Where the statistics for ``out`` are until it is there."""
    return out.resolve().with_name(f".{out.name}.statistics")


def collect_beside(source: Streamed, arguments: argparse.Namespace) -> RoutingStatistics:
    """Statistics of all layers on the calibration text; those that the same command has taken before it was killed.

    Layers are read as they are asked for; ``forget_beside`` ends the need for them.

    Raises:
        ValueError: as ``calibration.collect``.
    """
    folder = folder_beside(arguments.out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A source of its own: the pass maps files, and the caller goes on with what it has.
    whole = Streamed(source.folder)
    given, options = domains(source, arguments), pass_options(arguments)
    collect(whole, given, folder, options, overwrite=arguments.overwrite, reuse=True)
    return open_statistics(folder)


def layers_beside(source: Streamed, arguments: argparse.Namespace) -> FolderLayers:
    """The layers of ``collect_beside``, by domain too."""
    found: FolderLayers = collect_beside(source, arguments).layers  # type: ignore[assignment]
    return found


def forget_beside(out: Path) -> None:
    """The output is there: what was taken for it is not needed any more."""
    folder = folder_beside(out)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
