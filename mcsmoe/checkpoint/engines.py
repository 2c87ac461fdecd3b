"""What serving engines take, as far as numbers of experts go: told before work is done for nothing.

Read in the engines' own sources; what a version after them takes may differ, so these are notes and no refusals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POWERS = tuple(2**exponent for exponent in range(10))
MULTIPLES = (192, 320, 384, 448, 576)


@dataclass(frozen=True)
class Kernel:
    """One kernel that is made for some numbers of a router's outputs.

    Attributes:
        engine: and version in which it was read.
        numbers: of experts among which a router chooses.
        otherwise: what becomes of other numbers.
        scores: values of ``scoring_func`` in the configuration for which it is used; for all where empty.
    """

    engine: str
    numbers: tuple[int, ...]
    otherwise: str
    scores: tuple[str, ...] = ()


KERNELS = (
    # csrc/moe/topk_softmax_kernels.cu: the cases of its switch; the default runs softmax and top-k one after the other
    Kernel("vLLM 0.32 on CUDA", POWERS + MULTIPLES, "are chosen among by a slower kernel", ("softmax",)),
    # csrc/moe/topk_softplus_sqrt_kernels.cu: "Unsupported expert number", at the start of the engine
    Kernel("vLLM 0.32 on CUDA", POWERS[:8] + MULTIPLES + (256, 512), "are refused when it starts", ("sqrtsoftplus",)),
)
MULTIPLE_OF = 4
"""FlashInfer's TensorRT-LLM kernels for FP8 assert that the number of experts is a multiple of this, and at most 512."""
BLOCK = 256
"""Weights in one block of llama.cpp's K-quants: rows of another length get a plainer type, by its own warning."""


def notes(config: Mapping[str, Any], outputs: Iterable[int], stored: Sequence[int]) -> list[str]:
    """Sentences on what engines make of a model, none if nothing is out of the way.

    Args:
        config: fields of config.json.
        outputs: by sparse layer, how many experts the router chooses among.
        stored: by sparse layer, how many are held.
    """
    routed, held = sorted(set(outputs)), sorted(set(stored))
    made = []
    scores = _scores(config)
    for kernel in KERNELS:
        strange = [number for number in routed if number not in kernel.numbers]
        if strange and scores in kernel.scores:
            below = max((number for number in kernel.numbers if number < strange[0]), default=None)
            above = min((number for number in kernel.numbers if number > strange[0]), default=None)
            near = [str(number) for number in (below, above) if number is not None]
            made.append(f"{kernel.engine}: {_listed(strange)} experts {kernel.otherwise}; {' or '.join(near)} are not")
    uneven = [number for number in held if number % MULTIPLE_OF]
    if uneven:
        made.append(
            f"FP8 by FlashInfer's TensorRT-LLM kernels takes a multiple of {MULTIPLE_OF} experts, not {_listed(uneven)}"
        )
    if strange := [row for row in _rows(config) if row % BLOCK]:
        made.append(
            f"llama.cpp: rows of {_listed(strange)} weights are no multiple of {BLOCK}, so K-quants store these matrices in a "
            "plainer type, as they do of the model before"
        )
    if len(routed) > 1:
        made.append(
            f"layers choose among {_listed(routed)} experts: transformers reads that with mcsmoe, serving engines take one "
            "number for all layers; use --budget uniform for them"
        )
    return made


def _rows(config: Mapping[str, Any]) -> list[int]:
    """Lengths of the rows of an expert's matrices, as far as the configuration says them by the usual names."""
    for fields in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        hidden = fields.get("moe_intermediate_size") or fields.get("intermediate_size")
        if isinstance(hidden, int) and isinstance(fields.get("hidden_size"), int):
            return sorted({hidden, fields["hidden_size"]})
    return []


def _scores(config: Mapping[str, Any]) -> str:
    """How a router scores experts, as kernels tell it: its ``scoring_func``; ``grouped`` where sets are chosen first."""
    for fields in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        if isinstance(fields.get("scoring_func"), str):
            return str(fields["scoring_func"])
        if fields.get("topk_group") is not None:
            return "grouped"
    return "softmax"


def _listed(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers[:4]]
    return ", ".join(shown) + (", ..." if len(numbers) > len(shown) else "")
