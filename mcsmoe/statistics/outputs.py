"""Sums over what the experts of one layer gave: every criterion, similarity and budget that looks at outputs.

Notation: f_e(x) is the output of expert e before its combine weight, g_te that weight (0 where e is not chosen).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mcsmoe.statistics.segments import expert_sums

_BLOCK_BYTES = {"cpu": 2**21}  # of float64 outputs multiplied at once: what the cache holds; else what fills a GPU
_LARGEST = "largest_norm_E"


@dataclass(frozen=True)
class ChosenOutputs:
    """What the experts of one layer gave in one forward pass, over all token positions (padding included)."""

    outputs_TKD: Tensor  # before the combine weight; anything where nothing was computed
    weights_TK: Tensor  # what the layer multiplied them with, constant factors of the family included
    scale: float = 1.0  # of these factors alone: weights_TK is the router's combine weight times ``scale``


@dataclass
class OutputSums:
    """Sums over the valid tokens that were computed, in float64; ``largest_norm_E`` is a maximum.

    Over tokens t and experts i, j: frequency and REAP are ratios of these, ``gram_EE`` is the quadratic form of deleting
    experts, ``norm_gram_EE`` its bound by norms.
    """

    gate_square_sum_E: Tensor  # sum g^2
    norm_sum_E: Tensor  # sum |f|
    norm_square_sum_E: Tensor  # sum |f|^2
    gated_norm_sum_E: Tensor  # sum g |f|
    gated_norm_square_sum_E: Tensor  # sum g^2 |f|^2
    gram_EE: Tensor  # sum g_i g_j <f_i, f_j> over tokens that chose both
    norm_gram_EE: Tensor  # sum g_i g_j |f_i| |f_j| over the same tokens
    output_sum_ED: Tensor  # sum f
    gated_output_sum_ED: Tensor  # sum g f
    largest_norm_E: Tensor  # largest |f|; 0 where nothing was computed
    layer_square_sum: Tensor  # []: sum |y|^2, y being what the routed experts gave together
    stream_square_sum: Tensor  # []: sum of the squared residual stream after the layer's block; 0 where it was not seen

    @classmethod
    def measured(cls, outputs_TKD: Tensor, chosen_TK: Tensor, gate_TK: Tensor, num_experts: int) -> OutputSums:
        """Sums over T tokens, all valid.

        Args:
            outputs_TKD: f of each choice; anything where ``chosen_TK`` is -1.
            chosen_TK: int64, expert of each choice, -1 where none computed it; no expert twice in a row.
            gate_TK: what the layer multiplied each output with.
            num_experts: E.
        """
        tokens, choices, width = outputs_TKD.shape
        place_N = (chosen_TK.flatten() >= 0).nonzero()[:, 0]
        expert_N, gate_N = chosen_TK.flatten()[place_N], gate_TK.flatten()[place_N].double()
        count_E = torch.bincount(expert_N, minlength=num_experts)
        flat_ND = outputs_TKD.reshape(tokens * choices, width)

        def reduce(rows_CRD: Tensor, choice_CR: Tensor, out_2CD: Tensor) -> None:
            torch.sum(rows_CRD, dim=1, out=out_2CD[0])
            torch.sum(rows_CRD.mul_(gate_N[choice_CR][:, :, None]), dim=1, out=out_2CD[1])

        sums_2ED = expert_sums(flat_ND, place_N, expert_N, count_E, 2, reduce)
        product_TKK = _products(outputs_TKD, chosen_TK >= 0)
        square_N = product_TKK.diagonal(dim1=1, dim2=2).flatten()[place_N]
        norm_N = square_N.sqrt()
        weight_TK = torch.where(chosen_TK >= 0, gate_TK.double(), 0.0)
        norm_TK = torch.zeros_like(weight_TK).flatten().index_put((place_N,), gate_N * norm_N).view_as(weight_TK)
        gram_EE = _paired(weight_TK[:, :, None] * weight_TK[:, None, :] * product_TKK, chosen_TK, num_experts)
        largest_E = norm_N.new_zeros(num_experts).scatter_reduce(0, expert_N, norm_N, "amax")

        def by_expert(term_N: Tensor) -> Tensor:
            # Without a single choice bincount forgets the type of its weights.
            return torch.bincount(expert_N, weights=term_N, minlength=num_experts).double()

        return cls(
            gate_square_sum_E=by_expert(gate_N.square()),
            norm_sum_E=by_expert(norm_N),
            norm_square_sum_E=by_expert(square_N),
            gated_norm_sum_E=by_expert(gate_N * norm_N),
            gated_norm_square_sum_E=by_expert(gate_N.square() * square_N),
            gram_EE=gram_EE,
            norm_gram_EE=_paired(norm_TK[:, :, None] * norm_TK[:, None, :], chosen_TK, num_experts),
            output_sum_ED=sums_2ED[0],
            gated_output_sum_ED=sums_2ED[1],
            largest_norm_E=largest_E,
            layer_square_sum=gram_EE.sum(),
            stream_square_sum=torch.zeros_like(gram_EE[0, 0]),
        )

    @classmethod
    def empty(cls, num_experts: int, width: int, device: torch.device | str = "cpu") -> OutputSums:
        """Of no tokens."""
        sizes = {"E": num_experts, "D": width}
        shapes = {one.name: tuple(sizes[axis] for axis in _axes(one.name)) for one in fields(cls)}
        return cls(**{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()})

    def add_(self, other: OutputSums) -> None:
        """Take in the sums of other tokens of the same layer."""
        for name, tensor in other.tensors().items():
            mine: Tensor = getattr(self, name)
            given = tensor.to(mine.device)
            mine.copy_(torch.maximum(mine, given)) if name == _LARGEST else mine.add_(given)

    def scaled(self, weight: float) -> OutputSums:
        """The sums if every token counted ``weight`` times; the largest norm stays."""
        scaled = {name: tensor * weight for name, tensor in self.tensors().items() if name != _LARGEST}
        return replace(self, **scaled)

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_experts: int, width: int) -> OutputSums:
        """The inverse of ``tensors``, in memory of its own.

        Raises:
            ValueError: a sum is missing or has the wrong shape; names it.
        """
        sizes = {"E": num_experts, "D": width}
        for one in fields(cls):
            if one.name not in tensors:
                raise ValueError(f"statistic {one.name!r} of outputs is missing; collect the statistics again")
            shape = tuple(sizes[axis] for axis in _axes(one.name))
            if tensors[one.name].shape != shape:
                found = tuple(tensors[one.name].shape)
                raise ValueError(f"statistic {one.name!r} of outputs has shape {found}, not {shape}")
        return cls(**{one.name: tensors[one.name].clone() for one in fields(cls)})


def _axes(name: str) -> str:
    last = name.rsplit("_", 1)[-1]
    return last if last.isupper() else ""


def _products(outputs_TKD: Tensor, computed_TK: Tensor) -> Tensor:
    """Float64 [T, K, K]: inner products of the outputs of each token; 0 where one was not computed."""
    tokens, choices, width = outputs_TKD.shape
    made_TKK = torch.empty(tokens, choices, choices, dtype=torch.float64, device=outputs_TKD.device)
    size = max(1, _BLOCK_BYTES.get(outputs_TKD.device.type, 2**28) // (8 * choices * width))
    for start in range(0, tokens, size):
        block = slice(start, start + size)
        rows_BKD = outputs_TKD[block].double()
        torch.bmm(rows_BKD, rows_BKD.transpose(1, 2), out=made_TKK[block])
    return made_TKK.masked_fill_(~(computed_TK[:, :, None] & computed_TK[:, None, :]), 0.0)


def _paired(term_TKK: Tensor, chosen_TK: Tensor, num_experts: int) -> Tensor:
    """Float64 [E, E]: for each pair of experts, the sum over the tokens that chose both; exactly symmetric."""
    pair_TKK = chosen_TK[:, :, None] * num_experts + chosen_TK[:, None, :]
    both_TKK = (chosen_TK[:, :, None] >= 0) & (chosen_TK[:, None, :] >= 0)
    # What was not computed adds nothing to the first pair.
    pair_N = torch.where(both_TKK, pair_TKK, 0).flatten()
    term_N = torch.where(both_TKK, term_TKK, 0.0).flatten()
    sum_EE = torch.bincount(pair_N, weights=term_N, minlength=num_experts**2).double().view(num_experts, num_experts)
    return (sum_EE + sum_EE.T) / 2
