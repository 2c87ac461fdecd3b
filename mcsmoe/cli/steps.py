"""What the commands do, one layer in memory at a time."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe import modules
from mcsmoe.align import apply_permutation
from mcsmoe.artefacts.tables import read_table, write_table
from mcsmoe.calibration import text as cli_text
from mcsmoe.calibration.evidence import Evidence
from mcsmoe.calibration.files import load_statistics, save_tensors
from mcsmoe.checkpoint import format as compact
from mcsmoe.checkpoint.load import load_tokenizer
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.console import log, progress
from mcsmoe.evaluate.cost import Settings, batch
from mcsmoe.export.change import logits_change
from mcsmoe.export.forms import dense, exact, stock
from mcsmoe.export.recovery import RouterRecovery
from mcsmoe.grouping import plan
from mcsmoe.modules import LowRankProjection, RedirectedExperts
from mcsmoe.similarity import BASES
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.transform.align import align_layer
from mcsmoe.transform.compress import input_grams, split_experts
from mcsmoe.transform.group import groups_frame, importance, layer_similarity
from mcsmoe.transform.merge import merge_layer
from mcsmoe.types import ExpertWeights, LayerId

GROUPS = "groups.parquet"


# -- calibration -------------------------------------------------------------------------------------------------
def _batches(source: Streamed, arguments: argparse.Namespace) -> list[cli_text.Batch]:
    rows = cli_text.read_rows(arguments.calibration)
    tokenizer = None if all("input_ids" in row for row in rows) else load_tokenizer(source.folder)
    return cli_text.batches(
        *(rows, tokenizer, bool(source.model.config.is_encoder_decoder)),
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )


class _Experts(Mapping[LayerId, ExpertWeights]):
    """The experts of each layer, read when asked for."""

    def __init__(self, source: Streamed) -> None:
        self.source = source

    def __getitem__(self, layer: LayerId) -> ExpertWeights:
        return self.source.experts(layer)

    def __iter__(self) -> Iterator[LayerId]:
        return iter(self.source.layers)

    def __len__(self) -> int:
        return len(self.source.layers)


def _statistics(source: Streamed, arguments: argparse.Namespace, saliency: bool) -> RoutingStatistics:
    """Routing statistics: from a file, or from a forward pass that reads experts as they are called."""
    if arguments.statistics is not None:
        found = load_statistics(arguments.statistics)
        found.check_layers(source.layers)
        return found
    if arguments.calibration is None:
        raise ValueError("routing statistics are needed: give --calibration FILE, or --statistics FILE saved before")
    found = RoutingStatistics(reservoir=arguments.reservoir, seed=arguments.seed)
    taken = _batches(source, arguments)
    adapter = source.adapter
    experts = _Experts(source) if saliency else None
    activations = {layer: adapter.activation(source.model, layer) for layer in source.layers} if saliency else None
    with source.runnable() as model, adapter.capture(model) as captured:
        for inputs in progress(taken, "routing statistics", total=len(taken)):
            model(**inputs, use_cache=False)
            found.update(captured.batches, experts=experts, activations=activations)
    if arguments.save_statistics is not None:
        save_tensors(arguments.save_statistics, found.tensors())
    return found


# -- merge -------------------------------------------------------------------------------------------------------
def merge(arguments: argparse.Namespace) -> None:
    """Group and merge the experts of a stock checkpoint."""
    _prepare(arguments)
    base = BASES[arguments.similarity]
    if "gradients" in base.needs or arguments.method == "fisher":
        what = arguments.method if arguments.method == "fisher" else arguments.similarity
        raise ValueError(f"{what} needs gradients, which the workflow collects; here choose another")
    source = Streamed(arguments.model)
    _check_experts(source, arguments)
    found = _statistics(source, arguments, saliency=arguments.method == "reap")
    if arguments.method == "reap" and not all(bool(one.saliency_tokens_E.any()) for one in found.layers.values()):
        raise ValueError("--method reap needs the experts' saliency, which --statistics has not; give --calibration")
    merger = _Merger(source, arguments, Evidence(found, {}, {}))
    merger.group()
    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    provenance = {"stage": "merge", "tool": "mcsmoe merge", "settings": settings, "parent": source.digest}
    frame = groups_frame(merger.groupings, merger.evidence, arguments.method, arguments.seed)
    source.rewrite(
        arguments.out,
        merger.merge,
        provenance,
        layers=progress(source.layers, "merge"),
        extra=lambda folder: write_table(folder / GROUPS, frame, "groups"),
    )
    log.info("%s: %s", arguments.out, _sizes(source.folder, arguments.out))


_SETTINGS = ("experts", "similarity", "grouping", "budget", "alignment", "method", "seed")


class _Merger:
    """One layer at a time: similarity first, since a budget over all layers needs them all, then the merge."""

    def __init__(self, source: Streamed, arguments: argparse.Namespace, evidence: Evidence) -> None:
        self.source, self.arguments, self.evidence = source, arguments, evidence
        self.groupings: dict[LayerId, Any] = {}
        self._permutations: dict[LayerId, Tensor] = {}

    def group(self) -> None:
        source, arguments, base = self.source, self.arguments, BASES[self.arguments.similarity]
        similarity: dict[LayerId, Tensor] = {}
        for layer in progress(source.layers, "similarity"):
            if base.needs <= {"statistics"}:
                similarity[layer] = self._similarity(layer)
                continue
            with source.layer(layer):
                if base.needs & {"weights", "tokens"}:
                    self._align(layer)
                similarity[layer] = self._similarity(layer)
        self.groupings = plan(
            {layer: importance(self.evidence.layer(layer), arguments.method) for layer in source.layers},
            similarity,
            arguments.experts,
            method=arguments.grouping,
            budget=arguments.budget,
            capacity=arguments.capacity,
            linkage=arguments.linkage,
            seed=arguments.seed,
            excluded=arguments.exclude_layers,
        )

    def _similarity(self, layer: LayerId) -> Tensor:
        source, arguments = self.source, self.arguments
        return layer_similarity(
            source.model, source.adapter, layer, arguments.similarity, self.evidence, arguments.seed
        )

    def _align(self, layer: LayerId) -> None:
        """Align all experts of a layer that is in memory to its expert 0, where that is asked for."""
        how, model, adapter = self.arguments.alignment, self.source.model, self.source.adapter
        if how == "none" or how.endswith("-dominant"):
            return
        weights = adapter.read_experts(model, layer)
        if layer not in self._permutations:
            reference_E = torch.zeros(weights.num_experts, dtype=torch.int64)
            found = align_layer(
                *(weights, reference_E, how, self.evidence.layer(layer), adapter.activation(model, layer)),
                workers=self.arguments.threads,
                layer=layer,
            )
            self._permutations[layer] = found.permutation_EF
        adapter.write_experts(model, layer, apply_permutation(weights, self._permutations[layer], layer))

    def merge(self, layer: LayerId) -> None:
        grouping = self.groupings[layer]
        log.info("%s: %d experts in %d groups", layer, grouping.num_experts, grouping.num_groups)
        if grouping.num_groups == grouping.num_experts:
            return
        self._align(layer)
        merge_layer(
            *(self.source.model, self.source.adapter, layer, grouping, self.arguments.method, self.evidence),
            alignment=self.arguments.alignment,
            seed=self.arguments.seed,
            workers=self.arguments.threads,
        )


def _check_experts(source: Streamed, arguments: argparse.Namespace) -> None:
    for layer in source.layers:
        experts = source.adapter.num_experts(source.model, layer)
        if source.adapter.expert_to_group(source.model, layer).unique().numel() != experts:
            raise ValueError(f"{source.folder}: layer {layer!r} is merged already; start from the model it came from")
        if not 1 <= arguments.experts <= experts:
            raise ValueError(f"--experts is {arguments.experts}; layer {layer!r} has {experts}, give 1 to {experts}")
    if source.compact:
        raise ValueError(f"{source.folder}: is compressed already; merge first, then compress")


# -- compress ----------------------------------------------------------------------------------------------------
def compress(arguments: argparse.Namespace) -> None:
    """Split experts into low-rank factors and the strongest rows of what they leave, without training."""
    _prepare(arguments)
    if not 0 < arguments.keep <= 1:
        raise ValueError(f"--keep is {arguments.keep}; give a share of the rows above 0 and up to 1")
    source = Streamed(arguments.model)
    found = None
    if arguments.calibration is not None or arguments.statistics is not None:
        found = _statistics(source, arguments, saliency=False)
    specs = compact.layer_specs(source.folder)
    if any(spec.compression is not None for spec in specs.values()):
        raise ValueError(f"{source.folder}: is compressed already")
    unknown = sorted(set(arguments.exclude_layers) - set(source.layers))
    if unknown:
        raise ValueError(f"--exclude-layers names {unknown[0]!r}, which is not a layer; there are {source.layers}")
    # A layer that merging left alone is left alone here too.
    merged = list(specs) if specs else source.layers
    chosen = [layer for layer in source.layers if layer in merged and layer not in arguments.exclude_layers]
    settings = {"rank": arguments.rank, "keep": arguments.keep, "activation_aware": found is not None}
    provenance = {"stage": "compress", "tool": "mcsmoe compress", "settings": settings, "parent": source.digest}

    def change(layer: LayerId) -> None:
        _compress_layer(source, layer, arguments.rank, arguments.keep, found)

    source.rewrite(arguments.out, change, provenance, layers=progress(chosen, "compress", total=len(chosen)))
    with suppress(FileNotFoundError):
        (arguments.out / GROUPS).write_bytes((source.folder / GROUPS).read_bytes())
    log.info("%s: %s", arguments.out, _sizes(source.folder, arguments.out))
    log.info("nothing was trained: the workflow's compress stage prunes rows while training, and loses less")


@torch.no_grad()
def _compress_layer(
    source: Streamed, layer: LayerId, rank: int, keep: float, statistics: RoutingStatistics | None
) -> None:
    """Rows are ranked by their norm, or by the norm of what they add to the outputs on the calibration tokens."""
    model, adapter = source.model, source.adapter
    grams: dict[str, Tensor] = {}
    if statistics is not None:
        weights, table = adapter.read_experts(model, layer), adapter.expert_to_group(model, layer)
        grams = input_grams(weights, table, statistics.layers[layer], adapter.activation(model, layer))
    split_experts(model, adapter, rank, statistics, [layer])
    for module in model.get_submodule(layer).modules():
        if not isinstance(module, RedirectedExperts):
            continue
        for name in module.roles:
            projection = module.projection(name)
            assert isinstance(projection, LowRankProjection)
            residual_Goi = projection.residual_Goi
            squared_Goi = residual_Goi.double() if name not in grams else residual_Goi.double() @ grams[name].double()
            score_Go = (squared_Goi * residual_Goi.double()).sum(dim=2)
            count = max(1, round(keep * score_Go.numel()))
            order = score_Go.flatten().argsort(descending=True, stable=True)
            residual_Goi.flatten(0, 1)[order[count:]] = 0
    modules.pack(model.get_submodule(layer))


# -- export ------------------------------------------------------------------------------------------------------
def export_form(arguments: argparse.Namespace) -> None:
    """Write a checkpoint in another form, and say what changes."""
    _prepare(arguments)
    source = Streamed(arguments.model)
    if arguments.form == "exact":
        exact(source, arguments.out)
        with suppress(FileNotFoundError):
            (arguments.out / GROUPS).write_bytes((source.folder / GROUPS).read_bytes())
        log.info("%s: the same function, bit for bit; %s", arguments.out, _sizes(source.folder, arguments.out))
        return
    if arguments.recover and arguments.calibration is None:
        raise ValueError("--recover trains routers on text; give --calibration FILE")
    probe = _probe(source, arguments)
    if arguments.form == "dense":
        dense(source, arguments.out)
        made = Streamed(arguments.out)
        with source.runnable() as one, made.runnable() as two:
            log.info("dense: %s", logits_change(one, two, probe[:4]))
        log.info("%s: %s", arguments.out, _sizes(source.folder, arguments.out))
        return
    recovery = RouterRecovery(arguments.recover, arguments.learning_rate, arguments.seed)
    report = stock(source, arguments.out, probe, arguments.fold, _frequency(source, arguments), recovery)
    for kind, change in report.folds.items():
        log.info("routers folded by %s%s: %s", kind, " (chosen)" if kind == report.chosen else "", change)
    if report.recovered is not None:
        log.info("after training the routers, on batches kept for it: %s", report.recovered)
    log.info("%s: %s", arguments.out, _sizes(source.folder, arguments.out))


def _probe(source: Streamed, arguments: argparse.Namespace) -> list[cli_text.Batch]:
    """Tokens to compare logits on: the calibration text, or seeded random ones."""
    if arguments.calibration is not None:
        return _batches(source, arguments)
    length = max(1, arguments.max_tokens // 4)
    return [batch(source.model, Settings(arguments.batch_size, length, length, arguments.threads, "cpu", "float32"))]


def _frequency(source: Streamed, arguments: argparse.Namespace) -> dict[LayerId, Tensor] | None:
    """By layer, the share each expert has in its group, from the table that merging left beside the model."""
    file = arguments.groups or source.folder / GROUPS
    if arguments.groups is None and not file.is_file():
        return None
    rows = read_table(file, "groups")
    return {
        str(layer): torch.tensor(part.sort_values("expert")["weight"].tolist(), dtype=torch.float64)
        for layer, part in rows.groupby("layer", sort=False)
    }


# -- common ------------------------------------------------------------------------------------------------------
def _prepare(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything heavy starts."""
    torch.set_num_threads(arguments.threads)
    out = arguments.out
    if out.exists() and not arguments.overwrite:
        raise ValueError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    if out.resolve() == Path(arguments.model).resolve():
        raise ValueError(f"{out}: is the checkpoint that is read; give another --out")
    for name in ("samples", "batch_size", "max_tokens", "reservoir"):
        if getattr(arguments, name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")


def _sizes(before: Path, after: Path) -> str:
    one, two = (sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (before, after))
    return f"{two / 1e6:.1f} MB of weights, from {one / 1e6:.1f} MB ({two / one:.1%})"
