"""What a stage shows: log lines, progress bars, and errors that a user can act on."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mcsmoe import interruptions
from mcsmoe.refusals import check_numbers, users_error

T = TypeVar("T")
log = logging.getLogger("mcsmoe")
command: str | None = None
"""The command that is being run, as it was typed; the card of what it writes says it."""

_BAR_SECONDS = 1.0  # between two redraws on a terminal
_LINE_SECONDS = 20.0  # between two lines where the output is a file


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and examples as they were typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def parser(purpose: str, example: str) -> argparse.ArgumentParser:
    """An argument parser for one stage, with an example, and the options every stage has."""
    interruptions.watch()
    made = argparse.ArgumentParser(
        description=purpose.replace("%", "%%"), epilog=f"example:\n  {example}", formatter_class=_Formatter
    )
    made.add_argument("--log", type=Path, help="also write what is shown to this file")
    made.add_argument("--threads", type=int, default=1, help="CPU threads; another number gives other last bits")
    return made


def json_argument(text: str) -> Any:
    """A command-line value that is JSON, or ``@`` and the name of a file that holds it."""
    return json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """What the stages that read everything need to find it."""
    parser.add_argument("--results", type=Path, required=True, help="folder of results")
    parser.add_argument("--runs", type=json_argument, required=True, help="runs to read: JSON, or @file")
    parser.add_argument("--configuration", type=json_argument, required=True, help="what was run: JSON, or @file")


def rank() -> int:
    """Number of this process among those that a launcher started for one job."""
    return int(os.environ.get("RANK", "0"))


def progress(items: Iterable[T], description: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate with a progress bar on standard error: redrawn on a terminal, a line now and then elsewhere."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    seconds = _BAR_SECONDS if terminal else _LINE_SECONDS
    yield from tqdm(
        items,
        desc=description,
        total=total,
        initial=initial,
        mininterval=seconds,
        maxinterval=seconds,
        file=sys.stderr,
        dynamic_ncols=terminal,
        leave=False,
        disable=rank() > 0,
    )


def settle_environment(threads: int) -> None:
    """What the libraries read from the environment when they are imported: threads, and nothing sent outside."""
    # Set before torch is imported, so that its thread pools are made at this size.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run(stage: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run a stage: set its threads and log, and turn a user's error into one message and exit status 1."""
    interruptions.watch()
    settle_environment(arguments.threads)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    # All processes of a job tell the same; what goes wrong in one of them is shown all the same.
    if arguments.log and rank() == 0:
        try:
            arguments.log.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(arguments.log, mode="w"))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            reason = f"cannot be written ({why}); free some space or allow this user to write there"
            sys.exit(f"error: {str(arguments.log)!r}: {reason}, and run again")
    # A log that cannot take another line must not bury what is shown in tracebacks of its own.
    logging.raiseExceptions = False
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    log.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        check_numbers(vars(arguments))
        stage(arguments)
    except KeyboardInterrupt:
        interruptions.leave(log)
    except Exception as error:
        if interruptions.count:
            interruptions.leave(log)  # a library made another error of it
        told = users_error(error)
        if told is None:
            log.exception("the stage failed; this is a defect of the program, not of its input")
            sys.exit(2)
        log.error("error: %s", told)
        if os.environ.get("MCSMOE_TRACEBACK"):
            raise
        sys.exit(1)
