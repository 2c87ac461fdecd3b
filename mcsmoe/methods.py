"""The methods that can be compared, as data: how experts are grouped, aligned, merged, recovered and compressed.

Imports nothing heavy, so that a configuration is checked before any library of numbers is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

FULL = "full"
DENSE = "dense"


@dataclass(frozen=True)
class Similarity:
    """What a similarity base reads of a layer (``mcsmoe.similarity.BASES`` has what it computes)."""

    needs: frozenset[str]
    """Of ``statistics``, ``weights``, ``router``, ``gradients`` and ``tokens``."""


def _similarity(*needs: str) -> Similarity:
    return Similarity(frozenset(needs))


SIMILARITIES: dict[str, Similarity] = {
    "router-logits": _similarity("statistics"),
    "router-weight": _similarity("router"),
    "weight": _similarity("weights"),
    "feature": _similarity("statistics"),
    "feature.abs": _similarity("statistics"),
    "weight-feature": _similarity("statistics", "weights"),
    "router-weight-feature": _similarity("statistics", "router"),
    "gradient": _similarity("gradients"),
    "weight-gradient": _similarity("weights", "gradients"),
    "mse": _similarity("tokens", "statistics", "weights"),
    "feature-correlation.lsa": _similarity("tokens", "statistics", "weights"),
    "feature-correlation.max": _similarity("tokens", "statistics", "weights"),
    "expert-output": _similarity("tokens", "statistics", "weights"),
    "expert-output.distance": _similarity("tokens", "statistics", "weights"),
    "random": _similarity(),
}
"""Similarity bases by name."""

GROUPINGS = ("dominant", "spectral", "hierarchical", "random")
"""Names of the grouping methods (``mcsmoe.grouping.METHODS``)."""


@dataclass(frozen=True)
class Merge:
    """What a merge method is, apart from what it computes (``mcsmoe.merge.METHODS`` has that)."""

    needs: frozenset[str] = frozenset()
    """Beside routing statistics, of ``fisher`` (information of each weight), ``saliency`` and ``tokens`` of each expert."""
    weighting: str = "frequency"
    """How whole experts weigh in their group: a name of ``mcsmoe.grouping.weighting.WEIGHTINGS``."""
    importance: str = "frequency"
    """What the experts to keep are chosen by, ``frequency`` or ``saliency``."""
    drops: bool = False
    """Whether the router never chooses a merged expert again."""
    budget: str = "adaptive"
    """How the experts to keep are spread over the layers where a method does not say."""


_TOKENS = frozenset({"tokens"})
MERGES: dict[str, Merge] = {
    "frequency": Merge(),
    "uniform": Merge(weighting="uniform"),
    "fisher": Merge(needs=frozenset({"fisher"})),
    "reversed": Merge(weighting="reversed"),
    "random": Merge(weighting="random"),
    "prune": Merge(weighting="leader"),
    "drop": Merge(weighting="leader", drops=True),
    "reap": Merge(
        needs=frozenset({"saliency"}), weighting="leader", importance="saliency", drops=True, budget="uniform"
    ),
    "git-rebasin": Merge(weighting="uniform"),
    "repair": Merge(needs=_TOKENS, weighting="uniform"),
    "zipit": Merge(needs=_TOKENS, weighting="uniform"),
    "zipit-frequency": Merge(needs=_TOKENS),
    "zipit-weight": Merge(weighting="uniform"),
}
"""Merge methods by name."""

MERGES_ON_TOKENS: dict[str, Merge] = {
    "ream": Merge(importance="saliency", drops=True, budget="uniform"),
    "mergemoe": Merge(budget="uniform"),
    "gram": Merge(weighting="leader", drops=True, budget="uniform"),
}
"""Those that look at all tokens of a layer in its turn, so that ``mcsmoe merge`` alone has them."""

CRITERIA: dict[str, str] = {
    "frequency": "tokens routed to the expert",
    "reap": "mean of gate times norm of the output (REAP)",
    "mass": "sum of gate times norm of the output",
    "man": "mean norm of the output",
    "msan": "mean squared norm of the output",
    "hope": "set with the least product of gated norms over tokens that chose both",
    "gram": "set with the least squared change of the layer's output, exactly",
    "random": "a control",
}
"""Which experts stay when others are left out, by name, and what each looks at (``mcsmoe.criteria``)."""

DROPPED = ("delete", "redirect", "constant", "affine")
"""What becomes of dropped experts: router rows deleted, a kept expert answers, or a novice does."""

CHOICES = {
    "similarity": tuple(SIMILARITIES),
    "grouping": GROUPINGS,
    "merge": (*MERGES, *MERGES_ON_TOKENS),
    "criterion": tuple(CRITERIA),
}
"""By field of a method, the names it takes, where the schema has no list of them."""

MAX_MIN = "max-min"  # the mixture of domains by which the worst domain's predicted error is smallest

PRUNING_BUDGETS = ("uniform", "predicted", "adaptive")
"""How the number of kept experts is spread over the layers."""

AUTO = "auto"
"""In place of a criterion or a budget: the one that loses least on held-out calibration rows."""

TRIED_CRITERIA = ("gram", "mass", "reap")
"""What ``auto`` tries: each was the best of all on some model, number of experts or refit."""

TRIED_BUDGETS = ("uniform", "predicted")
"""What ``auto`` tries, the first of them while it tries criteria."""

HEALED = ("routers", "experts", "adapters", "all")
"""What ``mcsmoe recover`` can train."""

TASK_SPECIFIC = "task-specific"
"""In place of a merge method: experts are pruned while the base model is fine-tuned, not merged afterwards."""

BACKWARD = frozenset({"gradients", "fisher"})
"""Needs that take a backward pass over the calibration examples."""

DECOMPOSITIONS: dict[str, frozenset[str]] = {"svd": frozenset(), "whitened": frozenset({"input-gram"})}
"""Ways to split experts into low-rank factors, each with what it needs."""


@dataclass(frozen=True)
class Method:
    """One row of a comparison. Fields as in ``mcsmoe/workflow/config.schema.yaml``, definition ``method``."""

    name: str
    description: str = ""
    merge: str | None = None
    similarity: str = "router-logits"
    grouping: str = "dominant"
    budget: str = "adaptive"
    alignment: str = "none"
    linkage: str = "average"
    capacity: int | None = None
    parent: str | None = None
    recover: bool = False
    compress: bool = False
    decomposition: str = "svd"
    distillation_weight: float | None = None
    dense: bool = False
    criterion: str | None = None
    dropped: str = "delete"
    novice_rank: int = 16
    refit: bool = False
    refit_target: str = "layer"
    bits: int | None = None
    mixture: Mapping[str, float] | str | None = None  # shares by domain, or max-min

    @property
    def reduces(self) -> bool:
        """Whether it leaves a layer fewer experts, or smaller ones, before anything is trained."""
        return self.merge is not None or self.criterion is not None or self.bits is not None

    @property
    def in_sequence(self) -> bool:
        """Whether layers are reduced one after another, each on the tokens that the reduced ones before it give."""
        on_tokens = self.merge in MERGES_ON_TOKENS or self.mixture is not None
        return self.criterion is not None or self.refit or self.bits is not None or on_tokens

    @property
    def fewer(self) -> bool:
        """Whether the number of experts to keep makes a difference to it."""
        return self.merge is not None or self.criterion is not None or self.parent is not None

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must collect for it."""
        needs = DECOMPOSITIONS[self.decomposition]
        if self.merge in MERGES:
            needs |= MERGES[self.merge].needs | SIMILARITIES[self.similarity].needs
        return needs

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients (or their squares, the Fisher information) must be collected for it."""
        return bool(self.needs & BACKWARD)


BITS = (8, 4, 3, 2)
"""Of the controls that round weights and keep every expert."""

_ON_TOKENS = {
    "ream": "REAM: merged into the most salient, rows deleted",
    "mergemoe": "MergeMoE: output projections by least squares",
}


def _pruning_name(criterion: str) -> str:
    """What pruning by a criterion is called: as the criterion, where no merge is called so."""
    return f"{criterion}-pruning" if criterion in (*MERGES, "random") else criterion


def aligned_in_sequence(method: Method) -> Method:
    """As a preset is aligned in sequence: to the leaders of the groups, which are there first, and not by way of expert 0.

    A similarity of weights compares aligned experts, and keeps the alignment of the whole layer.
    """
    if "weights" in SIMILARITIES.get(method.similarity, Similarity(frozenset())).needs:
        return method
    leading = {"weight": "weight-dominant", "activation": "activation-dominant"}
    return replace(method, alignment=leading.get(method.alignment, method.alignment))


def _builtin() -> dict[str, Method]:
    msmoe = Method(
        "msmoe",
        "M-SMoE: grouped by router logits, aligned, averaged by frequency",
        merge="frequency",
        alignment="weight",
        recover=True,
    )
    plain = replace(msmoe, alignment="none")
    made = [
        Method(FULL, "the fine-tuned model with all its experts"),
        msmoe,
        Method("mcsmoe", "MC-SMoE: M-SMoE, then low-rank plus sparse experts", parent="msmoe", compress=True),
        replace(plain, name="averaging", description="the same groups, averaged evenly, not aligned", merge="uniform"),
        replace(plain, name="pruning", description="the dominant expert of each group answers for all", merge="prune"),
        replace(plain, name="dropping", description="the router never chooses any but dominant experts", merge="drop"),
        replace(
            plain,
            name="reap",
            description="REAP: keeps the experts with the largest saliency",
            merge="reap",
            budget=MERGES["reap"].budget,
        ),
        replace(msmoe, name="fisher", description="aligned, averaged by diagonal Fisher information", merge="fisher"),
        replace(plain, name="git-rebasin", description="Git Re-Basin: aligned in its group", merge="git-rebasin"),
        replace(plain, name="repair", description="REPAIR: Git Re-Basin with rescaled activations", merge="repair"),
        replace(plain, name="zipit", description="ZipIt: neurons matched within and across experts", merge="zipit"),
        replace(
            plain,
            name="hc-smoe",
            description="HC-SMoE: hierarchical clustering of expert outputs",
            similarity="expert-output.distance",
            grouping="hierarchical",
            budget="uniform",
        ),
        replace(
            plain,
            name="task-specific",
            description="task-specific pruning: unused experts fall away during fine-tuning",
            merge=TASK_SPECIFIC,
            budget="uniform",
        ),
        Method("compression", "low-rank plus sparse experts, none merged", compress=True),
        *(
            Method(_pruning_name(name), f"pruned by {name}: {about}", criterion=name, budget="uniform")
            for name, about in CRITERIA.items()
        ),
        *(
            replace(plain, name=name, description=about, merge=name, budget="uniform", recover=False)
            for name, about in _ON_TOKENS.items()
        ),
        *(Method(f"{bits}-bit", f"all experts, their weights rounded to {bits} bits", bits=bits) for bits in BITS),
        Method(DENSE, "a model of the same layers without experts, fine-tuned", dense=True),
    ]
    return {method.name: method for method in made}


BUILTIN: dict[str, Method] = _builtin()


_IN_SEQUENCE = replace(BUILTIN["msmoe"], alignment="none", recover=False, budget="uniform")
PRESETS: dict[str, Method] = {
    **{name: method for name, method in BUILTIN.items() if method.merge in MERGES},
    **{name: replace(_IN_SEQUENCE, name=name, description=about, merge=name) for name, about in _ON_TOKENS.items()},
    "gram": BUILTIN["gram"],
}
"""What ``mcsmoe merge --method`` takes beside the merge methods: every setting at once, as published."""

REFIT = "-refit"
"""Ends the name of a preset that is refitted afterwards."""


def require_known(field: str, name: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> None:
    """Raise ValueError naming field, value and the known names unless ``name`` is among ``known``."""
    names = list(known)
    if name not in names:
        close = "".join(f"; did you mean {one!r}?" for one in get_close_matches(name, names, n=1))
        raise ValueError(f"{field} is {name!r}, which is not known{close} Known: {', '.join(names)}")


def stages(method: Method) -> list[str]:
    """Checkpoints the method makes of its own, in order; the last is its result."""
    if method.dense:
        return ["finetuned"]
    made = ["pruned" if method.merge == TASK_SPECIFIC else "merged"] if method.reduces else []
    made += ["recovered"] if method.recover else []
    return made + (["compressed"] if method.compress else [])


def as_dict(method: Method) -> dict[str, Any]:
    """The settings of a method as plain values, for parameters and tags."""
    return {field.name: getattr(method, field.name) for field in fields(method)}
