"""Write a checkpoint in another form: exact, dense or stock."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.counts import CHOICE_FIELDS, EXPERT_FIELDS, expert_paths, set_experts_of
from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint import fields
from mcsmoe.checkpoint.card import Parent, write_card
from mcsmoe.checkpoint.rewriting import as_published
from mcsmoe.checkpoint.save import own_tensors, place, write_folder
from mcsmoe.checkpoint.skeleton import empty_model
from mcsmoe.checkpoint.spool import Spool
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.export.change import Change, logits_change, require_logits
from mcsmoe.export.recovery import RouterRecovery, recover_routers
from mcsmoe.grouping.sets import respects
from mcsmoe.types import Batch, LayerId

FORMS = ("exact", "dense", "stock")
_NEVER = -1e4  # a router bias below this marks an expert that is never chosen


def exact(source: Streamed, out: str | Path) -> None:
    """The same checkpoint again, every file checked on the way."""
    source.rewrite(out, lambda _layer: None, {"stage": "export", "form": "exact", **source.origin}, layers=())


def dense(source: Streamed, out: str | Path) -> None:
    """The same function in the base model's own architecture, with E experts in every layer.

    One layer is in memory at a time; where the architecture renames tensors on disk, what is not an expert is too.
    """
    target = _stock_model(source, None)
    tables = {layer: source.adapter.expert_to_group(source.model, layer) for layer in source.layers}
    with atomic_directory(out) as folder:
        _write(source, target, folder, lambda layer: tables[layer], lambda _layer, _name, tensor: tensor, "dense")


def _stock_model(source: Streamed, experts: int | None) -> Any:
    """The base architecture on the meta device, with ``experts`` a layer, or as many as it has."""
    for layer in source.layers:
        if source.adapter.read_novices(source.model, layer) is not None:
            raise ValueError(
                f"{source.folder}: layer {layer!r} has novices, which the base architecture has no place for; "
                "export --form exact, or prune with --dropped delete"
            )
    config = copy.deepcopy(source.model.config)
    if experts is not None:
        _set_experts(source, config, experts)
    return empty_model(type(source.model), config, None, source.folder / "config.json")


def _write(
    source: Streamed,
    target: Any,
    folder: Path,
    experts_of: Callable[[LayerId], Tensor],
    other: Callable[[LayerId, str, Tensor], Tensor],
    form: str,
) -> None:
    """Write ``target``: groups ``experts_of(layer)`` as its experts, ``other`` applied to what else a layer holds."""
    adapter, model = source.adapter, source.model
    own = list(own_tensors(target))
    inside = tuple(f"{layer}." for layer in source.layers)
    with Spool.inside(folder) as spool:
        for layer in source.layers:
            with source.layer(layer):
                weights = adapter.read_experts(model, layer).select(experts_of(layer))
                dtype = next(iter(weights.tensors.values())).dtype
                state = model.get_submodule(layer).state_dict()
                target.get_submodule(layer).to(dtype).to_empty(device="cpu")
                for name in [name for name in own if name.startswith(f"{layer}.")]:
                    inner = name.removeprefix(f"{layer}.")
                    if inner in state:
                        place(target, name, other(layer, name, state[inner]).clone())
                adapter.write_experts(target, layer, weights)
                made = {
                    f"{layer}.{name}": tensor
                    for name, tensor in target.get_submodule(layer).state_dict().items()
                    if f"{layer}.{name}" in own
                }
                spool.add(as_published(target, made))
            target.get_submodule(layer).to(device="meta")
        # Other tensors keep the names and number formats that they have in the files.
        rest = [name for name in own if not name.startswith(inside)]
        raw: dict[str, TensorInfo] = {}
        if source.compact and _converts(target):
            for names in _by_block(rest):
                spool.add(as_published(target, {name: source.read(name) for name in names}))
        else:
            units = source.names.units
            raw = {one: source.tensors.where[one].tensors[one] for name in rest for one in units[name]}
        kept, config = source.keep_unplaced(source.config_fields(target.config))

        def tensor(name: str) -> Tensor:
            if name in kept.infos:
                return kept.read(name, source.tensors.read)
            return spool.read(name) if name in spool.infos else source.tensors.read(name)

        source.copy_companions(folder)
        provenance = {"stage": "export", "form": form, **source.origin}
        write_folder(folder, target, {**spool.infos, **raw, **kept.infos}, tensor, provenance, config=config)
        write_card(folder, provenance, Parent.of(source.folder))


def _converts(model: nn.Module) -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _by_block(names: Sequence[str]) -> list[list[str]]:
    """Names of one numbered block together, since a conversion may need all of its tensors at once."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r".*?\.\d+\.", name)
        blocks.setdefault(found[0] if found else name, []).append(name)
    return list(blocks.values())


