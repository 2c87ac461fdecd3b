"""Routing statistics: everything the similarities, budgets and merges need, from one streaming pass.

What is kept grows with the experts and the model width, never with the tokens. Every sum is taken in float64 over terms
that depend on one token alone, so that statistics do not depend on how the tokens were batched, and two halves that
are put together equal the whole: exactly for counts and sampled tokens, to float64 rounding for sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mcsmoe.statistics.gram import column_gram
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.outputs import ChosenOutputs, OutputSums
from mcsmoe.statistics.reservoir import Reservoir, keys
from mcsmoe.statistics.segments import expert_sums
from mcsmoe.types import ExpertActivation, ExpertWeights, LayerId, RoutedBatch

__all__ = ["LayerStatistics", "RoutingStatistics"]

_SETTINGS = "settings"


class NotFinite(ValueError):
    """Experts of a layer gave an output that is not finite."""


class RoutingStatistics:
    """Statistics of all sparse layers, one streaming pass.

    Args:
        reservoir: tokens to keep of each expert, for what compares experts on tokens; 0 keeps none.
        whiten: also keep the Gram matrix of each expert's inputs, E x D x D per layer, for activation-aware SVD.
        seed: which tokens are kept.
        start: by layer, number in the stream of the first token; ``position()`` of another object continues it.
            Give it where parts of one stream are collected apart and must keep the same tokens as one pass.
    """

    def __init__(
        self, reservoir: int = 0, whiten: bool = False, seed: int = 0, start: Mapping[LayerId, int] | None = None
    ) -> None:
        if reservoir < 0:
            raise ValueError(f"reservoir is {reservoir}; give the number of tokens to keep per expert, 0 for none")
        self.layers: dict[LayerId, LayerStatistics] = {}
        self.reservoir, self.whiten, self.seed = reservoir, whiten, seed
        self._start = dict(start or {})

    def position(self) -> dict[LayerId, int]:
        """By layer, number in the stream of the next token."""
        return self._start | {layer: int(statistics.position) for layer, statistics in self.layers.items()}

    def skip(self, tokens: Mapping[LayerId, int]) -> None:
        """Count tokens of the stream that are collected elsewhere, so that the next ones have the numbers of one pass."""
        for layer, count in tokens.items():
            if layer in self.layers:
                self.layers[layer].position = self.layers[layer].position + count
            else:
                self._start[layer] = self._start.get(layer, 0) + count

    @torch.no_grad()
    def update(
        self,
        batches: Mapping[LayerId, RoutedBatch],
        experts: Mapping[LayerId, ExpertWeights] | None = None,
        activations: Mapping[LayerId, ExpertActivation] | None = None,
        outputs: Mapping[LayerId, ChosenOutputs] | None = None,
        stream_square: Mapping[LayerId, Tensor] | None = None,
    ) -> None:
        """Take in one forward pass; only valid tokens count. After an error nothing has changed.

        With ``outputs``, by layer, what the experts gave is summed too, and with it their saliency. With ``experts`` and
        ``activations`` in their place the saliency alone is, at the cost of computing every token's experts once more.
        ``stream_square`` holds, by layer, the squared norm [T] of the residual stream after the layer's block.

        Raises:
            ValueError: non-finite inputs, logits or outputs, or a layer of another shape than before; names layer and token
                or expert.
        """
        positions = self.position()
        found: dict[LayerId, tuple[RoutedBatch, LayerStatistics]] = {}
        for layer, given in batches.items():
            batch = given if bool(given.valid_T.all()) else given.only_valid()
            made = _measure(layer, batch, positions.get(layer, 0))
            if layer in self.layers:
                self.layers[layer].check_against(layer, made.num_experts, made.d_model)
            held = self.layers.get(layer)
            if held is not None and (held.outputs is None) != (outputs is None):
                raise ValueError(f"layer {layer!r}: outputs of experts must be given for all tokens or for none")
            if outputs is not None:
                square_T = None if stream_square is None else stream_square[layer]
                _take_outputs(layer, given, outputs[layer], square_T, made)
            elif experts is not None and activations is not None:
                made.check_against(layer, experts[layer].num_experts, experts[layer].d_model)
                made.saliency_tokens_E = made.computed_E.clone()
                made.saliency_sum_E = _saliency(batch, experts[layer], activations[layer])
                made.check_finite(layer)
            found[layer] = (batch, made)
        for layer, (batch, made) in found.items():
            self._take(layer, batch, made)

    def _take(self, layer: LayerId, batch: RoutedBatch, made: LayerStatistics) -> None:
        first = int(made.position - made.valid_tokens)
        if layer in self.layers:
            self.layers[layer].add_(made)
        else:
            self.layers[layer] = made
            shape = (made.num_experts, made.d_model, made.d_model)
            if self.whiten:
                made.input_gram_EDD = torch.zeros(shape, dtype=torch.float64, device=batch.inputs_TD.device)
            if self.reservoir:
                made.reservoir = Reservoir.empty(made.num_experts, self.reservoir, batch.inputs_TD)
        kept = self.layers[layer]
        token_N, expert_N, gate_N = _pairs(batch)
        read_RD, row_N = _read(batch, token_N)
        if kept.reservoir is not None:
            key_N = keys(token_N + first, expert_N, self.seed)
            # What was read from a file may be elsewhere than the model is now.
            held = kept.reservoir.to(batch.inputs_TD.device)
            kept.reservoir = held.offer(read_RD, row_N, expert_N, gate_N, key_N)
        if kept.input_gram_EDD is not None:
            for expert, rows_N in _by_expert(row_N, expert_N, kept.num_experts):
                gram_DD = column_gram(read_RD[rows_N])
                kept.input_gram_EDD[expert] += gram_DD.to(kept.input_gram_EDD.device)

    def merge(self, other: RoutingStatistics) -> RoutingStatistics:
        """Statistics of the tokens of both; neither is changed.

        Raises:
            ValueError: collected with other settings, or from another model; names setting or layer.
        """
        for name in ("reservoir", "whiten", "seed"):
            mine, given = getattr(self, name), getattr(other, name)
            if mine != given:
                raise ValueError(f"statistics with {name} {mine} cannot be merged with statistics with {name} {given}")
        both = self.layers and other.layers
        apart = set(self.layers) ^ set(other.layers)
        if both and apart:
            raise ValueError(f"layer {min(apart)!r} is in one of the statistics only; they are of different models")
        for layer in self.layers if both else ():
            self.layers[layer].check_against(layer, other.layers[layer].num_experts, other.layers[layer].d_model)
        made = RoutingStatistics.from_tensors(self.tensors() if self.layers or not other.layers else other.tensors())
        made._start = {**other.position(), **self.position()}
        for layer in self.layers if both else ():
            made.layers[layer].add_(other.layers[layer])
        return made

    def check_layers(self, layers: list[LayerId]) -> None:
        """Raise ValueError, naming a layer, unless these are statistics of exactly the given layers."""
        for layer in sorted(set(layers) ^ set(self.layers)):
            where = "the model, not in its" if layer in layers else "the"
            raise ValueError(
                f"layer {layer!r} is in {where} routing statistics; they were collected from another model"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Flat names ``layer/field``, and the settings: what ``from_tensors`` continues from. CPU tensors."""
        made = {_SETTINGS: torch.tensor([self.reservoir, int(self.whiten), self.seed])}
        for layer, statistics in self.layers.items():
            made |= {f"{layer}/{name}": tensor.cpu() for name, tensor in statistics.tensors().items()}
        return made

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RoutingStatistics:
        """The inverse of ``tensors``: collecting goes on as if it had never stopped.

        Raises:
            ValueError: a field is missing, has the wrong shape or impossible values; names layer and field.
        """
        if _SETTINGS not in tensors or tensors[_SETTINGS].shape != (3,):
            raise ValueError("these are no routing statistics: their settings are missing; collect them again")
        reservoir, whiten, seed = tensors[_SETTINGS].tolist()
        made = cls(reservoir, bool(whiten), seed)
        by_layer: dict[LayerId, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name != _SETTINGS:
                layer, _, field = name.rpartition("/")
                by_layer.setdefault(layer, {})[field] = tensor
        made.layers = {layer: LayerStatistics.from_tensors(layer, named) for layer, named in by_layer.items()}
        return made


# -- one batch ---------------------------------------------------------------------------------------------------
def _measure(layer: LayerId, batch: RoutedBatch, position: int) -> LayerStatistics:
    """Statistics of one batch, all of whose tokens are valid."""
    logits_TE = batch.logits_TE
    tokens, experts = logits_TE.shape
    single = torch.promote_types(logits_TE.dtype, torch.float32)
    wanted_E = torch.bincount(batch.wanted_TK.flatten(), minlength=experts)
    token_N, expert_N, gate_N = _pairs(batch)
    computed_E = torch.bincount(expert_N, minlength=experts)
    read_RD, row_N = _read(batch, token_N)
    sums_3ED = expert_sums(read_RD, row_N, expert_N, computed_E, 3, _input_terms)
    assert bool((computed_E <= wanted_E).all()), f"{layer}: an expert computed tokens that did not want it"
    made = LayerStatistics(
        valid_tokens=torch.tensor(tokens, device=logits_TE.device),
        wanted_E=wanted_E,
        computed_E=computed_E,
        dropped_E=wanted_E - computed_E,
        probability_sum_E=logits_TE.softmax(dim=-1, dtype=single).sum(dim=0, dtype=torch.float64),
        # Without a single choice bincount forgets the type of its weights.
        gate_sum_E=torch.bincount(expert_N, weights=gate_N.double(), minlength=experts).double(),
        logits_gram_EE=column_gram(logits_TE),
        input_sum_ED=sums_3ED[0],
        input_abs_sum_ED=sums_3ED[1],
        input_square_sum_ED=sums_3ED[2],
        token_square_sum_D=_square_sum(batch, sums_3ED[2]),
        saliency_tokens_E=torch.zeros_like(computed_E),
        saliency_sum_E=torch.zeros_like(computed_E, dtype=torch.float64),
        position=torch.tensor(position + tokens, device=logits_TE.device),
    )
    # A number that is not finite shows in the sums it entered, so the inputs need no pass of their own.
    reached = (made.logits_gram_EE, made.token_square_sum_D, made.gate_sum_E)
    if not all(torch.isfinite(one).all() for one in reached):
        _refuse(layer, batch)
    return made


def _refuse(layer: LayerId, batch: RoutedBatch) -> None:
    named = {"input": batch.inputs_TD, "router logits": batch.logits_TE, "combine weights": batch.weights_TK}
    for what, tensor in named.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            token, place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"layer {layer!r}: {what} of valid token {token} of the batch is {tensor[token, place].item()} at "
                f"{place}; the model's weights are damaged, or its number format overflows"
            )
    raise ValueError(
        f"layer {layer!r}: squares of its inputs overflow {batch.inputs_TD.dtype}; the model diverges there"
    )


