"""Processes with torch and transformers loaded, of which the jobs of a local workflow are forks.

Interpreter and imports take a stage that needs a model class several seconds of processor time, a fork some hundredths.
The process starts with the workflow and imports nothing until the first job asks; it ends when the workflow's end of its
standard input is closed, however the workflow ended. It stays in the workflow's process group, so what ends the group ends
the jobs too.

There are two. One has what most stages import; a light stage, which needs neither torch nor transformers, is a fork of it too
once it has loaded everything, and else has an interpreter of its own. The other has what measuring a model imports and
nothing else, and keeps its forks' account of memory as a process of their own would: see ``Resident``.

A job is watched by a small process of its own: if whoever asked for the job is gone, the job is killed, as it would be below
a shell that was killed, and if the watcher is gone, the kernel kills the job. Nothing of a job reaches the next one.

Linux only (it needs pidfds, abstract sockets and the parent-death signal); elsewhere jobs are started one by one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

MEASURED = "-measured"
"""What the name of the process for jobs that measure themselves ends with."""

COMPLETE = "-complete"
"""What the second name of the other process ends with, which it takes once it has loaded everything."""

LIBRARIES = [
    *("torch", "numpy", "pandas", "pyarrow.parquet", "safetensors.torch"),
    *("accelerate", "transformers.modeling_utils", "transformers.generation"),
    "transformers.tokenization_utils_tokenizers",
    *("transformers.models.auto.modeling_auto", "transformers.models.switch_transformers.modeling_switch_transformers"),
]
"""What most stages import, none of it ours: a job must read the code of the project as it is."""

LIBRARIES_LATER = [
    *("datasets", "scipy.optimize", "scipy.linalg", "scipy.stats"),
    *("jinja2", "sqlalchemy.orm", "matplotlib.figure", "matplotlib.backends.backend_svg"),
]
"""What some stages import, none of them first: it is loaded while the first job works."""

LIBRARIES_TO_MEASURE = [
    *("torch", "numpy", "safetensors.torch", "psutil", "torch.utils.flop_counter"),
    *("transformers.modeling_utils", "transformers.generation", "transformers.tokenization_utils_tokenizers"),
    *("transformers.models.auto.modeling_auto", "transformers.models.switch_transformers.modeling_switch_transformers"),
    "transformers.models.nllb_moe.modeling_nllb_moe",
]
"""What measuring a model imports, none of it ours either."""


# -- the workflow's side -------------------------------------------------------------------------------------------
_STARTED: list[subprocess.Popen[bytes]] = []


def start(measured: bool = True) -> None:
    """Start the processes for the jobs of this workflow and name them to the jobs.

    Nothing is started where the system cannot do it, or where ``MCSMOE_FORKSERVER`` is set, and be it to nothing.

    Args:
        measured: some of the jobs measure themselves.
    """
    if not sys.platform.startswith("linux") or "MCSMOE_FORKSERVER" in os.environ:
        return
    # An abstract name leaves no file behind, however the workflow ends; both sides check whose the other is.
    name = f"mcsmoe-{secrets.token_hex(16)}"
    if started := listening(name, measured):  # a job that finds nobody there is started by itself
        _STARTED.extend(started)
        os.environ["MCSMOE_FORKSERVER"] = name


def listening(name: str, measured: bool, program: str = __file__) -> list[subprocess.Popen[bytes]]:
    """The processes that ``program`` runs as, those that listen under ``name`` by now; they end with this one."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([sys.executable, program, name + end], **pipes) for end in ("", MEASURED)[: 1 + measured]
    ]
    return [process for process in started if process.stdout is not None and process.stdout.read(1)]


def stop() -> None:
    """End the processes, once no job runs; they end by themselves, too, when the workflow does."""
    while _STARTED:
        os.environ.pop("MCSMOE_FORKSERVER", None)
        process = _STARTED.pop()
        process.kill()
        process.wait()


# -- the process itself --------------------------------------------------------------------------------------------
def load(libraries: list[str]) -> None:
    """Import what jobs need, with the environment they would set before they import it."""
    from mcsmoe import console

    console.settle_environment(threads=1)
    for name in libraries:
        importlib.import_module(name)
    keep()


def load_later() -> None:
    """What stages after the first import, and the table of all families' names of tensors, which every loader builds."""
    for name in LIBRARIES_LATER:
        importlib.import_module(name)
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("")
    keep()


def keep() -> None:
    """A job leaves alone what it shares with this process: in a collection of garbage, and at its end.

    Libraries take themselves apart when an interpreter ends (torch all its operators, a tenth of a second); of a fork nothing
    is left anyway, and what the job itself makes is cleared away as ever.
    """
    gc.collect()
    gc.freeze()
    for finalizer in tuple(getattr(weakref.finalize, "_registry", ())):
        finalizer.atexit = False


