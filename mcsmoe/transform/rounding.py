"""Round the weights of a layer's experts, in place."""

from __future__ import annotations

from mcsmoe.compress.rounding import rounded_experts
from mcsmoe.transform.layers import SparseLayer


def round_layer(layer: SparseLayer, bits: int) -> None:
    """Every matrix of the experts of ``layer`` rounded to ``bits`` bits; novices, biases and the router stay."""
    experts, novices, table = rounded_experts(layer.read_experts(), bits), layer.read_novices(), layer.expert_to_group
    if novices is None:
        layer.write_experts(experts)
    else:
        layer.write_novices(experts, table, novices)
