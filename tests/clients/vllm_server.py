"""vLLM's server, started by its command and asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import installed

# The cache is a gigabyte; without a number it is most of the machine's memory, and a busy machine does not start.
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
PATIENCE = 600  # seconds until it has to answer


@contextmanager
def served(*command: object, log: Path) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """The server while it runs, as a function of a request for completions; what it says goes into ``log``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    words = [str(word) for word in (*command, "--port", port)]
    with log.open("wb") as said:
        server = subprocess.Popen(
            words, cwd=log.parent, env=installed.clean() | SETTINGS, stdout=said, stderr=said, start_new_session=True
        )

    def asked(request: dict[str, Any]) -> dict[str, Any]:
        told = {"Content-Type": "application/json"}
        whole = urllib.request.Request(f"{address}/v1/completions", json.dumps(request).encode(), told)
        with urllib.request.urlopen(whole, timeout=120) as answer:
            made: dict[str, Any] = json.load(answer)
        return made

    try:
        until = time.monotonic() + PATIENCE
        while not _answers(f"{address}/health"):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, f"no answer within {PATIENCE} seconds"
            time.sleep(1)
        yield asked
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
