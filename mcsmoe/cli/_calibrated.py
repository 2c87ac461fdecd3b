"""What a command that reduces layers knows of its calibration: rows, and statistics of all layers by domain."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from mcsmoe.calibration.folder import FolderLayers
from mcsmoe.calibration.layer_major import DomainBatch
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli._beside import layers_beside
from mcsmoe.cli._calibration import statistics
from mcsmoe.cli._domains import domains, given_weights
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.in_sequence import Texts
from mcsmoe.types import LayerId


class Calibrated:
    """Calibration rows or collected statistics, as options name them; a pass over the whole model is made once at most.

    Raises:
        ValueError: neither is given, or weights that do not fit the domains.
    """

    def __init__(self, source: Streamed, arguments: argparse.Namespace) -> None:
        if (arguments.calibration is None) == (arguments.statistics is None):
            raise ValueError("layers are reduced by what they do on text: give --calibration FILE, or --statistics DIR")
        self.source, self.arguments = source, arguments
        self.weights: Mapping[str, float] | None = None
        """Share of the tokens by domain; None: every token counts once."""
        if arguments.calibration is not None:
            shares = {one.name: one.weight or 0.0 for one in arguments.calibration}
            self.weights = None if arguments.calibration[0].weight is None else shares
            self.domains = list(shares)
        else:
            self._found = statistics(source, arguments).layers
            found = self._found
            self.weights = found.weights if isinstance(found, FolderLayers) else None
            self.domains = list(found.by_domain(next(iter(found)))) if isinstance(found, FolderLayers) else ["all"]
        given = given_weights(getattr(arguments, "domains", None), self.domains)
        self.weights = self.weights if given is None else given

    @property
    def has_rows(self) -> bool:
        """Whether there is text, and not statistics alone."""
        return self.arguments.calibration is not None

    @cached_property
    def _batches(self) -> list[DomainBatch]:
        seq2seq = bool(self.source.model.config.is_encoder_decoder)
        return [
            DomainBatch(one.name, {name: batch[name] for name in batch if seq2seq or name != "labels"})
            for one in domains(self.source, self.arguments)
            for batch in one.batches
        ]

    def texts(self) -> Texts:
        """The rows."""
        return Texts(self._batches, self.weights)

    def by_domain(self, layer: LayerId) -> Mapping[str, LayerStatistics]:
        """Statistics of one layer of the whole model, by domain."""
        if self.has_rows:
            return self._passed.by_domain(layer)
        found = self._found
        return found.by_domain(layer) if isinstance(found, FolderLayers) else {"all": found[layer]}

    def statistics(self, layer: LayerId) -> LayerStatistics:
        """Statistics of one layer of the whole model, domains blended."""
        return blend(self.by_domain(layer), self.weights)

    def layers(self, chosen: Sequence[LayerId]) -> Mapping[LayerId, LayerStatistics]:
        """Statistics of some layers, each blended when it is asked for."""
        return _Blended(self, chosen)

    @cached_property
    def _passed(self) -> FolderLayers:
        return layers_beside(self.source, self.arguments)


class _Blended(Mapping[LayerId, LayerStatistics]):
    def __init__(self, calibrated: Calibrated, chosen: Sequence[LayerId]) -> None:
        self.calibrated, self.chosen = calibrated, chosen

    def __getitem__(self, layer: LayerId) -> LayerStatistics:
        return self.calibrated.statistics(layer)

    def __iter__(self) -> Iterator[LayerId]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)
