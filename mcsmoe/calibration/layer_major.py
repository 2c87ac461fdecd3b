"""One pass over a checkpoint larger than memory: all calibration rows through one block, then the next.

The weights of every block are read once. Statistics of a sparse layer are complete when its block has seen all rows; its
weights are still there then, so that a method may change the layer before the next one is calibrated on what it gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcsmoe.calibration.observe import Observation, observing
from mcsmoe.calibration.passes import routing_inputs
from mcsmoe.calibration.replay import Replay, stacks_of
from mcsmoe.calibration.residency import Residency
from mcsmoe.calibration.states import States
from mcsmoe.calibration.streams import stream_factor, stream_of, stream_square
from mcsmoe.calibration.tokens import LayerTokens, StoredTokens
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.statistics.halves import Halves
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import NotFinite, RoutingStatistics
from mcsmoe.types import Batch, LayerId, RoutedBatch

DOMAIN_STRIDE = 2**40
"""Tokens of domain d are numbered from d times this, so that no two domains draw the same sample."""

Reduce = Callable[[LayerId, Mapping[str, LayerStatistics], LayerTokens], None]
"""``reduce(layer, statistics by domain, tokens)`` may change the layer, whose weights are in memory, in place."""


@dataclass(frozen=True)
class DomainBatch:
    """A batch of calibration rows of one domain."""

    domain: str
    inputs: Batch  # input_ids, attention_mask and, for encoder-decoder models, labels


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        device: where blocks compute.
        cache_memory: bytes of hidden states that may wait in memory.
        reservoir: tokens kept of each expert, for what compares experts on tokens.
        seed: which tokens are kept.
        outputs: whether sums over outputs are taken; all statistics are, unless the cost of the pass alone is measured.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache_memory: int = 2**31
    reservoir: int = 64
    seed: int = 0
    outputs: bool = True


@dataclass
class Block:
    """One block that all rows went through."""

    number: int
    path: str
    layers: dict[LayerId, dict[str, LayerStatistics]]  # of its sparse layers, by domain
    halves: dict[LayerId, Halves]
    seconds: float


class LayerMajor:
    """All batches through the blocks of a checkpoint, in the order in which the model calls them.

    Args:
        source: opened checkpoint; its model holds the weights of one block at a time.
        batches: the calibration rows.
        states: what stands between blocks; restored ones with ``start`` go on where another pass ended.
        start: blocks that are behind, by their paths.
        done: sparse layers whose statistics are complete.
        whole: what stands between the blocks of the model as it is, while layers are reduced one after another: tokens
            then have as target what brings the residual stream behind the layer to that of the whole model.
    """

    def __init__(
        self,
        source: Streamed,
        batches: Sequence[DomainBatch],
        states: States,
        options: Options,
        start: Sequence[str] = (),
        done: Sequence[LayerId] = (),
        whole: States | None = None,
    ) -> None:
        self.source, self.batches, self.states, self.options = source, batches, states, options
        self.whole = whole
        stacks = stacks_of(source.model, source.layers)
        self.replay = Replay(source.model, stacks, list(start))
        self.residency = Residency(source, [block for blocks in stacks.values() for block in blocks], options.device)
        self._factors: dict[LayerId, float] = {}
        self._start, self._left = len(start), [layer for layer in source.layers if layer not in done]
        self._first_rows = [0]
        for batch in batches:
            self._first_rows.append(self._first_rows[-1] + batch.inputs["input_ids"].shape[0])

    @property
    def rows(self) -> int:
        """Calibration rows."""
        return self._first_rows[-1]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights asked for so far."""
        return self.residency.files.bytes_read

    def saved(self, number: int) -> Callable[[str], Any]:
        """What ``replay.Saved`` is, for batch ``number``."""
        return lambda name: self.states.get((name, number), self.options.device)

    def inputs(self, number: int) -> Batch:
        """Arguments of the model for batch ``number``, on the device."""
        given = routing_inputs(self.source.model, self.batches[number].inputs)
        return {name: tensor.to(self.options.device) for name, tensor in given.items()}

    @contextmanager
    def open(self) -> Iterator[None]:
        """The model can run inside the context, and holds no weights after it."""
        with self.residency.open(), self.replay.installed():
            yield

    def blocks(self, reduce: Reduce | None = None, to_the_end: bool = False) -> Iterator[Block]:
        """Run block after block inside ``open``, each yielded when all rows went through it and its weights are gone.

        The pass ends with the last sparse layer, or with the last block if ``to_the_end``.

        Raises:
            ValueError: no rows, a layer that they never reach, or numbers that are not finite; names the layer.
        """
        if not self.batches:
            raise ValueError("there are no calibration rows")
        number = self._start
        for members in self.replay.stacks.values():
            if members[0] in self.replay.order:  # another process ran it
                self.replay.find_lasting(members[0], self.inputs(0), self.saved(0))
        while self._left or to_the_end:
            path = self.replay.next_block(number, self.inputs(0), self.saved(0))
            if path is None:
                break
            yield self._run(number, path, reduce)
            number += 1
        if self._left:
            raise ValueError(f"layer {self._left[0]!r} is never called on the calibration rows; it has no statistics")

    def _run(self, number: int, path: str, reduce: Reduce | None) -> Block:
        started = time.monotonic()
        self.residency.load(path)
        self.residency.read_ahead(self._following(path))
        layers = [layer for layer in self._left if f"{layer}.".startswith(f"{path}.")]
        sequential = reduce is not None and bool(layers)
        with ExitStack() as stack:
            tokens = States(self.states.folder / "tokens", self.options.cache_memory) if sequential else None
            if tokens is not None:
                stack.callback(tokens.close)
            self._run_whole(number, path)
            found = self._collected(number, path, layers, tokens)
            if reduce is not None:
                for layer in layers:
                    stored = found[layer].tokens
                    assert stored is not None
                    reduce(layer, found[layer].by_domain(), stored)
                # The states after the block are those of its layers as they are now.
                for batch in range(len(self.batches)) if layers else ():
                    self._keep(path, batch, self._output(number, batch))
        self._find_lasting(path)
        self.residency.forget(path)
        for states in (self.states,) if self.whole is None else (self.states, self.whole):
            states.turn()
        self._left = [layer for layer in self._left if layer not in layers]
        statistics = {layer: one.by_domain() for layer, one in found.items()}
        halves = {layer: one.halves for layer, one in found.items() if one.halves is not None}
        return Block(number, path, statistics, halves, time.monotonic() - started)

    def _run_whole(self, number: int, path: str) -> None:
        """The states of the whole model through a block that is still as it was."""
        whole = self.whole
        if whole is None:
            return
        if self.replay.lasting:
            raise ValueError(
                f"blocks of this model ({', '.join(sorted(self.replay.lasting))}) are read by more than the next one, so there is "
                "no one stream to refit towards; refit towards the layer"
            )
        for batch in range(len(self.batches)):
            saved = partial(self._of_whole, batch)
            whole.put((self.replay.stack_of[path], batch), self.replay.block(number, self.inputs(batch), saved))

    def _of_whole(self, batch: int, name: str) -> Any:
        assert self.whole is not None
        return self.whole.get((name, batch), self.options.device)

    def _missing(
        self, number: int, layers: Sequence[LayerId], batch: int, output: Any, size: torch.Size
    ) -> Tensor | None:
        """[T, D]: what a layer must give more for the stream behind it to be that of the whole model; None without one."""
        if self.whole is None:
            return None
        layer = layers[0]
        if len(layers) > 1:
            raise ValueError(
                f"layer {layer!r}: its block holds {len(layers)} such layers, and the stream is seen behind the last alone; "
                "refit towards the layer"
            )
        if layer not in self._factors:
            # Experts read the same again, so that what is observed of them stays as it is.
            module = self.source.model.get_submodule(layer)
            self._factors[layer] = stream_factor(layer, module, lambda: self._output(number, batch), *size)
        there = self._of_whole(batch, self.replay.stack_of[self.replay.order[number]])
        here_TD, there_TD = stream_of(output, *size), stream_of(there, *size)
        assert here_TD is not None
        assert there_TD is not None
        return (there_TD.float() - here_TD.float()) / self._factors[layer]

    def _find_lasting(self, path: str) -> None:
        """After the first block of a stack: what its blocks give that is needed for longer, which this one may give too."""
        name = self.replay.stack_of[path]
        if path != self.replay.stacks[name][0]:
            return
        self.replay.find_lasting(path, self.inputs(0), self.saved(0))
        for batch in range(len(self.batches)) if path in self.replay.lasting else ():
            self.states.put((path, batch), self.states.get((name, batch), self.options.device))

    def _collected(
        self, number: int, path: str, layers: list[LayerId], tokens: States | None
    ) -> dict[LayerId, _Collected]:
        """All batches through a block, their statistics taken; with ``tokens`` they are kept there, not the states."""
        model, options = self.source.model, self.options
        with ExitStack() as stack:
            found: dict[LayerId, _Collected] = {}
            captured = stack.enter_context(self.source.adapter.capture(model)) if layers else None
            for layer in layers:
                seen = stack.enter_context(observing(layer, model.get_submodule(layer))) if options.outputs else None
                stored = StoredTokens(tokens, options.device, layer) if tokens is not None else None
                found[layer] = _Collected(layer, options, seen, stored)
            for batch, given in enumerate(self.batches):
                output = self._output(number, batch)
                for layer in layers:
                    assert captured is not None
                    if layer not in captured.batches:
                        raise ValueError(
                            f"layer {layer!r} is never called on these rows, so it can have no statistics; a model with "
                            "experts for other inputs than text cannot be calibrated on text"
                        )
                    rows, routed = given.inputs["input_ids"].shape[0], captured.batches[layer]
                    missing_TD = None
                    if tokens is not None:
                        missing_TD = self._missing(number, layers, batch, output, routed.inputs_TD.shape)
                    try:
                        found[layer].take(given.domain, routed, output, rows, self._first_rows[batch], missing_TD)
                    except NotFinite as error:
                        raise ValueError(f"{error}{self._spoilt(layer)}") from error
                if tokens is None:
                    self._keep(path, batch, output)
        return found

    def _spoilt(self, layer: LayerId) -> str:
        """What an output of ``layer`` that is not finite reaches, in words."""
        after = self.source.layers[self.source.layers.index(layer) + 1 :]
        return f" (what {after[0]!r} and all after it would be calibrated on)" if after else ""

    def _output(self, number: int, batch: int) -> Any:
        return self.replay.block(number, self.inputs(batch), self.saved(batch))

    def _keep(self, path: str, batch: int, output: Any) -> None:
        self.states.put((self.replay.stack_of[path], batch), output)
        if path in self.replay.lasting:
            self.states.put((path, batch), output)

    def _following(self, path: str) -> str | None:
        """The block that probably comes next."""
        order = [block for blocks in self.replay.stacks.values() for block in blocks]
        place = order.index(path) + 1
        return order[place] if place < len(order) else None


