"""Reduce one sparse layer in place: choose what stays, let something answer for the rest, and refit what is left.

The unit of work is a layer and the tokens that reach it; who calls this for one layer after another on the states that the
reduced layers before it give, reduces in sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mcsmoe.calibration.evidence import Evidence
from mcsmoe.calibration.tokens import LayerTokens
from mcsmoe.criteria.quadratic import Limits
from mcsmoe.criteria.scores import QUADRATICS, CriterionInputs, choose
from mcsmoe.grouping import plan
from mcsmoe.merge.base import Merged
from mcsmoe.methods import DROPPED
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.transform import expected_error
from mcsmoe.transform.align import Aligner, AlignmentSettings
from mcsmoe.transform.group import GroupSettings, importance, layer_similarity
from mcsmoe.transform.layers import SparseLayer
from mcsmoe.transform.merge import MergeSettings, merge_experts
from mcsmoe.transform.merge_on_tokens import ON_TOKENS, beside
from mcsmoe.transform.novices import fit_novices, remainder_sums
from mcsmoe.transform.refit import STREAM, RefitReport, Refitting, refit_layer
from mcsmoe.transform.shared import shared_weight
from mcsmoe.types import ExpertWeights, Grouping, LayerId, Novices


@dataclass(frozen=True)
class Pruning:
    """Which experts of a layer are left out, and what becomes of them."""

    criterion: str = "gram"
    dropped: str = "delete"
    rank: int = 16

    def __post_init__(self) -> None:
        if self.dropped not in DROPPED:
            raise ValueError(f"dropped is {self.dropped!r}; choose one of {', '.join(DROPPED)}")
        if self.rank < 1:
            raise ValueError(f"the rank of a novice is {self.rank}; give at least 1")

    @property
    def needs_tokens(self) -> bool:
        """Whether it fits something to the layer's tokens."""
        return self.dropped in ("constant", "affine")


@dataclass(frozen=True)
class Merging:
    """How the experts of a layer are grouped, aligned and merged; names as in ``mcsmoe.methods``."""

    merge: str = "frequency"
    similarity: str = "router-logits"
    grouping: str = "dominant"
    alignment: str = "none"
    linkage: str = "average"
    capacity: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Reduced:
    """What a layer was reduced to, as data: enough to do the same to the layer of a fresh copy of the model."""

    grouping: Grouping  # who answers for whom; a deleted expert is listed beside the one it is chosen with most
    share_E: Tensor  # each expert's part in its group
    weights: ExpertWeights  # G stacked
    table_E: Tensor  # int64: as ``grouping``, but G..G+N-1 for experts that a novice answers for
    deleted_E: Tensor | None = None  # bool: experts whose router rows are gone
    novices: Novices | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """By module inside the layer's block, the weight that was refitted with the experts."""
    refit: RefitReport | None = None
    expected: float | None = None  # error of the layer (``expected_error``); None where nothing tells it beforehand

    def stored(self) -> dict[str, Tensor]:
        """The large tensors by name, to keep elsewhere until they are needed."""
        made = {f"weights.{name}": tensor.contiguous() for name, tensor in self.weights.tensors.items()}
        if self.novices is not None:
            made |= {f"novices.{name}": one.contiguous() for name, one in vars(self.novices).items() if one is not None}
        return made | {f"shared.{name}": tensor.contiguous() for name, tensor in self.shared.items()}

    def without_stored(self) -> Reduced:
        """The same with empty tensors in the place of those."""
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.stored().items()}
        return self.with_stored(empty)

    def with_stored(self, tensors: Mapping[str, Tensor]) -> Reduced:
        """The same with ``tensors`` as the large ones."""
        weights = self.weights.map(lambda name, _: tensors[f"weights.{name}"])
        novices = self.novices
        if novices is not None:
            novices = Novices(**{name: tensors.get(f"novices.{name}") for name in vars(novices)})  # type: ignore[arg-type]
        shared = {name: tensors[f"shared.{name}"] for name in self.shared}
        return replace(self, weights=weights, novices=novices, shared=shared)

    def install(self, layer: SparseLayer) -> None:
        """Put it in the place of the layer's E experts; a layer that keeps them all stays as it is."""
        if self.grouping.num_groups == self.grouping.num_experts:
            return
        for name, weight in self.shared.items():
            shared_weight(layer, name).copy_(weight)
        if self.deleted_E is not None:
            layer.drop_experts(self.weights, self.grouping.expert_to_group, self.deleted_E)
        elif self.novices is not None:
            layer.write_novices(self.weights, self.table_E, self.novices)
        else:
            layer.write_experts(self.weights, self.table_E)


