"""Fisher-weighted averaging (Matena and Raffel, arXiv 2111.09832): an element counts by how much the loss feels it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcsmoe.align import require_finite
from mcsmoe.merge.base import Merged, MergeInputs, grouping_members
from mcsmoe.types import ExpertWeights

_CHUNK = 2**20  # elements at once: bounds what is held beside the merged experts


class FisherMean:
    """Diagonal Fisher information of one layer's experts: the mean over examples of squared gradients.

    One ``update`` per example gives the empirical Fisher; one per example and label, weighted by the label's
    probability and with the gradient of its log-probability, the exact one.
    """

    def __init__(self) -> None:
        self._sum: ExpertWeights | None = None
        self._examples = 0.0

    @torch.no_grad()
    def update(self, gradients: ExpertWeights, weight: float = 1.0, examples: float = 1.0) -> None:
        """Add the squared gradients of one loss; ``examples`` is 0 for a further label of the same example."""
        if self._sum is None:
            self._sum = gradients.map(lambda _, tensor: torch.zeros_like(tensor, dtype=torch.float32))
        for name, total in self._sum.tensors.items():
            gradient = gradients.tensors[name].float()
            total.addcmul_(gradient, gradient, value=weight)
        self._examples += examples

    def result(self) -> ExpertWeights:
        """The mean so far, shaped like the weights.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None or self._examples <= 0:
            raise ValueError("no gradients were collected: the calibration set is empty")
        return self._sum.map(lambda _, tensor: tensor / self._examples)


@torch.no_grad()
def fisher(inputs: MergeInputs) -> Merged:
    """W_g = sum(F_e * W_e) / sum(F_e), element by element, over the group.

    Reads ``fisher``. Only ratios within a group matter, so nothing is added to the denominator: an element without any
    Fisher information is the plain mean, and a group of one is copied bit by bit. Experts that were aligned need their
    Fisher information permuted alike (``apply_permutation``). The share of an expert is its part in the sum of Fisher
    information, averaged over the elements.

    Raises:
        ValueError: no Fisher information, or a negative or non-finite entry; names layer, tensor and expert.
    """
    information = inputs.fisher
    if information is None:
        raise ValueError(f"layer {inputs.layer!r}: Fisher merging needs Fisher information; collect gradients first")
    require_finite(inputs.weights, inputs.layer)
    _check(information, inputs.layer)
    members_G = grouping_members(inputs.grouping)
    share_E = torch.zeros(inputs.weights.num_experts, dtype=torch.float64)
    elements = sum(tensor[0].numel() for tensor in inputs.weights.tensors.values())

    def average(name: str, tensor: Tensor) -> Tensor:
        made = tensor.new_empty(inputs.grouping.num_groups, *tensor.shape[1:])
        flat_EP, flat_GP, fisher_EP = (
            tensor.flatten(1),
            made.view(made.shape[0], -1),
            information.tensors[name].flatten(1),
        )
        for group, members in enumerate(members_G):
            if len(members) == 1:
                flat_GP[group] = flat_EP[members[0]]
                share_E[members] += flat_EP.shape[1] / elements
                continue
            for start in range(0, flat_EP.shape[1], _CHUNK):
                span = slice(start, start + _CHUNK)
                mean_P, part_M = _quotient(fisher_EP[:, span], flat_EP[:, span], members.tolist())
                flat_GP[group, span] = mean_P
                share_E[members] += part_M / elements
        return made

    merged = inputs.weights.map(average)
    return Merged(merged, inputs.grouping.expert_to_group.clone(), share_E, inputs.grouping.dominant.clone())


def _quotient(fisher_EP: Tensor, weights_EP: Tensor, members: list[int]) -> tuple[Tensor, Tensor]:
    """[P] weighted mean of the members, and [M] the sum over P of the part each has in it."""
    total_P = torch.zeros_like(fisher_EP[0], dtype=torch.float32)
    for member in members:
        total_P.add_(fisher_EP[member])
    none_P = total_P == 0
    silent = bool(none_P.any())
    if silent:
        total_P.masked_fill_(none_P, 1.0)
    mean_P, parts = torch.zeros_like(total_P), []
    for member in members:
        # Divided first: squared gradients go down to the smallest floats, where a product with a weight would vanish.
        part_P = fisher_EP[member] / total_P
        if silent:
            part_P.masked_fill_(none_P, 1.0 / len(members))
        mean_P.addcmul_(part_P, weights_EP[member])
        parts.append(part_P.sum(dtype=torch.float64))
    return mean_P, torch.stack(parts).cpu()


def _check(information: ExpertWeights, layer: str) -> None:
    for name, tensor in information.tensors.items():
        for expert, fisher in enumerate(tensor):
            low, high = (float(limit) for limit in torch.aminmax(fisher))
            if low < 0 or not (math.isfinite(low) and math.isfinite(high)):
                value = low if low < 0 else high
                raise ValueError(f"layer {layer!r}: Fisher information of {name!r} of expert {expert} contains {value}")