@dataclass(frozen=True)
class StockReport:
    """What folding the routers did, by kind of folding, and what training them afterwards won back."""

    chosen: str
    folds: dict[str, Change]
    recovered: Change | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def uniform_groups(source: Streamed) -> int:
    """G, the number of groups of every layer.

    Raises:
        ValueError: layers differ; names them and the remedy.
    """
    counts = {layer: source.adapter.expert_to_group(source.model, layer).unique().numel() for layer in source.layers}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{layer}: {count}" for layer, count in counts.items())
        raise ValueError(
            f"{source.folder}: layers have different numbers of groups ({listed}), and the stock architecture has one "
            "number for all; merge with --budget uniform and without --exclude-layers, or export --form dense"
        )
    return next(iter(counts.values()))


def folds(table: Tensor, groups: int, dead_E: Tensor, frequency_E: Tensor | None) -> dict[str, Tensor]:
    """By kind, [G, E] float64 whose product with the router's E rows gives G rows; every row sums to 1.

    ``mean`` averages the members' rows; with the experts' frequencies there are also ``frequency`` (weighted) and
    ``dominant`` (the row of the most frequent member). Experts in ``dead_E`` are never chosen, and give nothing.
    """
    member_GE = (table[None, :] == torch.arange(groups)[:, None]).double()
    alive_GE = torch.where(dead_E[None, :], 0.0, member_GE)
    # A group all of whose members are never chosen keeps the mean of their rows, and stays never chosen.
    alive_GE = torch.where(alive_GE.sum(dim=1, keepdim=True) > 0, alive_GE, member_GE)
    made = {"mean": alive_GE / alive_GE.sum(dim=1, keepdim=True)}
    if frequency_E is not None:
        weighed_GE = alive_GE * frequency_E.double()[None, :]
        total_G1 = weighed_GE.sum(dim=1, keepdim=True)
        made["frequency"] = torch.where(total_G1 > 0, weighed_GE / total_G1.clamp(min=1e-300), made["mean"])
        leads = torch.where(alive_GE > 0, frequency_E.double()[None, :], -1.0).argmax(dim=1)
        made["dominant"] = nn.functional.one_hot(leads, len(table)).double()
    return made