@dataclass(frozen=True)
class Reduction:
    """What is done to every layer."""

    how: Pruning | Merging
    refitting: Refitting | None = None
    limits: dict[LayerId, Limits] = field(default_factory=dict)
    seed: int = 0

    @property
    def selects(self) -> bool:
        """Whether experts that stay do so exactly as they are, and nothing answers for the others."""
        return isinstance(self.how, Pruning) and self.how.dropped == "delete" and self.refitting is None

    @property
    def needs_whole(self) -> bool:
        """Whether the states of the whole model are needed beside those of the reduced one."""
        return self.refitting is not None and self.refitting.target == STREAM

    @torch.no_grad()
    def selection(self, layer: SparseLayer, statistics: LayerStatistics, kept: int) -> Grouping:
        """Where it ``selects``: who stays, and who is counted with whom; none of the layer's weights are needed."""
        assert isinstance(self.how, Pruning)
        if kept == layer.num_experts:
            return Grouping(torch.arange(kept), torch.arange(kept))
        inputs = CriterionInputs(layer.id, statistics, self.seed)
        return beside(statistics, choose(self.how.criterion, inputs, kept, self.limits.get(layer.id, _limits(layer))))

    @torch.no_grad()
    def reduce(
        self,
        layer: SparseLayer,
        statistics: LayerStatistics,
        tokens: LayerTokens | None,
        kept: int,
    ) -> Reduced:
        """Keep ``kept`` experts of a layer, or as many groups, in place.

        Args:
            statistics: of the layer, with the sums over its experts' outputs.
            tokens: of the layer; needed for novices, REAM, MergeMoE and the refit.

        Raises:
            ValueError: what the method needs is not there; names the layer.
        """
        if kept == layer.num_experts:
            return _whole(layer.read_experts())
        if isinstance(self.how, Pruning):
            limits = self.limits.get(layer.id, _limits(layer))
            made = pruned(layer, statistics, tokens, kept, self.how, limits, self.seed)
        else:
            made = merged(layer, statistics, tokens, kept, self.how, self.seed)
        made.install(layer)
        if self.refitting is None:
            return made
        if tokens is None:
            raise ValueError(f"layer {layer.id!r}: the refit needs tokens; give --calibration in place of --statistics")
        # What was installed is the layer's own from here on: a second copy of a large layer is not held.
        made = replace(made, weights=layer.view_experts())
        report = refit_layer(layer, tokens, self.refitting, reroutes=made.deleted_E is not None)
        return replace(
            made,
            weights=layer.view_experts(),
            novices=layer.read_novices(),
            shared={name: shared_weight(layer, name).clone() for name in (report.shared,) if name is not None},
            refit=report,
            expected=expected_error.of_refit(report, self.refitting.target, statistics),
        )


def _whole(weights: ExpertWeights) -> Reduced:
    """A layer that keeps all its experts."""
    every = torch.arange(weights.num_experts)
    return Reduced(Grouping(every, every.clone()), torch.ones(len(every), dtype=torch.float64), weights, every.clone())


