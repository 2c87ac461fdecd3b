"""The sparse layers of a checkpoint on disk: one in memory at a time, and changes written into a new checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.types import LayerId


@dataclass(frozen=True)
class Output:
    """The checkpoint that changes are written into."""

    folder: Path
    provenance: Mapping[str, Any]
    extra: Callable[[Path], object] | None = None
    """Writes further files into the folder before it appears."""


class CheckpointLayers:
    """The layers of a checkpoint folder; ``change`` writes another one, which is there only once complete."""

    def __init__(self, source: Streamed, output: Output | None = None) -> None:
        self.source, self.output = source, output

    @property
    def ids(self) -> list[LayerId]:
        """Every sparse layer, in forward order."""
        return self.source.layers

    def structure(self, layer: LayerId) -> SparseLayer:
        """The layer on the meta device."""
        return SparseLayer(self.source.model, self.source.adapter, layer)

    @contextmanager
    def open(self, layer: LayerId) -> Iterator[SparseLayer]:
        """The layer as the checkpoint has it; what is written to it is gone after the context."""
        with self.source.layer(layer):
            yield self.structure(layer)

    def change(self, function: Callable[[SparseLayer], None], layers: Iterable[LayerId]) -> None:
        """Write the checkpoint with ``function`` applied to each of ``layers``, one in memory at a time.

        Raises:
            ValueError: there is no output to write to.
        """
        if self.output is None:
            raise ValueError(f"{self.source.folder}: is only read; give an output to write changes to")
        self.source.rewrite(
            self.output.folder,
            lambda layer: function(self.structure(layer)),
            self.output.provenance,
            layers=layers,
            extra=self.output.extra,
        )
