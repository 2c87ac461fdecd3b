"""Score texts with checkpoints larger than memory: one layer-major pass for each, then the heads row by row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree

from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options
from mcsmoe.calibration.states import States
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.console import progress
from mcsmoe.types import Batch

IGNORED = -100


@dataclass(frozen=True)
class Document:
    """One text as a batch of one row, and what it is called."""

    row: str
    domain: str
    inputs: Batch


@torch.no_grad()
def score(
    source: Streamed,
    documents: Sequence[Document],
    options: Options,
    batch_size: int,
    reference: Streamed | None = None,
) -> list[dict[str, Any]]:
    """Rows of table ``language``, one for each document, in their order.

    Raises:
        ValueError: model and reference have other vocabularies.
    """
    order = sorted(range(len(documents)), key=lambda place: -documents[place].inputs["input_ids"].shape[1])
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [_together([documents[place].inputs for place in chunk]) for chunk in chunks]
    rows: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        logits = stack.enter_context(_ready(source, batches, options, "model"))
        full = None if reference is None else stack.enter_context(_ready(reference, batches, options, "reference"))
        for number, chunk in enumerate(progress(chunks, "scores", total=len(chunks))):
            for row, place in enumerate(chunk):
                mine = logits(number, row)
                other = None if full is None else full(number, row)
                rows[place] = {"row": documents[place].row, "domain": documents[place].domain}
                rows[place] |= _scores(mine, other, batches[number], row, source)
    return [rows[place] for place in range(len(documents))]


def _together(parts: Sequence[Batch]) -> Batch:
    """Rows padded on the right to one batch."""
    fill = {"labels": IGNORED}
    made: Batch = {}
    for name in parts[0]:
        longest = max(part[name].shape[1] for part in parts)
        made[name] = torch.cat(
            [functional.pad(part[name], (0, longest - part[name].shape[1]), value=fill.get(name, 0)) for part in parts]
        )
    return made


@contextmanager
def _ready(
    source: Streamed, batches: Sequence[Batch], options: Options, what: str
) -> Iterator[Callable[[int, int], Tensor]]:
    """Logits [positions, V] of one row of one batch, when all batches went through all blocks."""
    seq2seq = bool(source.model.config.is_encoder_decoder)
    given = [{name: one[name] for name in one if seq2seq or name != "labels"} for one in batches]
    with tempfile.TemporaryDirectory(prefix="mcsmoe-states-") as folder:
        states = States(Path(folder), options.cache_memory)
        domains = [DomainBatch("all", one) for one in given]
        major = LayerMajor(source, domains, states, options, done=source.layers)
        total = sum(len(blocks) for blocks in major.replay.stacks.values())

        try:
            with major.open():
                for _ in progress(major.blocks(to_the_end=True), what, total=total):
                    pass
                yield lambda number, row: _logits(major, number, row)
        finally:
            states.close()


def row_nats(major: LayerMajor, wanted: Callable[[int], bool]) -> Iterator[tuple[float, int]]:
    """Nats and predicted tokens of the calibration rows whose number is ``wanted``, when all went through all blocks."""
    number = 0
    for batch, given in enumerate(major.batches):
        for row in range(given.inputs["input_ids"].shape[0]):
            if wanted(number):
                own_NV, target_N = _predictions(_logits(major, batch, row), given.inputs, row, major.source)
                yield float(-own_NV.gather(1, target_N[:, None]).sum(dtype=torch.float64)), len(target_N)
            number += 1


def _logits(major: LayerMajor, number: int, row: int) -> Tensor:
    """[positions, V]: logits of one row of one batch."""
    count = major.batches[number].inputs["input_ids"].shape[0]
    inputs = {name: tensor[row : row + 1] for name, tensor in major.inputs(number).items()}

    def saved(stack: str) -> Any:
        def own(leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[0] == count
            return leaf[row : row + 1] if batched else leaf

        return _pytree.tree_map(own, major.saved(number)(stack))

    found: Tensor = major.replay.rest(inputs, saved).logits[0]
    return found


def _predictions(logits_SV: Tensor, batch: Batch, row: int, source: Streamed) -> tuple[Tensor, Tensor]:
    """Log probabilities [N, V] at the positions that predict a token of one row, and these tokens [N]."""
    device = logits_SV.device
    if source.model.config.is_encoder_decoder:
        target_S, predicted = batch["labels"][row].to(device), slice(None)
        keep_S = target_S != IGNORED
    else:
        target_S, predicted = batch["input_ids"][row, 1:].to(device), slice(0, -1)
        keep_S = batch["attention_mask"][row, 1:].to(device) > 0
    return functional.log_softmax(logits_SV[predicted][keep_S].float(), dim=-1), target_S[keep_S]


def _scores(mine_SV: Tensor, other_SV: Tensor | None, batch: Batch, row: int, source: Streamed) -> dict[str, Any]:
    own_NV, target_N = _predictions(mine_SV, batch, row, source)
    nats = -own_NV.gather(1, target_N[:, None]).sum(dtype=torch.float64)
    made = {"tokens": len(target_N), "nats": float(nats)}
    if other_SV is None:
        return made | dict.fromkeys(("reference_nats", "divergence", "agreement"), float("nan"))
    if other_SV.shape[-1] != mine_SV.shape[-1]:
        raise ValueError(
            f"the reference predicts {other_SV.shape[-1]} tokens, the model {mine_SV.shape[-1]}; give the model it came from"
        )
    full_NV, _ = _predictions(other_SV, batch, row, source)
    gap_N = (full_NV.exp() * (full_NV - own_NV).masked_fill(full_NV == -torch.inf, 0.0)).sum(dim=1, dtype=torch.float64)
    return made | {
        "reference_nats": float(-full_NV.gather(1, target_N[:, None]).sum(dtype=torch.float64)),
        "divergence": float(gap_N.sum()),
        "agreement": float((full_NV.argmax(dim=1) == own_NV.argmax(dim=1)).sum()),
    }
