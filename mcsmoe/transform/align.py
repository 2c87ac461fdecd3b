"""Align the experts of a layer to a reference, and say how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mcsmoe import align
from mcsmoe.artefacts.tables import frame_of
from mcsmoe.console import progress
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.transform.layers import Layers, SparseLayer
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId

if TYPE_CHECKING:
    import pandas as pd

WAYS = ("weight", "weight-input", "activation")
"""Whole neurons by their weights; by their weights without the output projection; by hidden activations on tokens."""

TO_LEADER = "-dominant"
"""Ends the name of an alignment to the leader of each group, which merging does once there are groups."""


@dataclass(frozen=True)
class AlignmentSettings:
    """How the experts of each layer are aligned to its expert 0."""

    alignment: str = "weight"
    threads: int = 1

    @property
    def whole_layer(self) -> bool:
        """Whether anything is aligned before there are groups."""
        return self.alignment in WAYS

    def check(self, statistics: RoutingStatistics | None) -> None:
        """Raise ValueError for an alignment that is not known, or one by activations without statistics."""
        known = ("none", *WAYS, *(f"{way}{TO_LEADER}" for way in WAYS))
        if self.alignment not in known:
            raise ValueError(f"alignment is {self.alignment!r}, which is not known; use one of {', '.join(known)}")
        if self.alignment.startswith("activation") and statistics is None:
            raise ValueError(f"alignment is {self.alignment!r}, which compares activations; give routing statistics")


class Aligner:
    """Aligns layers to their expert 0 in place; the order of a layer that it meets again is not worked out again."""

    def __init__(self, settings: AlignmentSettings, statistics: RoutingStatistics | None = None) -> None:
        settings.check(statistics)
        self.settings, self.statistics = settings, statistics
        self.alignments: dict[LayerId, align.Alignment] = {}

    def __call__(self, layer: SparseLayer) -> None:
        """Align the experts of ``layer``; the model computes the same function afterwards."""
        if not self.settings.whole_layer:
            return
        weights = layer.view_experts()
        if layer.id not in self.alignments:
            weights.require_finite(layer.id)
            self.alignments[layer.id] = align_layer(
                weights,
                torch.zeros(weights.num_experts, dtype=torch.int64),
                self.settings.alignment,
                None if self.statistics is None else self.statistics.layers[layer.id],
                layer.activation,
                self.settings.threads,
                layer.id,
            )
        reorder(layer, weights, self.alignments[layer.id].permutation_EF)


def reorder(layer: SparseLayer, weights: ExpertWeights, permutation_EF: Tensor) -> None:
    """Reorder the neurons of a layer in place; ``weights`` are its experts as it shows them, and reordered too.

    They may be the layer's own memory, so that a second copy of a large layer is never made.
    """
    align.permute_(weights, permutation_EF, layer.id)
    layer.write_experts(weights)


def align_layers(
    layers: Layers, settings: AlignmentSettings, statistics: RoutingStatistics | None = None
) -> dict[LayerId, align.Alignment]:
    """Align the experts of every layer to its expert 0, in place.

    Raises:
        ValueError: settings that cannot be, or weights that are not finite; names the field or the layer.
    """
    aligner = Aligner(settings, statistics)
    layers.change(aligner, progress(layers.ids, "alignment"))
    return aligner.alignments


def align_layer(
    weights: ExpertWeights,
    reference_E: Tensor,
    how: str,
    statistics: LayerStatistics | None,
    activation: ExpertActivation,
    workers: int = 1,
    layer: LayerId = "",
    pool_E: Tensor | None = None,
) -> align.Alignment:
    """Align experts ``weight`` (whole neurons), ``weight-input`` (without the output projection) or by ``activation``.

    Raises:
        ValueError: activations are to be compared but there are no statistics; names the layer.
    """
    if how != "activation":
        return align.align_by_weight(weights, reference_E, how == "weight", workers, layer)
    if statistics is None:
        raise ValueError(f"layer {layer!r}: alignment by activation needs routing statistics; give --routing")
    return align.align_by_tokens(weights, statistics.tokens(layer), activation, reference_E, pool_E, workers, layer)


def permutation_frame(alignments: Mapping[LayerId, align.Alignment]) -> pd.DataFrame:
    """Table ``permutation``."""
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "permutation": found.permutation_EF[expert].tolist(),
            "reference_expert": int(found.reference_E[expert]),
            "gain": float(found.gain_E[expert]),
        }
        for layer, found in alignments.items()
        for expert in range(len(found.reference_E))
    ]
    return frame_of(rows, "permutation")