def _pairs(batch: RoutedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and combine weight of each of the N choices that were computed."""
    choices = batch.chosen_TK.shape[1]
    chosen_N = batch.chosen_TK.flatten()
    place_N = torch.arange(chosen_N.shape[0], device=chosen_N.device)
    gate_N = batch.weights_TK.flatten()
    kept_N = chosen_N >= 0
    if not kept_N.all():
        place_N, chosen_N, gate_N = place_N[kept_N], chosen_N[kept_N], gate_N[kept_N]
    return place_N.div(choices, rounding_mode="floor"), chosen_N, gate_N


def _read(batch: RoutedBatch, token_N: Tensor) -> tuple[Tensor, Tensor]:
    """What experts read, [R, D], and the row of it that each of the N computed choices reads."""
    if batch.scale_TK is None:
        return batch.inputs_TD, token_N
    scale_N = batch.scale_TK[batch.chosen_TK >= 0]
    return batch.inputs_TD[token_N] * scale_N[:, None], torch.arange(len(token_N), device=token_N.device)


def _input_terms(rows_CRD: Tensor, _choice_CR: Tensor, out_3CD: Tensor) -> None:
    """Sums of inputs, of their absolute values and of their squares."""
    torch.sum(rows_CRD, dim=1, out=out_3CD[0])
    torch.sum(rows_CRD.square(), dim=1, out=out_3CD[2])
    torch.sum(rows_CRD.abs_(), dim=1, out=out_3CD[1])


def _square_sum(batch: RoutedBatch, square_sum_ED: Tensor) -> Tensor:
    """float64 [D]: squared inputs of all tokens, each once however many experts computed it."""
    rows_TD, total_D = batch.inputs_TD, torch.zeros_like(square_sum_ED[0])
    if batch.chosen_TK.shape[1] == 1 and batch.scale_TK is None:
        # One expert each: the experts' sums hold all but the dropped tokens.
        rows_TD, total_D = rows_TD[batch.chosen_TK[:, 0] < 0], square_sum_ED.sum(dim=0)
    return rows_TD.double().square().sum(dim=0) + total_D


def _by_expert(token_N: Tensor, expert_N: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Experts that computed something, each with its positions among the N choices' tokens."""
    order_N = torch.argsort(expert_N, stable=True)
    counts = torch.bincount(expert_N, minlength=experts).tolist()
    for expert, rows_N in enumerate(token_N[order_N].split(counts)):
        if rows_N.numel():
            yield expert, rows_N


def _take_outputs(
    layer: LayerId, batch: RoutedBatch, outputs: ChosenOutputs, square_T: Tensor | None, made: LayerStatistics
) -> None:
    """Put the sums over outputs of one batch, and the saliency that follows from them, into ``made``."""
    keep = batch.valid_T
    kept = (outputs.outputs_TKD, batch.chosen_TK, outputs.weights_TK)
    if not bool(keep.all()):
        kept = (kept[0][keep], kept[1][keep], kept[2][keep])
    made.outputs = OutputSums.measured(*kept, made.num_experts)
    if square_T is not None:
        made.outputs.stream_square_sum = square_T[keep].sum(dtype=torch.float64)
    made.saliency_tokens_E = made.computed_E.clone()
    made.saliency_sum_E = made.outputs.gated_norm_sum_E / outputs.scale
    bad_E = ~torch.isfinite(made.saliency_sum_E)
    if bad_E.any():
        raise NotFinite(
            f"layer {layer!r}: the output of expert {int(bad_E.nonzero()[0])} is not finite; the model's weights are damaged, "
            "or its number format overflows"
        )
    made.check_finite(layer)


def _saliency(batch: RoutedBatch, weights: ExpertWeights, activation: ExpertActivation) -> Tensor:
    """float64 [E]: per expert, sum over its tokens of combine weight times L2 norm of its output."""
    total_E = torch.zeros(weights.num_experts, dtype=torch.float64, device=batch.inputs_TD.device)
    token_N, expert_N, gate_N = _pairs(batch)
    read_RD, row_N = _read(batch, token_N)
    gate_RE = torch.zeros(len(read_RD), weights.num_experts, dtype=torch.float64, device=gate_N.device)
    gate_RE[row_N, expert_N] = gate_N.double()
    for expert, rows_N in _by_expert(row_N, expert_N, weights.num_experts):
        hidden_NF = weights.hidden(expert, read_RD[rows_N], activation)
        norm_N = torch.linalg.vector_norm(weights.output(expert, hidden_NF), dim=1, dtype=torch.float64)
        total_E[expert] = gate_RE[rows_N, expert] @ norm_N
    return total_E
