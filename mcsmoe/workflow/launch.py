"""Run one stage's script as a job of the workflow, and write down the time, processor time and memory it took.

Where the workflow keeps a process with the libraries loaded (``forkserver.py``, named by ``MCSMOE_FORKSERVER``), the job is a
fork of it and starts at once; everywhere else, and where anything differs, it is a process of its own as ever. What the
job does and what it writes is the same either way.

Snakemake's own ``benchmark:`` looks at the processes below its shell, every 30 seconds once a job is old; here the operating
system's account is taken when the job ends, which misses nothing, and follows a job that was forked elsewhere.

Only the standard library is imported, and little of it: this runs once a job.
"""

from __future__ import annotations

import os
import sys
import time

THREADS = "--threads"


def main() -> int:
    """Parse the command line, run the job, write what it used; the job's own exit status."""
    words = sys.argv[1:]
    usage, processes, kind = None, 1, ""
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option in ("-h", "--help"):
            print(
                "usage: launch.py [--usage FILE] [--processes N] [--light | --measured] SCRIPT [OPTION ...]\n\n"
                "  --usage FILE    write seconds, processor seconds and peak memory of the job, once it has succeeded\n"
                "  --processes N   processes that train together\n"
                "  --light         the job needs neither torch nor transformers: it waits for no one to load them\n"
                "  --measured      the job measures itself: the loaded one has what that takes, and nothing else"
            )
            return 0
        if option in ("--light", "--measured"):
            kind = option
        elif option == "--usage" and words:
            usage = words.pop(0)
        elif option == "--processes" and words:
            processes = int(words.pop(0))
        else:
            sys.exit(f"error: launch.py does not know {option!r}, or it lacks a value; see launch.py --help")
    if not words:
        sys.exit("error: launch.py was given no script to run; see launch.py --help")
    started = time.time()
    server = os.environ.get("MCSMOE_FORKSERVER")
    done = None
    if server and processes == 1 and _threads(words) == 1:
        done = _forked(server + {"--light": "-complete", "--measured": "-measured"}.get(kind, ""), words)
    status, processor, memory = done or _own(words, processes)
    if usage and status == 0:
        _write(usage, time.time() - started, processor, memory)
    return status if status >= 0 else 128 - status


def _threads(words: list[str]) -> int:
    """Threads the script is told to use. A fork has the thread pools of its parent, which are made for one."""
    at = [number for number, word in enumerate(words[:-1]) if word == THREADS]
    return int(words[at[-1] + 1]) if at else 1


def _forked(server: str, words: list[str]) -> tuple[int, float, float] | None:
    """Run in a fork of the loaded process; None where it is gone, or is not the like of what would be started here."""
    import json
    import signal
    import socket
    import struct

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the job as well, which ends in its own way
    request = {
        "executable": sys.executable,
        "words": words,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(f"\0{server}")
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():
                return None
            body = json.dumps(request).encode()
            socket.send_fds(connection, [len(body).to_bytes(4, "big")], [0, 1, 2])
            connection.sendall(body)
            while part := connection.recv(4096):
                answer += part
        except OSError:
            if b"started" not in answer:
                return None
    lines = answer.decode().splitlines()
    if not lines:
        return None
    if len(lines) == 1:
        # It was started, and whoever watched it is gone: nothing is known of its end, so it has not succeeded.
        return -9, 0.0, 0.0
    found = json.loads(lines[1])
    return found["status"], found["processor"], found["memory"]


def _own(words: list[str], processes: int) -> tuple[int, float, float]:
    """Run in a process of its own, or in several that torch's launcher starts."""
    import signal

    command = [sys.executable]
    if processes > 1:
        # Standalone finds a free port, so that jobs side by side do not meet; after -- no option of a script is the
        # launcher's. (accelerate's own launcher starts only one process where there is no GPU.)
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with(parent)
        os.execv(command[0], command + words)

    def pass_on(number: int, _frame: object) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, megabytes(used.ru_maxrss)


def die_with(parent: int) -> None:
    """Let the kernel end this process when ``parent``, which started it, ends; nothing but on Linux."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; it outlives the exec
    if os.getppid() != parent:
        os._exit(1)


def megabytes(maxrss: int) -> float:
    """Peak memory as the operating system counts it: bytes on macOS, kibibytes elsewhere."""
    return maxrss / 2**20 if sys.platform == "darwin" else maxrss / 2**10


def _write(usage: str, seconds: float, processor: float, memory: float) -> None:
    """One row in the form of Snakemake's benchmark files, of the columns that are known, put in place whole."""
    whole = int(seconds)
    clock = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    row = [f"{seconds:.4f}", clock, f"{memory:.2f}", f"{100 * processor / max(seconds, 1e-9):.2f}", f"{processor:.2f}"]
    os.makedirs(os.path.dirname(usage) or ".", exist_ok=True)
    with open(f"{usage}.part", "w") as file:
        file.write("\t".join(["s", "h:m:s", "max_rss", "mean_load", "cpu_time"]) + "\n" + "\t".join(row) + "\n")
    os.replace(f"{usage}.part", usage)


if __name__ == "__main__":
    sys.exit(main())