def folded_axis(fold_GE: Tensor, tensor: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """``tensor`` with its axis of E experts folded to G; entries behind those of the experts (for shared ones) stay."""
    groups, experts = fold_GE.shape
    (axis,) = [axis for axis, (old, new) in enumerate(zip(tensor.shape, wanted, strict=True)) if old != new]
    moved = tensor.movedim(axis, 0)
    head, tail = moved[:experts], moved[experts:]
    if len(tail) + groups != wanted[axis]:
        raise ValueError(f"a router's tensor {tuple(tensor.shape)} cannot be folded to {wanted}; export --form dense")
    return torch.cat([torch.tensordot(fold_GE, head, 1), tail]).movedim(0, axis)


def stock(
    source: Streamed,
    out: str | Path,
    batches: Sequence[Batch],
    fold: str = "auto",
    frequency: Mapping[LayerId, Tensor] | None = None,
    recovery: RouterRecovery | None = None,
) -> StockReport:
    """A model of the base architecture with G experts a layer, its routers folded from E rows to G.

    Args:
        batches: what the change in logits is measured on, and routers are trained on (the last fifth only measures).
        fold: a kind of ``folds``; ``auto`` takes the one that changes the logits least on ``batches``.
        frequency: by layer, how often each expert is chosen, [E]; without it only ``mean`` can be had.
        recovery: train the folded routers to give the merged model's answers; holds both models in memory.

    Raises:
        ValueError: layers with different numbers of groups, fewer groups than a token has experts, or an unknown fold.
    """
    require_logits(source.model, source.folder, "the stock form is measured, and its routers chosen, by them")
    groups = uniform_groups(source)
    _check_stock(source, groups)
    target = _stock_model(source, groups)
    kinds = {layer: _layer_folds(source, layer, groups, frequency) for layer in source.layers}
    known = list(next(iter(kinds.values())))
    if fold != "auto" and fold not in known:
        raise ValueError(f"--fold is {fold!r}; use auto or {', '.join(known)} (frequency and dominant need --groups)")
    first = known[0] if fold == "auto" else fold
    rows: dict[str, tuple[LayerId, Tensor]] = {}
    needed = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}

    def folded(layer: LayerId, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() and tensor.ndim == 2:  # a table of the experts of every token
            return source.adapter.expert_to_group(source.model, layer)[tensor.long()].to(tensor.dtype)
        if tuple(tensor.shape) == needed[name]:
            return tensor
        rows[name] = (layer, tensor.clone())
        return fold_rows(first, name).to(tensor.dtype)

    def fold_rows(kind: str, name: str) -> Tensor:
        layer, tensor = rows[name]
        return folded_axis(kinds[layer][kind], tensor.double(), needed[name])

    def members(layer: LayerId) -> Tensor:
        # A compact layer stacks its groups, one that was never merged its experts: both are in order already.
        return torch.arange(groups)

    with atomic_directory(out) as folder:
        _write(source, target, folder, members, folded, "stock")
        made = Streamed(folder)
        found: dict[str, Change] = {}
        with source.runnable() as merged:
            for kind in known if fold == "auto" else [fold]:
                made.overwrite({name: fold_rows(kind, name) for name in rows})
                with made.runnable() as small:
                    found[kind] = logits_change(merged, small, batches)
        chosen = min(found, key=lambda kind: found[kind].divergence)
        made.overwrite({name: fold_rows(chosen, name) for name in rows})
        recovered = None
        if recovery is not None and recovery.steps > 0 and rows:
            recovered = recover_routers(source, made, batches, recovery)
    return StockReport(chosen, found, recovered)


def _check_stock(source: Streamed, groups: int) -> None:
    """Raise ValueError naming the field unless a stock model of ``groups`` experts a layer can route as this one does."""
    said = fields.written(source.model.config)
    adapter, model = source.adapter, source.model
    for layer in source.layers:
        sets = adapter.expert_sets(model, layer)
        if sets > 1 and not respects(adapter.expert_to_group(model, layer), sets):
            raise ValueError(
                f"{source.folder}: layer {layer!r}: its router first chooses among {sets} sets of experts, which its groups do "
                f"not respect; merge with --budget uniform to a multiple of {sets} groups, or export --form dense"
            )
        if sets > 1 and groups < adapter.num_experts(model, layer):
            adapter.check_dropping(model, layer, groups)
    for path, count in fields.nested(said, CHOICE_FIELDS):
        if isinstance(count, int) and count > groups and not _generates(path):
            raise ValueError(
                f"{source.folder}: {groups} groups, but {'.'.join(path)} is {count}: a token would choose more experts than "
                "there are; merge to more groups, or export --form dense"
            )


def _generates(path: tuple[str, ...]) -> bool:
    """``top_k`` of a configuration may be that of sampling, which old files hold."""
    return path[-1] == "top_k"


def _set_experts(source: Streamed, config: Any, experts: int) -> None:
    """Let ``config``, or the text model's inside it, say ``experts`` wherever it says how many there are now."""
    now = source.adapter.num_experts(source.model, source.layers[0])
    if not expert_paths(config.to_dict(), now):
        raise ValueError(
            f"{source.folder}: its configuration does not say in a known field that it has {now} experts "
            f"({', '.join(EXPERT_FIELDS)}, in text_config or beside it)"
        )
    set_experts_of(config, now, experts)


def _layer_folds(
    source: Streamed, layer: LayerId, groups: int, frequency: Mapping[LayerId, Tensor] | None
) -> dict[str, Tensor]:
    table = source.adapter.expert_to_group(source.model, layer)
    routers = [name for name in source.adapter.router_parameters(source.model) if name.startswith(f"{layer}.")]
    dead_E = torch.zeros(len(table), dtype=torch.bool)
    for name in routers:
        if name.endswith("bias"):
            dead_E |= source.read(name).float().flatten() < _NEVER
    if len(table) == groups and bool((table == torch.arange(groups)).all()):
        # Experts that were dropped have no rows any more, and nothing was merged: every row stays as it is.
        return {"mean": torch.eye(groups, dtype=torch.float64)}
    if frequency is not None and layer not in frequency:
        raise ValueError(f"layer {layer!r}: the groups given do not name it; they are of another model")
    if frequency is not None and len(frequency[layer]) != len(table):
        raise ValueError(
            f"layer {layer!r}: the groups given are of {len(frequency[layer])} experts, the layer has {len(table)}; they are "
            "of another model"
        )
    return folds(table, groups, dead_E, None if frequency is None else frequency[layer])
