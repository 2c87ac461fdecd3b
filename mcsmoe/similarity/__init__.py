"""How alike the experts of a layer are, by any of the bases of the paper and of later work.

Every base gives a float64 matrix [E, E] that is symmetric, lies in [0, 1] and has a diagonal of 1. Cosines are mapped to
(1 + cos) / 2. Where nothing is known of a pair, because an expert was never used, the value is the neutral 1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.methods import SIMILARITIES
from mcsmoe.similarity.base import Base, SimilarityInputs, finish
from mcsmoe.similarity.tokens import TOKEN_BASES
from mcsmoe.similarity.vectors import VECTOR_BASES

__all__ = ["BASES", "Base", "SimilarityInputs", "similarity"]

BASES: dict[str, Base] = VECTOR_BASES | TOKEN_BASES
"""By name, what each computes; what it needs stands in ``mcsmoe.methods.SIMILARITIES``."""


def similarity(base: str, inputs: SimilarityInputs) -> Tensor:
    """[E, E] float64 on the CPU: similarity of the experts of one layer.

    Raises:
        ValueError: an unknown base, something it needs that was not given, numbers that are not finite, or statistics,
            router or gradients of another model; names base, layer and what is wrong.
    """
    if base not in BASES:
        raise ValueError(f"similarity base {base!r} is not known; known are {', '.join(BASES)}")
    inputs.check(base, SIMILARITIES[base].needs)
    made_EE = finish(BASES[base](inputs))
    bad = (~torch.isfinite(made_EE)).nonzero()
    if len(bad):
        first, second = bad[0].tolist()
        raise ValueError(
            f"layer {inputs.layer!r}: similarity {base!r} of experts {first} and {second} overflows; the layer's weights "
            "or activations are too large for their number format"
        )
    return made_EE