def _limits(layer: SparseLayer) -> Limits:
    experts, sets = layer.num_experts, layer.expert_sets
    no_E = torch.zeros(experts, dtype=torch.bool)
    return Limits(no_E, no_E.clone(), torch.arange(experts) // (experts // sets))


# -- pruning -----------------------------------------------------------------------------------------------------
def pruned(
    layer: SparseLayer,
    statistics: LayerStatistics,
    tokens: LayerTokens | None,
    kept: int,
    pruning: Pruning,
    limits: Limits,
    seed: int = 0,
) -> Reduced:
    """What pruning a layer to ``kept`` experts gives; the layer is only read."""
    inputs, weights = CriterionInputs(layer.id, statistics, seed), layer.view_experts()
    if pruning.needs_tokens:
        return _with_novices(layer, weights, inputs, tokens, kept, pruning, limits)
    kept_K = choose(pruning.criterion, inputs, kept, limits)
    grouping = beside(statistics, kept_K)
    leads_E = grouping.leads()
    chosen = weights.select(kept_K)
    table_E = grouping.expert_to_group.clone()
    if pruning.dropped != "delete":  # a kept expert answers, whatever it would be that it gives
        return Reduced(grouping, leads_E.double(), chosen, table_E)
    expected = expected_error.of_dropping(inputs, ~leads_E)
    return Reduced(grouping, leads_E.double(), chosen, table_E, ~leads_E, expected=expected)


def _with_novices(
    given: SparseLayer,
    weights: ExpertWeights,
    inputs: CriterionInputs,
    tokens: LayerTokens | None,
    kept: int,
    pruning: Pruning,
    limits: Limits,
) -> Reduced:
    layer, activation, experts = inputs.layer, given.activation, weights.num_experts
    if tokens is None:
        raise ValueError(f"layer {layer!r}: novices are fitted on tokens; give --calibration in place of --statistics")
    novices = fit_novices(weights, activation, tokens, pruning.rank if pruning.dropped == "affine" else 0)
    left: CriterionInputs | None = None
    if pruning.criterion in QUADRATICS:
        # What is lost is what a novice does not give.
        remainder = remainder_sums(weights, activation, tokens, novices)
        left = replace(inputs, statistics=replace(inputs.statistics, outputs=remainder))
        kept_K = choose(pruning.criterion, left, kept, limits)
    else:
        kept_K = choose(pruning.criterion, inputs, kept, limits)
    grouping = beside(inputs.statistics, kept_K)
    leads_E = grouping.leads()
    table_E = torch.empty(experts, dtype=torch.int64)
    table_E[kept_K] = torch.arange(kept)
    table_E[~leads_E] = torch.arange(kept, experts)
    chosen, answers = weights.select(kept_K), novices.select((~leads_E).nonzero()[:, 0])
    expected = None if left is None else expected_error.of_dropping(left, ~leads_E, inputs.statistics)
    return Reduced(grouping, leads_E.double(), chosen, table_E, novices=answers, expected=expected)


# -- merging -----------------------------------------------------------------------------------------------------
def merged(
    layer: SparseLayer,
    statistics: LayerStatistics,
    tokens: LayerTokens | None,
    kept: int,
    merging: Merging,
    seed: int = 0,
) -> Reduced:
    """What merging a layer to ``kept`` groups gives; the layer itself is aligned where that is asked for."""
    found = RoutingStatistics(seed=seed)
    found.layers[layer.id] = statistics
    evidence = Evidence(found, {}, {})
    Aligner(AlignmentSettings(merging.alignment, merging.threads), found)(layer)
    settings = GroupSettings(
        kept, merging.similarity, merging.grouping, "uniform", merging.linkage, merging.capacity, seed=seed
    )

    def grouped(importance_E: Tensor) -> Grouping:
        similar_EE = layer_similarity(layer, settings, evidence)
        return plan(
            {layer.id: importance_E},
            {layer.id: similar_EE},
            kept,
            method=merging.grouping,
            budget="uniform",
            capacity=merging.capacity,
            linkage=merging.linkage,
            seed=seed,
        )[layer.id]

    if merging.merge in ON_TOKENS:
        return _reduced(ON_TOKENS[merging.merge](layer, statistics, tokens, kept, grouped))
    grouping = grouped(importance(statistics, merging.merge))
    merge = MergeSettings(merging.merge, merging.alignment, seed, merging.threads)
    return _reduced(merge_experts(layer, grouping, merge, evidence))


def _reduced(made: Merged) -> Reduced:
    return Reduced(made.grouping, made.share_E, made.weights, made.expert_to_group.clone(), made.dropped_E)
