"""Layers reduced one after another, each on what the reduced layers before it give; one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mcsmoe.calibration.files import load_tensors, save_tensors
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options, Reduce
from mcsmoe.calibration.scores import row_nats
from mcsmoe.calibration.states import States
from mcsmoe.calibration.tokens import LayerTokens, is_held_out
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.reduce import Reduced, Reduction
from mcsmoe.transform.unfinished import Unfinished
from mcsmoe.types import LayerId


@dataclass(frozen=True)
class Texts:
    """Calibration rows in batches of one domain each, and each domain's share of the tokens; None: as there are."""

    batches: Sequence[DomainBatch]
    weights: Mapping[str, float] | None = None


class Shelf:
    """Reduced layers, kept on disk until all are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[LayerId, tuple[Path, Reduced]] = {}

    def __iter__(self) -> Iterator[LayerId]:
        return iter(self._held)

    def __contains__(self, layer: LayerId) -> bool:
        return layer in self._held

    def put(self, layer: LayerId, reduced: Reduced) -> None:
        """Keep one; its large tensors go to a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{len(self._held)}.safetensors"
        save_tensors(path, reduced.stored())
        self._held[layer] = path, reduced.without_stored()

    def described(self, layer: LayerId) -> Reduced:
        """One that was put here, without its large tensors."""
        return self._held[layer][1]

    def get(self, layer: LayerId) -> Reduced:
        """One that was put here, its tensors read from its file."""
        path, reduced = self._held[layer]
        return reduced.with_stored(load_tensors(path))


@dataclass(frozen=True)
class Nats:
    """What a model loses on some rows: sums over their predicted tokens, row by row."""

    nats_R: Tensor  # float64
    tokens_R: Tensor  # int64

    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats_R.sum()) / max(1, int(self.tokens_R.sum()))

    def difference(self, other: Nats) -> tuple[float, float]:
        """Nats a token that this loses more than ``other`` on the same rows, and the half width of its 95 % interval.

        The interval is that of a ratio estimate over rows: normal, by the spread of each row's difference from what its
        tokens would have at the mean difference. It is infinite for fewer than two rows.
        """
        tokens, rows = max(1, int(self.tokens_R.sum())), len(self.nats_R)
        change_R = self.nats_R - other.nats_R
        mean = float(change_R.sum()) / tokens
        if rows < 2:
            return mean, float("inf")
        spread = float((change_R - mean * self.tokens_R).square().sum()) * rows / (rows - 1)
        return mean, 1.96 * spread**0.5 / tokens


def reduced_in_sequence(
    folder: Path,
    texts: Texts,
    reduction: Reduction,
    counts: Mapping[LayerId, int],
    options: Options,
    run: Unfinished,
) -> Iterator[tuple[LayerId, Reduced]]:
    """Each layer of the checkpoint ``folder``, reduced to as many experts as ``counts`` says; ``run`` has the weights.

    Args:
        run: what was done before, and keeps what is done now.

    Raises:
        ValueError: what the method needs is not there; names the layer.
    """
    for layer in run.layers:
        yield layer, run.get(layer).without_stored()
    done: list[tuple[LayerId, Reduced]] = []
    source = Streamed(folder)
    major = LayerMajor(source, texts.batches, run.states, options, start=run.order, done=run.layers, whole=run.whole)
    with major.open():
        for block in major.blocks(_reducing(major, texts, reduction, counts, done)):
            run.commit(block.path, dict(done))
            # Whoever reads on holds what was yielded last, and that is not to be a layer's weights.
            described = [(layer, reduced.without_stored()) for layer, reduced in done]
            done.clear()
            yield from described


def trial(
    folder: Path,
    texts: Texts,
    reduction: Reduction | None,
    counts: Mapping[LayerId, int],
    options: Options,
    work: Path,
) -> tuple[Shelf, Nats]:
    """A whole model reduced in sequence, and what it loses on the rows that are held out; None: the model as it is."""
    shelf = Shelf(work / "layers")
    done: list[tuple[LayerId, Reduced]] = []
    with opened(folder, texts, options, work, reduction is not None and reduction.needs_whole) as major:
        change = None if reduction is None else _reducing(major, texts, reduction, counts, done)
        for _ in major.blocks(change, to_the_end=True):
            while done:
                shelf.put(*done.pop(0))
        found = list(row_nats(major, is_held_out))
    nats_R = torch.tensor([nats for nats, _ in found], dtype=torch.float64)
    return shelf, Nats(nats_R, torch.tensor([tokens for _, tokens in found], dtype=torch.int64))


@contextmanager
def opened(folder: Path, texts: Texts, options: Options, work: Path, needs_whole: bool = False) -> Iterator[LayerMajor]:
    """A pass over the checkpoint ``folder`` whose states are gone with the context."""
    # A copy of its own: the layers of another one stay as the files say, for what is written.
    states = States(work / "states", options.cache_memory)
    whole = States(work / "whole", options.cache_memory) if needs_whole else None
    try:
        major = LayerMajor(Streamed(folder), texts.batches, states, options, whole=whole)
        with major.open():
            yield major
    finally:
        states.close()
        if whole is not None:
            whole.close()


def _reducing(
    major: LayerMajor,
    texts: Texts,
    reduction: Reduction,
    counts: Mapping[LayerId, int],
    done: list[tuple[LayerId, Reduced]],
) -> Reduce:
    def reduce(layer: LayerId, found: Mapping[str, LayerStatistics], tokens: LayerTokens) -> None:
        sparse = SparseLayer(major.source.model, major.source.adapter, layer)
        done.append((layer, reduction.reduce(sparse, blend(found, texts.weights), tokens, counts[layer])))

    return reduce