class _Collected:
    """What the batches of one sparse layer add up to."""

    def __init__(self, layer: LayerId, options: Options, seen: Observation | None, tokens: StoredTokens | None) -> None:
        self.layer, self.options, self.seen, self.tokens = layer, options, seen, tokens
        self.domains: dict[str, RoutingStatistics] = {}
        self.halves: Halves | None = None

    def take(
        self, domain: str, batch: RoutedBatch, output: Any, rows: int, first_row: int, missing_TD: Tensor | None = None
    ) -> None:
        """Take in a batch of ``rows`` rows; ``output`` is what the block gave."""
        if domain not in self.domains:
            start = {self.layer: len(self.domains) * DOMAIN_STRIDE}
            self.domains[domain] = RoutingStatistics(self.options.reservoir, seed=self.options.seed, start=start)
        statistics = self.domains[domain]
        if self.seen is None:
            statistics.update({self.layer: batch})
            return
        outputs = self.seen.take(batch)
        square_T = stream_square(output, batch.inputs_TD)
        stream = None if square_T is None else {self.layer: square_T}
        statistics.update({self.layer: batch}, outputs={self.layer: outputs}, stream_square=stream)
        if self.halves is None:
            self.halves = Halves.empty(batch.logits_TE.shape[1])
        count = batch.inputs_TD.shape[0]
        row_T = first_row + torch.arange(count, device=batch.inputs_TD.device) // max(1, count // rows)
        self.halves.take(batch, outputs, row_T)
        if self.tokens is not None:
            self.tokens.add(batch, outputs, row_T, missing_TD)

    def by_domain(self) -> dict[str, LayerStatistics]:
        """Statistics by domain."""
        return {domain: statistics.layers[self.layer] for domain, statistics in self.domains.items()}
