"""The forward pass of a model cut at its blocks, with the model's own code between them.

A block is a member of the module list that holds the sparse layers (of encoder and decoder). To run one block on a batch,
the model's own forward is called: blocks whose turn is past return at once what they gave when it was their turn, the
block itself computes, and the pass ends there. Masks, positions, sliding windows and cross-attention are so what the
model makes of its inputs, for each block anew, and nothing needs to be known of what stands between the blocks; what that
costs is the embedding and the masks once per block. It also lets a killed run go on anywhere.

What a block gives is mostly used up by the next one. Where a model goes back to what an earlier block gave (attention
over the residuals of several blocks), that has to be kept: ``find_lasting`` finds such blocks by what a NaN in the place
of their output reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from mcsmoe.calibration.products import fast_products, slow_types
from mcsmoe.types import Batch, LayerId

Saved = Callable[[str], Any]
"""By stack, what its last block gave for the batch that runs; by path, what a block gave that is needed for longer."""


_ROUTER_LOGITS = "output_router_logits"


def _configs(model: Any) -> list[Any]:
    """The configurations of a model and of its parts, each once."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(one): one for one in found if one is not None}.values())


class _Halt(BaseException):
    """Ends a forward pass; no ``Exception``, so that no model code takes it for its own."""


def block_of(layer: LayerId, lists: Container[str]) -> str | None:
    """Path of the member of the outermost of the module lists ``lists`` that holds ``layer``; None if none does."""
    parts = layer.split(".")
    for count in range(1, len(parts)):
        if ".".join(parts[:count]) in lists:
            return ".".join(parts[: count + 1])
    return None


