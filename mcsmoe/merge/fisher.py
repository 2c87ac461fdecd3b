"""Fisher-weighted averaging (Matena and Raffel, arXiv 2111.09832): an element counts by how much the loss feels it."""

from __future__ import annotations

import torch
from torch import Tensor

from mcsmoe.merge.base import Merged, MergeInputs, grouping_members
from mcsmoe.types import ExpertWeights

_CHUNK = 2**18


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
    inputs.weights.require_finite(inputs.layer)
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
                # Squared gradients go down to the smallest floats, where a product with a weight would vanish.
                part_MP = fisher_EP[members, span].double()
                total_P = part_MP.sum(dim=0)
                part_MP = torch.where(total_P > 0, part_MP / total_P, 1.0 / len(members))
                flat_GP[group, span] = (part_MP * flat_EP[members, span]).sum(dim=0).to(tensor.dtype)
                share_E[members] += part_MP.sum(dim=1).cpu() / elements
        return made

    merged = inputs.weights.map(average)
    return Merged(merged, inputs.grouping.expert_to_group.clone(), share_E, inputs.grouping.dominant.clone())


def _check(information: ExpertWeights, layer: str) -> None:
    for name, tensor in information.tensors.items():
        low_E, high_E = torch.aminmax(tensor.flatten(1), dim=1)
        bad_E = ~torch.isfinite(low_E) | ~torch.isfinite(high_E) | (low_E < 0)
        if bad_E.any():
            expert = int(bad_E.nonzero()[0])
            value = float(low_E[expert]) if float(low_E[expert]) < 0 else float(high_E[expert])
            raise ValueError(f"layer {layer!r}: Fisher information of {name!r} of expert {expert} contains {value}")
