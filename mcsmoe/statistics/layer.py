"""What is known of one sparse layer after a pass: sums that every similarity, budget and merge can be taken from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mcsmoe.statistics.outputs import OutputSums
from mcsmoe.statistics.reservoir import Reservoir
from mcsmoe.types import LayerId

_COUNTS = ("valid_tokens", "wanted_E", "computed_E", "dropped_E", "saliency_tokens_E", "position")
_OUTPUTS = "outputs_"
_OPTIONAL = ("input_gram_EDD", "reservoir", "outputs")


@dataclass
class LayerStatistics:
    """Sufficient statistics of one sparse layer over its valid tokens.

    Counts are int64, sums float64. "Computed" tokens of an expert are those it chose and had room for; a token that
    wanted an expert over its capacity is dropped there and counts nowhere else.
    """

    valid_tokens: Tensor  # []: real tokens, each counted once
    wanted_E: Tensor  # tokens the router sent to the expert
    computed_E: Tensor  # of these, tokens the expert computed
    dropped_E: Tensor  # and tokens over its capacity
    probability_sum_E: Tensor  # softmax of the raw logits
    gate_sum_E: Tensor  # combine weights of computed tokens
    logits_gram_EE: Tensor  # logits_TE.T @ logits_TE
    input_sum_ED: Tensor  # of computed tokens
    input_abs_sum_ED: Tensor
    input_square_sum_ED: Tensor
    token_square_sum_D: Tensor  # squared inputs of all tokens, dropped ones included, each once
    saliency_tokens_E: Tensor  # computed tokens whose output was seen
    saliency_sum_E: Tensor  # of these, combine weight times the L2 norm of the expert's output
    position: Tensor  # []: number in the stream of the next token
    input_gram_EDD: Tensor | None = None  # inputs.T @ inputs of computed tokens
    reservoir: Reservoir | None = None
    outputs: OutputSums | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.wanted_E.shape[0]

    @property
    def d_model(self) -> int:
        """D."""
        return self.input_sum_ED.shape[1]

    @property
    def frequency_E(self) -> Tensor:
        """float64 [E], sums to 1: each expert's share of the computed tokens; uniform where nothing was computed."""
        counts_E = self.computed_E.double()
        total = counts_E.sum()
        return counts_E / total if total > 0 else torch.full_like(counts_E, 1 / self.num_experts)

    @property
    def probability_E(self) -> Tensor:
        """float64 [E]: mean router probability over tokens; uniform where there were none."""
        if self.valid_tokens == 0:
            return torch.full_like(self.probability_sum_E, 1 / self.num_experts)
        return self.probability_sum_E / self.valid_tokens

    @property
    def saliency_E(self) -> Tensor:
        """float64 [E]: mean over its tokens of combine weight times norm of the output (REAP, arXiv 2510.13999).

        Zero for an expert that computed nothing.

        Raises:
            ValueError: outputs of experts were not seen.
        """
        if self.saliency_tokens_E.sum() == 0 and self.computed_E.sum() > 0:
            raise ValueError("routing statistics hold no saliency; collect them with experts and activations given")
        return self.saliency_sum_E / self.saliency_tokens_E.clamp(min=1)

    @property
    def feature_ED(self) -> Tensor:
        """float64 [E, D]: mean input of each expert; zero where it computed nothing."""
        return self.input_sum_ED / self.computed_E.clamp(min=1)[:, None]

    def tokens(self, layer: LayerId = "") -> list[Tensor]:
        """For each expert the inputs [n_e, D] kept of it.

        Raises:
            ValueError: the statistics were collected without a reservoir; names the layer.
        """
        reservoir = self._reservoir(layer)
        return [reservoir.input_ESD[expert, :count] for expert, count in enumerate(reservoir.count_E.tolist())]

    def gates(self, layer: LayerId = "") -> list[Tensor]:
        """For each expert the combine weights [n_e] of the tokens kept of it; errors as ``tokens``."""
        reservoir = self._reservoir(layer)
        return [reservoir.gate_ES[expert, :count] for expert, count in enumerate(reservoir.count_E.tolist())]

    def _reservoir(self, layer: LayerId) -> Reservoir:
        if self.reservoir is None:
            raise ValueError(
                f"layer {layer!r}: its routing statistics hold no tokens; collect them with a reservoir of 1 or more"
            )
        return self.reservoir

    def check_against(self, layer: LayerId, experts: int, d_model: int | None = None) -> None:
        """Raise ValueError, naming the layer, unless these can be statistics of a layer with that shape."""
        for what, mine, given in (("experts", self.num_experts, experts), ("input features", self.d_model, d_model)):
            if given is not None and mine != given:
                raise ValueError(
                    f"layer {layer!r}: statistics are of {mine} {what}, the layer has {given}; "
                    "they were collected from another model"
                )

    def check_finite(self, layer: LayerId) -> None:
        """Raise ValueError, naming layer, field and expert, if a sum is not finite or a count is negative."""
        for name, tensor in self.tensors().items():
            bad = tensor < 0 if name in _COUNTS else ~torch.isfinite(tensor)
            if bad.any():
                place = bad.nonzero()[0].tolist()
                raise ValueError(f"layer {layer!r}: statistic {name!r} is {tensor[tuple(place)].item()} at {place}")

    # -- arithmetic ----------------------------------------------------------------------------------------------
    def add_(self, other: LayerStatistics) -> None:
        """Take in the statistics of other tokens of the same layer, where both have the optional ones.

        Raises:
            ValueError: outputs of experts were seen for one of the two alone: sums over part of the tokens are of no use.
        """
        if (self.outputs is None) != (other.outputs is None):
            raise ValueError("outputs of experts were seen for part of the tokens only; collect the statistics again")
        for name, tensor in other._summed().items():
            mine = getattr(self, name)
            if mine.dtype != tensor.dtype:  # weighted counts are no whole numbers
                mine = mine.double()
                setattr(self, name, mine)
            mine += tensor.to(mine.device)
        self.position = torch.maximum(self.position, other.position.to(self.position.device))
        if self.reservoir is not None and other.reservoir is not None:
            self.reservoir = self.reservoir.merge(other.reservoir)
        if self.outputs is not None and other.outputs is not None:
            self.outputs.add_(other.outputs)

    def cpu(self) -> LayerStatistics:
        """The same numbers, in main memory and of their own."""
        return LayerStatistics.from_tensors("", {name: tensor.cpu() for name, tensor in self.tensors().items()})

    def scaled(self, weight: float) -> LayerStatistics:
        """As if every token counted ``weight`` (above 0) times; counts become float64.

        Sampled tokens are as likely as their weight says: a key is divided by it (sequential Poisson sampling, Ohlsson,
        Journal of Official Statistics 1998).
        """
        sums = {name: tensor.double() * weight for name, tensor in self._summed().items()}
        reservoir = None if self.reservoir is None else self.reservoir.scaled(weight)
        outputs = None if self.outputs is None else self.outputs.scaled(weight)
        return replace(self, **sums, reservoir=reservoir, outputs=outputs)

    def _summed(self) -> dict[str, Tensor]:
        names = [one.name for one in fields(self) if one.name not in ("position", "reservoir", "outputs")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, by name."""
        made = self._summed() | {"position": self.position}
        if self.reservoir is not None:
            made |= {f"reservoir_{name}": tensor for name, tensor in vars(self.reservoir).items()}
        if self.outputs is not None:
            made |= {f"{_OUTPUTS}{name}": tensor for name, tensor in self.outputs.tensors().items()}
        return made

    @classmethod
    def from_tensors(cls, layer: LayerId, tensors: Mapping[str, Tensor]) -> LayerStatistics:
        """The inverse of ``tensors``.

        Raises:
            ValueError: a field is missing, has the wrong shape or impossible values; names layer and field.
        """
        wanted = [one.name for one in fields(cls) if one.name not in _OPTIONAL]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ValueError(f"layer {layer!r}: statistic {missing[0]!r} is missing; collect the statistics again")
        flat = [name for name in ("wanted_E", "input_sum_ED") if tensors[name].ndim != len(name.rsplit("_", 1)[-1])]
        if flat:
            raise ValueError(
                f"layer {layer!r}: statistic {flat[0]!r} has shape {tuple(tensors[flat[0]].shape)}; collect them again"
            )
        experts, width = tensors["wanted_E"].shape[0], tensors["input_sum_ED"].shape[-1]
        sizes = {"E": experts, "D": width}
        for name in (*wanted, *(["input_gram_EDD"] if "input_gram_EDD" in tensors else [])):
            axes = name.rsplit("_", 1)[-1]
            shape = tuple(sizes[axis] for axis in axes) if axes.isupper() else ()
            if tensors[name].shape != shape:
                raise ValueError(
                    f"layer {layer!r}: statistic {name!r} has shape {tuple(tensors[name].shape)}, not {shape}"
                )
        held = {one.name: tensors.get(f"reservoir_{one.name}") for one in fields(Reservoir)}
        complete = {name: tensor for name, tensor in held.items() if tensor is not None}
        if complete and len(complete) < len(held):
            raise ValueError(
                f"layer {layer!r}: its reservoir has only {sorted(complete)}; collect the statistics again"
            )
        slots = complete["key_ES"].shape[1:] if complete else ()
        for name, tensor in complete.items():
            if tensor.shape != (experts, *slots, *((width,) if name == "input_ESD" else ())) or len(slots) != 1:
                raise ValueError(f"layer {layer!r}: the reservoir's {name!r} has shape {tuple(tensor.shape)}")
        sums = {name.removeprefix(_OUTPUTS): tensors[name] for name in tensors if name.startswith(_OUTPUTS)}
        try:
            outputs = OutputSums.from_tensors(sums, experts, width) if sums else None
        except ValueError as error:
            raise ValueError(f"layer {layer!r}: {error}") from error
        made = cls(
            **{name: tensors[name].clone() for name in wanted},
            input_gram_EDD=tensors["input_gram_EDD"].clone() if "input_gram_EDD" in tensors else None,
            reservoir=Reservoir(**complete) if complete else None,
            outputs=outputs,
        )
        made.check_finite(layer)
        return made