def stacks_of(model: nn.Module, layers: list[LayerId]) -> dict[str, list[str]]:
    """By module list, the paths of its blocks: every outermost list that holds one of ``layers``, and its namesakes.

    Namesakes are lists beside them with the same last name: a dense encoder before a sparse decoder.

    Raises:
        ValueError: a layer is in no module list; names it.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    holding: list[str] = []
    for layer in layers:
        block = block_of(layer, lists)
        if block is None:
            raise ValueError(f"layer {layer!r} is in no list of blocks, so the model cannot be run block by block")
        if block.rpartition(".")[0] not in holding:
            holding.append(block.rpartition(".")[0])
    names = {path.rpartition(".")[2] for path in holding}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    chosen = [path for path in outermost if path in holding or path.rpartition(".")[2] in names]
    return {path: [f"{path}.{name}" for name, _ in lists[path].named_children()] for path in chosen}


@dataclass
class _Probe:
    """One pass in which no block computes, and one gives NaN: does that reach more than the block after it?"""

    block: str
    stack: str
    output: Any  # of the shape that the blocks of the stack give
    others: Mapping[str, Any]  # by stack that is done, what its last block gave
    reached: bool = False
    _since: int | None = None  # calls since the block's own

    def passed(self, path: str, stack: str, call: Any) -> Any:
        """What the block at ``path`` gives in this pass."""
        if stack in self.others:
            return _pytree.tree_map(_copied, self.others[stack])
        if self._since is not None:
            self._since += 1
            self.look(call)
        if self.reached or stack != self.stack:  # what comes to another stack is the whole of what it gets
            raise _Halt
        if path != self.block:
            return _pytree.tree_map(_copied, self.output)
        self._since = 0
        return _pytree.tree_map(_spoiled, self.output)

    def look(self, call: Any) -> None:
        """Whether the NaN is in what something is called with; what follows the block directly may have it."""
        if self._since is None or self._since <= 1:
            return
        leaves = _pytree.tree_leaves(call)
        found = any(isinstance(one, Tensor) and one.is_floating_point() and bool(one.isnan().any()) for one in leaves)
        self.reached = self.reached or found

    def at_the_end(self, call: Any) -> None:
        """As ``look``, for what comes after the last block."""
        if self._since is not None:
            self._since += 1
        self.look(call)


def _copied(leaf: Any) -> Any:
    return torch.ones_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _spoiled(leaf: Any) -> Any:
    return torch.full_like(leaf, torch.nan) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@dataclass
class Replay:
    """Runs a model block by block; inside ``installed`` alone.

    Attributes:
        stacks: as ``stacks_of`` gives them.
        order: paths of the blocks in the order of their calls, as far as it is known.
        lasting: paths of the blocks whose output is read by more than the next one.
    """

    model: Any
    stacks: Mapping[str, list[str]]
    order: list[str] = field(default_factory=list)
    lasting: set[str] = field(default_factory=set)
    _probe: _Probe | None = None
    _calls: int = 0
    _stop: int | None = None
    _entered: bool = False
    _saved: Saved | None = None
    _output: Any = None
    _last: dict[str, int] = field(default_factory=dict)
    _spoiled: dict[str, Any] = field(default_factory=dict)
    _slow: dict[int | None, list[torch.dtype]] = field(default_factory=dict)  # by number of the block that is run

    def __post_init__(self) -> None:
        self.stack_of = {block: stack for stack, blocks in self.stacks.items() for block in blocks}

    @contextmanager
    def installed(self) -> Iterator[Replay]:
        """The blocks of the model do as this object says."""
        blocks = {path: self.model.get_submodule(path) for path in self.stack_of}
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        # A head that is asked only whether there is another block need not compute logits of the whole vocabulary.
        hook = head.register_forward_pre_hook(self._at_the_end) if isinstance(head, nn.Module) else None
        for path, block in blocks.items():
            block.forward = self._wrapped(path, block.forward)
        # A balance loss over the router logits of all layers has none to look at where blocks are passed over.
        balanced = [one for one in _configs(self.model) if getattr(one, _ROUTER_LOGITS, False)]
        for one in balanced:
            setattr(one, _ROUTER_LOGITS, False)
        try:
            yield self
        finally:
            for one in balanced:
                setattr(one, _ROUTER_LOGITS, True)
            for block in blocks.values():
                del block.forward
            if hook is not None:
                hook.remove()

    def _at_the_end(self, _head: nn.Module, args: Any) -> None:
        if self._probe is not None:
            self._probe.at_the_end(args)
            raise _Halt
        if self._entered:
            raise _Halt

    def _wrapped(self, path: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            number = self._calls
            self._calls += 1
            if self._probe is not None:
                return self._probe.passed(path, self.stack_of[path], (args, kwargs))
            if self._stop is None or number < self._stop:
                return self._passed(self.stack_of[path], number)
            if number == len(self.order):
                self.order.append(path)
            if self._entered:
                raise _Halt
            self._output = usual(*args, **kwargs)
            raise _Halt

        return forward

    def _passed(self, stack: str, number: int) -> Any:
        """What stands for a block whose turn is past: the last of its stack gives what is saved, and to it alone.

        What earlier ones give is replaced before it is used; they share a copy that the model may spoil.
        """
        assert self._saved is not None
        if number == self._last[stack]:
            return self._saved(stack)
        if self.order[number] in self.lasting:
            return self._saved(self.order[number])
        if stack not in self._spoiled:
            self._spoiled[stack] = self._saved(stack)
        return self._spoiled[stack]

    def next_block(self, number: int, inputs: Batch, saved: Saved) -> str | None:
        """Path of the block that is called after ``number`` others; None where the model ends before."""
        if number < len(self.order):
            return self.order[number]
        self._run(number, inputs, saved, entered=True)
        return self.order[number] if number < len(self.order) else None

    @torch.no_grad()
    def find_lasting(self, path: str, inputs: Batch, saved: Saved) -> None:
        """Fill ``lasting`` for the stack whose first block, ``path``, has just run and is saved.

        The model runs once for each block with a NaN for what that block gives, and something of the right shape for all
        others; if the NaN comes to more than the next block, or to the head, the block's output lasts. A model that
        cannot be run so is taken to need them all.
        """
        stack = self.stack_of[path]
        number = self.order.index(path)
        before = {self.stack_of[one] for one in self.order[:number]} - {stack}
        for block in self.stacks[stack]:
            self._probe = probe = _Probe(block, stack, saved(stack), {other: saved(other) for other in before})
            try:
                probe.at_the_end(self.model(**inputs, use_cache=False))
            except _Halt:
                pass
            except Exception:
                probe.reached = True
            finally:
                self._probe = None
            if probe.reached:
                self.lasting.add(block)

    def block(self, number: int, inputs: Batch, saved: Saved) -> Any:
        """What the block that is called after ``number`` others gives."""
        ended = self._run(number, inputs, saved)
        if ended is not None:
            raise ValueError(
                "the model calls fewer blocks for some batches than for others; it cannot be run by blocks"
            )
        output, self._output = self._output, None
        return output

    def rest(self, inputs: Batch, saved: Saved) -> Any:
        """What the model returns after its last block."""
        return self._run(None, inputs, saved)

    @torch.no_grad()
    def _run(self, stop: int | None, inputs: Batch, saved: Saved, entered: bool = False) -> Any:
        self._calls, self._stop, self._saved, self._entered = 0, stop, saved, entered
        self._last = {self.stack_of[path]: number for number, path in enumerate(self.order[:stop])}
        if stop not in self._slow:
            self._slow[stop] = slow_types(self.model.parameters())
        try:
            with fast_products(self._slow[stop]):
                return self.model(**inputs, use_cache=False)
        except _Halt:
            return None
        finally:
            self._saved = None
            self._spoiled.clear()
