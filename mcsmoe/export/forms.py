"""Write a checkpoint in another form: exact, dense or stock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.save import own_tensors, tensor_of, write_folder
from mcsmoe.checkpoint.streaming import Spool, Streamed, place
from mcsmoe.export.change import Change, logits_change
from mcsmoe.export.recovery import RouterRecovery, recover_routers
from mcsmoe.types import Batch, LayerId

FORMS = ("exact", "dense", "stock")
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOICE_FIELDS = ("num_experts_per_tok", "moe_top_k", "top_k", "num_experts_per_token")
_NEVER = -1e4  # a router bias below this marks an expert that is never chosen


def exact(source: Streamed, out: str | Path) -> None:
    """The same checkpoint again, every file checked on the way."""
    source.rewrite(out, lambda _layer: None, {"stage": "export", "form": "exact", "parent": source.digest}, layers=())


def dense(source: Streamed, out: str | Path) -> None:
    """The same function in the base model's own architecture, with E experts in every layer.

    One layer is in memory at a time; where the architecture renames tensors on disk, what is not an expert is too.
    """
    target = _stock_model(source, {})
    tables = {layer: source.adapter.expert_to_group(source.model, layer) for layer in source.layers}
    with atomic_directory(out) as folder:
        _write(source, target, folder, lambda layer: tables[layer], lambda _layer, _name, tensor: tensor, "dense")


def _stock_model(source: Streamed, changes: Mapping[str, int]) -> Any:
    """The base architecture on the meta device, with ``changes`` to its configuration."""
    from transformers.initialization import no_init_weights

    fields = source.model.config.to_dict() | dict(changes)
    config = type(source.model.config).from_dict(fields)
    try:
        with torch.device("meta"), no_init_weights():
            model = type(source.model)(config)
    except ValueError as error:
        raise ValueError(f"{source.folder}: a {config.model_type} with {dict(changes)} is refused: {error}") from error
    model.tie_weights()
    return model.eval()


def _write(
    source: Streamed,
    target: Any,
    folder: Path,
    experts_of: Callable[[LayerId], Tensor],
    other: Callable[[LayerId, str, Tensor], Tensor],
    form: str,
) -> None:
    """Write ``target``: groups ``experts_of(layer)`` as its experts, ``other`` applied to what else a layer holds."""
    from transformers.core_model_loading import revert_weight_conversion

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
                spool.add(revert_weight_conversion(target, made))
            target.get_submodule(layer).to(device="meta")
        rest = [name for name in own if not name.startswith(inside)]
        if _converts(target):
            spool.add(revert_weight_conversion(target, {name: source.read(name) for name in rest}))
            infos = dict(spool.infos)
        else:
            whole = model.state_dict()
            infos = {name: TensorInfo.of(whole[name]) for name in rest} | spool.infos

        def tensor(name: str) -> Tensor:
            return spool.read(name) if name in spool.infos else source.read(name)

        source.copy_companions(folder)
        provenance = {"stage": "export", "form": form, "parent": source.digest}
        write_folder(folder, target, infos, tensor, provenance)


def _converts(model: nn.Module) -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


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
    groups = uniform_groups(source)
    target = _stock_model(source, _fewer_experts(source, groups))
    kinds = {layer: _layer_folds(source, layer, groups, frequency) for layer in source.layers}
    known = list(next(iter(kinds.values())))
    if fold != "auto" and fold not in known:
        raise ValueError(f"--fold is {fold!r}; use auto or {', '.join(known)} (frequency and dominant need --groups)")
    first = known[0] if fold == "auto" else fold
    rows: dict[str, tuple[LayerId, Tensor]] = {}
    needed = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}

    def folded(layer: LayerId, name: str, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) == needed[name]:
            return tensor
        rows[name] = (layer, tensor.clone())
        return fold_rows(first, name).to(tensor.dtype)

    def fold_rows(kind: str, name: str) -> Tensor:
        layer, tensor = rows[name]
        return kinds[layer][kind] @ tensor.double()

    def members(layer: LayerId) -> Tensor:
        # A compact layer stacks its groups, one that was never merged its experts: both are in order already.
        return torch.arange(groups)

    with atomic_directory(out) as folder:
        _write(source, target, folder, members, folded, "stock")
        made = Streamed(folder)
        found: dict[str, Change] = {}
        with source.runnable() as merged, made.runnable() as small:
            for kind in known if fold == "auto" else [fold]:
                for name in rows:
                    tensor_of(small, name).copy_(fold_rows(kind, name))
                found[kind] = logits_change(merged, small, batches)
        chosen = min(found, key=lambda kind: found[kind].divergence)
        made.overwrite({name: fold_rows(chosen, name) for name in rows})
        recovered = None
        if recovery is not None and recovery.steps > 0 and rows:
            recovered = recover_routers(source, made, batches, recovery)
    return StockReport(chosen, found, recovered)


def _fewer_experts(source: Streamed, groups: int) -> dict[str, int]:
    fields = source.model.config.to_dict()
    experts = source.adapter.num_experts(source.model, source.layers[0])
    changes = {name: groups for name in _EXPERT_FIELDS if fields.get(name) == experts}
    if not changes:
        raise ValueError(
            f"{source.folder}: its configuration does not say in a known field that it has {experts} experts"
        )
    if int(fields.get("n_group") or 1) > 1:
        raise ValueError(
            f"{source.folder}: its router first chooses among n_group = {fields['n_group']} sets of experts, which merged "
            "groups do not respect; export --form dense"
        )
    for name in _CHOICE_FIELDS:
        if isinstance(fields.get(name), int) and fields[name] > groups:
            raise ValueError(
                f"{source.folder}: {groups} groups, but {name} is {fields[name]}: a token would choose more experts than "
                "there are; merge to more groups, or export --form dense"
            )
    return changes


def _layer_folds(
    source: Streamed, layer: LayerId, groups: int, frequency: Mapping[LayerId, Tensor] | None
) -> dict[str, Tensor]:
    table = source.adapter.expert_to_group(source.model, layer)
    routers = [name for name in source.adapter.router_parameters(source.model) if name.startswith(f"{layer}.")]
    dead_E = torch.zeros(len(table), dtype=torch.bool)
    for name in routers:
        if name.endswith("bias"):
            dead_E |= source.read(name).float().flatten() < _NEVER
    if frequency is not None and layer not in frequency:
        raise ValueError(f"layer {layer!r}: the groups given do not name it; they are of another model")
    return folds(table, groups, dead_E, None if frequency is None else frequency[layer])
