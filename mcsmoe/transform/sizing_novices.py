"""What novices of several ranks would leave of a layer's outputs, for the choice of a rank by predicted error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mcsmoe.calibration.layer_major import Options
from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.in_sequence import Texts, opened
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.novices import fit_ranks, remainder_sums
from mcsmoe.types import LayerId

RANKS = (4, 16, 64)
"""What is tried where no rank is given."""

CONSTANT = 0
"""In place of a rank: a novice that is its constant alone."""


@torch.no_grad()
def remainders(
    folder: Path, texts: Texts, ranks: Sequence[int], options: Options, work: Path
) -> dict[LayerId, dict[int, LayerStatistics]]:
    """By layer and rank, the layer's statistics with what a novice leaves of each expert's output in place of the output.

    Of the whole model, in one pass. Novices are fitted on the calibration rows that are not held out, and their
    remainders are those on the rows that are, taken to be the same share of all.

    Args:
        ranks: of affine novices; ``CONSTANT`` for a constant one.
    """
    found: dict[LayerId, dict[int, LayerStatistics]] = {}
    with opened(folder, texts, options, work) as major:

        def measure(layer: LayerId, statistics: Mapping[str, LayerStatistics], tokens: LayerTokens) -> None:
            here = SparseLayer(major.source.model, major.source.adapter, layer)
            weights, activation = here.read_experts(), here.activation
            whole = blend(statistics, texts.weights)
            counts = [(batch.inputs_TD.shape[0], batch.held_out) for batch in tokens.batches()]
            held = sum(count for count, is_held in counts if is_held)
            share = held / sum(count for count, _ in counts) if held else 1.0
            found[layer] = {}
            for rank, novices in fit_ranks(weights, activation, tokens, ranks).items():
                left = remainder_sums(weights, activation, tokens, novices, held_out_alone=held > 0).scaled(1 / share)
                assert whole.outputs is not None
                left = replace(left, stream_square_sum=whole.outputs.stream_square_sum.to(left.gram_EE))
                found[layer][rank] = replace(whole, outputs=left, reservoir=None)

        for _ in major.blocks(measure):
            pass
    return found
