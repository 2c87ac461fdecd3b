"""What every client's script shares: greedy tokens and their log-probabilities, and the file that results go into.

A script is run as ``python SCRIPT ORDER OUT`` by the client's own interpreter, with neither the project nor its
dependencies. ORDER is JSON: ``folders`` by name, ``prompts`` (token ids), ``tokens`` (how many to generate), ``dtype``.
OUT gets, by name, ``tokens``, ``logprobs`` and ``dtype`` (the number format that the client takes by itself), or ``error``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def greedy(logits_of: Callable[[list[int]], Sequence[float]], prompt: list[int], count: int) -> dict[str, Any]:
    """``count`` tokens, each the likeliest after those before it; ``logits_of`` gives the logits after some tokens."""
    import numpy as np

    ids, found = list(prompt), []
    for _ in range(count):
        logits = np.asarray(logits_of(ids), dtype=np.float64)
        token = int(logits.argmax())
        shifted = logits - logits.max()
        found.append(float(shifted[token] - np.log(np.exp(shifted).sum())))
        ids.append(token)
    return {"tokens": ids[len(prompt) :], "logprobs": found}


def together(parts: Sequence[dict[str, Any]], dtype: str | None) -> dict[str, Any]:
    """The results of several prompts as one."""
    return {"tokens": [one["tokens"] for one in parts], "logprobs": [one["logprobs"] for one in parts], "dtype": dtype}


def main(run: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Give every folder of the order to ``run``; whatever a client raises is that folder's result."""
    order = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {}
    for name, folder in order["folders"].items():
        try:
            found[name] = run(folder, order)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
        Path(sys.argv[2]).write_text(json.dumps(found))
