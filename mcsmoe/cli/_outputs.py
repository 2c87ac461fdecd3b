"""What the commands leave beside the weights, and say of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mcsmoe.console import log

if TYPE_CHECKING:
    from mcsmoe.checkpoint.streaming import Streamed

GROUPS = "groups.parquet"
"""Who led whom: beside the weights of every merged checkpoint."""

EXPERTS = "experts.json"
"""Which experts each layer kept: what other tools read."""


def copy_groups(source: Path, out: Path) -> None:
    """The groups of the checkpoint that was read belong to the one that was written too."""
    copy_beside(GROUPS, source, out)


def copy_beside(name: str, source: Path, out: Path) -> None:
    """A file of ``source``, if it is there, belongs to ``out`` too."""
    with suppress(FileNotFoundError):
        (out / name).write_bytes((source / name).read_bytes())


def say_size(source: Path, out: Path, first: str = "") -> None:
    """Say how large the written checkpoint is."""
    from mcsmoe.artefacts.tensors import TensorFolder

    before, after = (TensorFolder(folder).nbytes for folder in (source, out))
    log.info(
        "%s: %s%.1f MB of weights, from %.1f MB (%s)", out, first, after / 1e6, before / 1e6, f"{after / before:.1%}"
    )


def say_engines(source: Streamed, experts: Iterable[int]) -> None:
    """Say, before any work, what serving engines make of ``experts`` in the layers, where they do not of the source's."""
    from mcsmoe.checkpoint.engines import notes

    now = [source.adapter.num_experts(source.model, layer) for layer in source.layers]
    counts = list(experts)
    known = notes(source.config, now, now)
    for note in notes(source.config, counts, counts):
        if note not in known:
            log.warning("%s", note)
