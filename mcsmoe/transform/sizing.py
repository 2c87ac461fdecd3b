"""How many experts and how many bits fit into a given size, and which of the ways loses least by what is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsmoe.compress.quantise import dequantise, packed_bytes, quantise
from mcsmoe.criteria.quadratic import Limits
from mcsmoe.criteria.scores import CriterionInputs, choose
from mcsmoe.grouping.budget import predicted
from mcsmoe.similarity.tokens import hidden, output
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.transform.budget import energy, relative_curve
from mcsmoe.transform.domains import slim
from mcsmoe.transform.layers import Layers, SparseLayer
from mcsmoe.types import LayerId, Role


@dataclass(frozen=True)
class Alternative:
    """One way to come down to a size."""

    budget: str
    experts: int  # on average
    bits: int | None  # None: as they are stored
    bytes: int
    pruned: float  # predicted squared change of the layers' outputs, over the residual stream's, summed over layers
    rounded: float  # the same of rounding
    dropped: str = "delete"  # what becomes of dropped experts
    rank: int | None = None  # of affine novices

    @property
    def error(self) -> float:
        """What both change together."""
        return self.pruned + self.rounded


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint: what is not of a single expert, the files' headers, and by layer what one expert takes.

    ``packed`` is by number of bits, where experts can be packed.
    """

    fixed: int
    headers: int
    stored: Mapping[LayerId, int]  # its row of the router included
    packed: Mapping[int, Mapping[LayerId, int]]
    rows: Mapping[LayerId, int]  # one row of the router
    vectors: Mapping[LayerId, int]  # as many numbers as the model is wide
    experts: Mapping[LayerId, int]

    @classmethod
    def of(cls, layers: Layers, total: int, headers: int, group: int | None, bits: Sequence[int]) -> Sizes:
        """From the structure of the layers.

        Args:
            total: bytes of all weights.
            headers: bytes of the files beside these.
            group: entries that share a scale; None: experts cannot be packed.
        """
        stored: dict[LayerId, int] = {}
        rows: dict[LayerId, int] = {}
        vectors: dict[LayerId, int] = {}
        packed: dict[int, dict[LayerId, int]] = {one: {} for one in bits if group is not None}
        for layer in layers.ids:
            structure = layers.structure(layer)
            weights, router = structure.read_experts(), structure.read_router()
            row = router.weight_ED[0].nbytes + (0 if router.bias_E is None else router.bias_E[0].nbytes)
            (inner, *_) = weights.tensors.values()
            rows[layer], vectors[layer] = row, weights.d_model * inner.element_size()
            stored[layer] = row + sum(tensor[0].nbytes for tensor in weights.tensors.values())
            for one, sizes in packed.items():
                assert group is not None
                sizes[layer] = row
                for name, tensor in weights.tensors.items():
                    matrix = weights.roles[name] in (Role.INPUT, Role.OUTPUT)
                    shape, wide = tuple(tensor.shape[1:]), tensor.element_size()
                    sizes[layer] += packed_bytes(shape, wide, one, group) if matrix else tensor[0].nbytes
        experts = {layer: layers.structure(layer).num_experts for layer in layers.ids}
        every = sum(stored[layer] * count for layer, count in experts.items())
        return cls(total - every, headers, stored, packed, rows, vectors, experts)

    def bytes(self, counts: Mapping[LayerId, int], bits: int | None) -> int:
        """Bytes of the weights with that many experts in each layer."""
        each = self.stored if bits is None else self.packed[bits]
        return self.fixed + sum(each[layer] * count for layer, count in counts.items())

    def with_novices(self, counts: Mapping[LayerId, int], rank: int) -> int:
        """The same where novices of a rank (0: constants) answer for the others: rows of the router stay."""
        total = self.bytes(counts, None)
        for layer, count in counts.items():
            total += (self.experts[layer] - count) * (self.rows[layer] + self.vectors[layer] * (1 + 2 * rank))
        return total

    def at_most(self, counts: Mapping[LayerId, int], bits: int | None) -> int:
        """Bytes that the files may have: a packed matrix is three tensors in their headers."""
        return self.bytes(counts, bits) + self.headers * (1 if bits is None else 3)


@dataclass(frozen=True)
class Wanted:
    """What a size is come down to by.

    Attributes:
        target: bytes.
        budgets: ``uniform``, ``predicted``, or both; packed experts are the same number in every layer.
        limits: of every layer.
        fewest: experts that every layer keeps at least.
    """

    target: int
    sizes: Sizes
    budgets: Sequence[str]
    limits: Mapping[LayerId, Limits]
    criterion: str = "gram"
    fewest: int = 1

    def curve(self, layer: LayerId, statistics: LayerStatistics) -> Tensor:
        """float64 [E + 1]: predicted error of a layer with k experts kept."""
        return relative_curve(layer, statistics, self.criterion, self.limits[layer], self.fewest)

    def usable(self, curves: Mapping[LayerId, Tensor]) -> list[int]:
        """Numbers of experts that every layer can keep, the largest first."""
        numbers = sorted(next(iter(self.limits.values())).numbers(self.fewest), reverse=True)
        return [k for k in numbers if all(k < len(curve) and torch.isfinite(curve[k]) for curve in curves.values())]