class Resident:
    """Pages of files, mostly of libraries, that are mapped into this process now.

    The system gives a fork the pages that its parent has written, and lets it find those of files again when it needs them.
    Until then they do not count as its memory, as they would in a process that had loaded the libraries itself.
    """

    def __init__(self) -> None:
        size = os.sysconf("SC_PAGE_SIZE")
        self.pages: list[int] = []
        with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for line in maps:
                span, access, _, _, inode, *_ = line.split()
                if inode == "0" or not access.startswith("r"):
                    continue
                start, end = (int(part, 16) for part in span.split("-"))
                entries = memoryview(os.pread(pagemap.fileno(), (end - start) // size * 8, start // size * 8)).cast("Q")
                self.pages += [start + number * size for number, entry in enumerate(entries) if entry >> 63]

    def touch(self) -> None:
        """Map them into this process, a fork of the one they were found in."""
        import ctypes

        for page in self.pages:
            ctypes.string_at(page, 1)


def serve(name: str) -> list[str] | None:
    """Accept jobs until the workflow ends; returns only in a job, with its command line, or at the end, with nothing."""
    listeners = [listen(name)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the jobs are told by the terminal themselves
    os.write(1, b".")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    measured, loaded, resident = name.endswith(MEASURED), False, None
    while True:
        sources: list[Any] = [0, *listeners]
        ready, _, _ = select.select(sources, [], [])
        if 0 in ready:
            return None
        connection, _ = ready[0].accept()
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.getuid():
            connection.close()
            continue
        if not loaded:
            load(LIBRARIES_TO_MEASURE if measured else LIBRARIES)
            loaded = True
            resident = Resident() if measured else None
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are not waited for
        if os.fork() == 0:
            for listener in listeners:
                listener.close()
            words = watch(connection)
            if resident is not None:
                resident.touch()
            return words
        connection.close()
        if not measured and len(listeners) == 1:
            load_later()
            wake(name + MEASURED)
            listeners.append(listen(name + COMPLETE))


def listen(name: str) -> socket.socket:
    """A socket that takes connections under that name, which no file stands for."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(256)
    return listener


def wake(name: str) -> None:
    """Let the process ``name`` load its libraries now, while the first jobs work, and not when a job waits for them."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(f"\0{name}")


def watch(connection: socket.socket) -> list[str]:
    """Fork the job, wait for its end or for the loss of whoever asked for it, and tell; returns in the job only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams = receive(connection)
    if not alike(request):
        os._exit(0)  # no answer: the job is started in a process of its own
    connection.sendall(b"started\n")
    watcher = os.getpid()
    job = os.fork()
    if job == 0:
        connection.close()
        become(request, streams, watcher)
        return list(request["words"])
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(job)
    sources: list[Any] = [ended, connection]
    ready, _, _ = select.select(sources, [], [])
    if ended not in ready:
        os.kill(job, signal.SIGKILL)
    _, status, used = os.wait4(job, 0)
    told = {
        "status": os.waitstatus_to_exitcode(status),
        "processor": used.ru_utime + used.ru_stime,
        "memory": used.ru_maxrss / 2**10,
    }
    with contextlib.suppress(OSError):  # whoever asked may be gone
        connection.sendall(json.dumps(told).encode() + b"\n")
    os._exit(0)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and the standard streams that come with it."""
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    if not head:
        os._exit(0)  # nothing is asked: see wake
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            os._exit(0)  # whoever asked is gone
        body += part
    return json.loads(body), list(streams)


def alike(request: dict[str, Any]) -> bool:
    """Whether a fork of this process is what the job would get in a process of its own."""
    decisive = ("PYTHONPATH", "PYTHONHASHSEED", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LD_LIBRARY_PATH")
    environment = request["environment"]
    return request["executable"] == sys.executable and all(
        environment.get(name) == _ENVIRONMENT.get(name) for name in decisive
    )


def become(request: dict[str, Any], streams: list[int], watcher: int) -> None:
    """Take over the streams, folder and environment of the one that asked, and die with the watcher."""
    from mcsmoe.workflow.launch import die_with

    die_with(watcher)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=text is sys.stderr or text.isatty())  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(Path(request["words"][0]).stem)  # what top shows


_ENVIRONMENT = dict(os.environ)


def run(words: list[str]) -> int:
    """Run a script as if it had been started by itself; its exit status."""
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    status = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    return status


def main() -> None:
    """Serve; in a job, run its script and leave."""
    words = serve(sys.argv[1])
    if words is None:
        return
    status = run(words)
    # What is left to an interpreter's end, but for taking apart every library: that alone takes most of a short job's time,
    # for it makes the job's own copy of all the memory it shares.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    main()
