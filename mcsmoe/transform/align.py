"""Align the experts of a layer to a reference, and say how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from mcsmoe import align
from mcsmoe.artefacts.tables import frame_of
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId

if TYPE_CHECKING:
    import pandas as pd


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