def novice_alternatives(
    remainders: Mapping[LayerId, Mapping[int, LayerStatistics]],
    statistics: Mapping[LayerId, LayerStatistics],
    wanted: Wanted,
) -> list[Alternative]:
    """As ``alternatives`` where a novice of one of several ranks (0: a constant) answers for each dropped expert.

    Args:
        remainders: by layer and rank, statistics of what a novice leaves of its expert.
        statistics: of the experts' own outputs, by which ``predicted`` spreads them over the layers.
    """
    found: list[Alternative] = []
    own = {layer: wanted.curve(layer, statistics[layer]) for layer in remainders}
    sizes = wanted.sizes
    for rank in next(iter(remainders.values())):
        curves = {layer: wanted.curve(layer, left[rank]) for layer, left in remainders.items()}
        for budget in wanted.budgets:
            for kept in wanted.usable(curves):
                counts = dict.fromkeys(curves, kept) if budget == "uniform" else predicted(own, kept)
                size = sizes.with_novices(counts, rank)
                if size + sizes.headers > wanted.target:
                    continue
                pruned = sum(float(curves[layer][count]) for layer, count in counts.items())
                dropped = "affine" if rank else "constant"
                found.append(Alternative(budget, kept, None, size, pruned, 0.0, dropped, rank or None))
                break
    return found


@torch.no_grad()
def rounding_errors(
    layer: SparseLayer, statistics: LayerStatistics, bits: Sequence[int], group: int
) -> dict[int, Tensor]:
    """By bits, float64 [E]: squared change of each expert's gated outputs over all its tokens when it is rounded.

    Measured on the tokens that are kept of it. Errors of two experts are taken to have nothing in common.
    """
    weights, reservoir = layer.read_experts(), statistics.reservoir
    if reservoir is None:
        raise ValueError(f"layer {layer.id!r}: the statistics hold no tokens; collect them with --reservoir 1 or more")
    inputs_ESD = reservoir.input_ESD.to(next(iter(weights.tensors.values())).device)
    kept_E = reservoir.count_E.to(inputs_ESD.device)
    mask_ES = torch.arange(inputs_ESD.shape[1], device=kept_E.device) < kept_E[:, None]
    gate_ES = torch.where(mask_ES, reservoir.gate_ES.to(kept_E.device).double(), 0.0)
    stands_E = statistics.computed_E.to(kept_E.device).double() / kept_E.clamp(min=1)
    exact_ESD = output(weights, hidden(weights, inputs_ESD, layer.activation))
    made = {}
    for one in bits:

        def rounded(name: str, tensor: Tensor, one: int = one) -> Tensor:
            if weights.roles[name] not in (Role.INPUT, Role.OUTPUT):
                return tensor
            return dequantise(*quantise(tensor.flatten(0, 1), one, group)).view_as(tensor)

        coarse = weights.map(rounded)
        change_ESD = output(coarse, hidden(coarse, inputs_ESD, layer.activation)) - exact_ESD
        square_ES = change_ESD.double().square().sum(dim=2) * gate_ES.square()
        made[one] = (square_ES.sum(dim=1) * stands_E).cpu()
    return made


def alternatives(
    layers: Layers,
    statistics: Mapping[LayerId, LayerStatistics],
    wanted: Wanted,
    group: int | None = None,
) -> list[Alternative]:
    """The ways to come down to a size, each with as many experts as fit, the smallest predicted error first.

    Args:
        group: entries of packed experts that share a scale; None: they cannot be packed.

    Raises:
        ValueError: not even the fewest experts in the fewest bits fit; names the size that would.
    """
    curves: dict[LayerId, Tensor] = {}
    small: dict[LayerId, LayerStatistics] = {}
    rounding: dict[LayerId, dict[int, Tensor]] = {}
    for layer in layers.ids:
        whole = statistics[layer]  # read once: it may come from a file
        curves[layer], small[layer] = wanted.curve(layer, whole), slim(whole)
        if group is not None and wanted.sizes.packed:
            with layers.open(layer) as opened:
                rounding[layer] = rounding_errors(opened, whole, list(wanted.sizes.packed), group)
    sizes, target = wanted.sizes, wanted.target
    found: list[Alternative] = []
    least = None
    for budget in wanted.budgets:
        for bits in (None, *(sizes.packed if budget == "uniform" else ())):
            for kept in wanted.usable(curves):
                counts = dict.fromkeys(layers.ids, kept) if budget == "uniform" else predicted(curves, kept)
                size = sizes.at_most(counts, bits)
                least = size if least is None else min(least, size)
                if size > target:
                    continue
                pruned = sum(float(curves[layer][count]) for layer, count in counts.items())
                rounded = 0.0
                for layer, count in counts.items() if bits is not None else ():
                    inputs = CriterionInputs(layer, small[layer])
                    kept_K = choose(wanted.criterion, inputs, count, wanted.limits[layer])
                    rounded += float(rounding[layer][bits or 0][kept_K].sum()) / energy(small[layer])
                found.append(Alternative(budget, kept, bits, sizes.bytes(counts, bits), pruned, rounded))
                break
    if not found:
        raise ValueError(f"nothing comes down to {target / 1e9:.3f} GB: the least is {(least or 0) / 1e9:.3f} GB")
    return sorted(found, key=lambda one: one.error)
