"""Several processes that share one job, as a launcher started them: who writes, and what all of them must agree on.

Each process holds the whole model and takes every n-th row of each batch. What any of them decides from numbers of its own
(which state is the best, which rows are pruned) is decided by the main process alone, so that they cannot drift apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed
from torch import Tensor

from mcsmoe.device import pick
from mcsmoe.workflow.launch import die_with

if TYPE_CHECKING:
    from accelerate import PartialState


def is_cpu(device: str) -> bool:
    """Whether ``device`` (auto, cpu or an accelerator's name) means the CPU on this machine."""
    return device == "cpu" or (device == "auto" and not torch.accelerator.is_available())


def start(device: str) -> torch.device:
    """Join the processes of this job, if a launcher started several; call it once, before anything is read.

    Returns:
        The device of this process: ``device``, and of several accelerators the one that is this process's own.

    Raises:
        ValueError: no such device, or fewer accelerators than processes; names the remedy.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here == 1:
        return pick(device)
    # The launcher starts its processes in a session of their own, which outlives it.
    die_with(os.getppid())
    if not is_cpu(device) and torch.accelerator.device_count() < here:
        raise ValueError(
            f"processes is {here}, but this machine shows {torch.accelerator.device_count()} accelerators to the job; "
            "lower processes, or ask for more"
        )
    return _state(device).device


def _state(device: str) -> PartialState:
    from accelerate import PartialState

    return PartialState(cpu=is_cpu(device))


def count() -> int:
    """Number of processes of this job."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return distributed.get_rank() if _joined() else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do, so that they find what it has written."""
    if not is_main():
        distributed.barrier()
    yield
    if is_main() and count() > 1:
        distributed.barrier()


def end() -> None:
    """Wait for all processes, and part."""
    if _joined():
        distributed.barrier()
        distributed.destroy_process_group()


# -- numbers -----------------------------------------------------------------------------------------------------
def summed(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, on each of them; itself where there is one."""
    if count() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def from_main(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The main process's tensors, on every process and where they were; all have the same names and shapes."""
    if count() == 1:
        return dict(tensors)
    made = {}
    for name, tensor in tensors.items():
        shared = tensor.to(device, copy=True)
        distributed.broadcast(shared, src=0)
        made[name] = shared.to(tensor.device)
    return made


def value_of_main(value: float, device: torch.device) -> float:
    """The main process's value, on every process."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return float(from_main({"value": torch.tensor(value, dtype=dtype)}, device)["value"])


def gathered(counts_N: Tensor) -> Tensor:
    """int64 [processes, N]: each process's ``counts_N``."""
    table = torch.zeros(count(), *counts_N.shape, dtype=torch.int64, device=counts_N.device)
    table[rank()] = counts_N
    return summed(table)


def sent_to_main(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """On the main process, the CPU tensors of each of the others, one process after another; elsewhere nothing.

    Every process must exhaust it.
    """
    if count() == 1:
        return
    # The default group may only know accelerators.
    group = distributed.new_group(backend="gloo")
    forms: list[Any] = [None] * count()
    form = [(name, tensor.shape, tensor.dtype) for name, tensor in sorted(tensors.items())]
    distributed.gather_object(form, forms if is_main() else None, dst=0, group=group)
    if is_main():
        for other in range(1, count()):
            received = {}
            for name, shape, dtype in forms[other]:
                flat = torch.empty(max(1, shape.numel()), dtype=dtype)
                distributed.recv(flat, src=other, group=group)
                received[name] = flat[: shape.numel()].reshape(shape)
            yield received
    else:
        for name, shape, _ in form:
            flat = tensors[name].reshape(-1).contiguous()
            distributed.send(flat if shape.numel() else torch.zeros(1, dtype=flat.dtype), dst=0, group=group)
    distributed.barrier(group=group)
