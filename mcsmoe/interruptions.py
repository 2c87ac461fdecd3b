"""What a user who presses Ctrl-C sees: one line and exit status 130, and nothing half-made left behind."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

STATUS = 130
count = 0  # interruptions of this process so far


def watch() -> None:
    """Let Ctrl-C end this process in order; nothing where it is ignored, or handled by somebody else."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, _interrupted)
    sys.excepthook, sys.unraisablehook = _shown, _unraisable


def leave(log: logging.Logger) -> NoReturn:
    """End the process, once what was half-made is cleared away."""
    log.error("interrupted")
    sys.exit(STATUS)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    global count
    count += 1
    if count == 1:
        raise KeyboardInterrupt
    if count > 2:  # the second waits for what is being cleared away, which is soon done
        os._exit(STATUS)


def _shown(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For what is raised before a stage runs, while libraries are loaded."""
    if count or issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _unraisable(found: Any) -> None:
    """Errors in what cannot raise them: after an interruption they are of no interest."""
    if not count:
        sys.__unraisablehook__(found)
