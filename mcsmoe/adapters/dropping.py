"""Experts leave a layer for good: their weights, their rows in the router and what else the layer keeps for each expert.

What is left is a layer as the family itself builds it with fewer experts, and a configuration can say so. Which tensors
have an axis of experts, and which attributes count them, is read off a model of the same class that is built with fewer
experts and no weights; so nothing here knows any family.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsmoe.adapters.counts import choices_said, experts_said, set_experts, set_experts_of, stop_balance_loss_of
from mcsmoe.console import log
from mcsmoe.types import LayerId

NEVER = -1e9  # a router bias whose probability is exactly zero, and which sums and products keep finite
_SETS = ("num_group", "n_group", "num_expert_group")
_TRIALS, _PROBES = 4, 256  # times, and tokens a time, that a router is tried with random weights
_SIBLINGS: dict[tuple[type, str, int], nn.Module] = {}


@dataclass(frozen=True)
class Place:
    """Where a sparse block keeps its experts and its router, as names of its children."""

    experts: str
    router: str
    linear: str  # the module below the router that holds its linear map; "" for the router itself


# -- a model of the same class with fewer experts ----------------------------------------------------------------------
def sibling(model: Any, experts: int) -> nn.Module:
    """A model like ``model`` on the meta device whose layers have ``experts`` experts each.

    Raises:
        ValueError: the configuration names no number of experts, or several, or the family refuses this one.
    """
    key = (type(model), model.config.to_json_string(), experts)
    if key not in _SIBLINGS:
        if len(_SIBLINGS) > 3:
            _SIBLINGS.clear()
        _SIBLINGS[key] = _build(model, experts)
    return _SIBLINGS[key]


def _build(model: Any, experts: int) -> nn.Module:
    from transformers.initialization import no_init_weights

    kind, said = model.config.model_type, _experts_of(model)
    fields = set_experts(model.config.to_dict(), said, experts)
    try:
        with torch.device("meta"), no_init_weights():
            made: nn.Module = type(model)(type(model.config).from_dict(fields))
    except (ValueError, TypeError) as error:
        raise ValueError(f"a {kind} with {experts} instead of {said} experts is refused: {error}") from error
    return made


def _experts_of(model: Any) -> int:
    said = experts_said(model.config)
    if len(said) != 1:
        what = "does not say in a known field how many experts a layer has" if not said else f"names several: {said}"
        raise ValueError(f"the configuration of a {model.config.model_type} {what}")
    return said[0]


def settle(model: Any, counts: list[int]) -> None:
    """Let the configuration of ``model`` and its counters say what holds for layers with these numbers of experts.

    Where all have the same, it says that number. Where they differ, it no longer asks for the router logits of every
    forward pass: the load-balancing loss that comes with them cannot be computed.
    """
    said = experts_said(model.config)
    if len(said) != 1 or set(counts) == {said[0]}:
        return
    if len(set(counts)) > 1:
        for name in stop_balance_loss_of(model.config):
            log.warning(
                "layers have %d to %d experts, and a load-balancing loss over all of them needs equally many: "
                "%s is set to false",
                min(counts),
                max(counts),
                name,
            )
        return
    if not counts:
        return
    small = sibling(model, counts[0])
    for path, module in small.named_modules():
        _recount(model.get_submodule(path) if _has(model, path) else None, module, said[0], counts[0])
    set_experts_of(model.config, said[0], counts[0])


# -- dropping ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def slice_layer(model: Any, layer: LayerId, place: Place, before: int, kept: Tensor) -> None:
    """Leave the experts ``kept`` (int64, ascending) of ``before`` in ``layer``, in place; hooks on its modules stay.

    Raises:
        ValueError: the layer keeps a tensor whose axis of experts is not clear; names it. Nothing has changed then.
    """
    block = model.get_submodule(layer)
    _shrink(block, sibling(model, len(kept)).get_submodule(layer), before, kept, layer)


@dataclass(frozen=True)
class Slices:
    """What leaving a layer's experts out takes of its tensors, as names below the layer.

    Attributes:
        rows: the axis of experts of a tensor, and which of its entries (int64) stay.
        members: the new path of modules that hold one expert each; None for those that go.
    """

    rows: dict[str, tuple[int, Tensor]]
    members: dict[str, str | None]


def slices(model: Any, layer: LayerId, place: Place, before: int, kept: Tensor) -> Slices:
    """What ``slice_layer`` does, without doing it.

    Raises:
        ValueError: as there.
    """
    block, small = model.get_submodule(layer), sibling(model, len(kept)).get_submodule(layer)
    made = Slices({}, {})
    for path, module in block.named_modules():
        names = [name for name in module._modules if name[-1:].isdigit()]
        if isinstance(module, nn.ModuleDict | nn.ModuleList) and len(names) == before:
            new = {names[index]: name for name, index in zip(names, kept.tolist(), strict=False)}
            made.members.update({f"{path}.{name}": f"{path}.{new[name]}" if name in new else None for name in names})
    for path, module in block.named_modules():
        member = next((one for one in made.members if f"{path}.".startswith(f"{one}.")), None)
        if member is not None:
            continue  # whole, or gone
        if not _has(small, path):
            raise ValueError(f"layer {layer!r}: {path!r} has no place in a layer with {len(kept)} experts")
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            wanted = getattr(small.get_submodule(path), name)
            if tensor.shape != wanted.shape:
                what = f"layer {layer!r}: {path}.{name}"
                made.rows[f"{path}.{name}".lstrip(".")] = _rows(tensor, tuple(wanted.shape), before, kept, what)
    return made


def _shrink(block: nn.Module, small: nn.Module, before: int, kept: Tensor, layer: LayerId) -> None:
    changes: list[tuple[nn.Module, str, Tensor]] = []
    for module in list(block.modules()):
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            _keep_members(module, before, kept)
    for path, module in block.named_modules():
        if not _has(small, path):
            raise ValueError(f"layer {layer!r}: {path!r} has no place in a layer with {len(kept)} experts")
        other = small.get_submodule(path)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            wanted = getattr(other, name)
            if tensor.shape != wanted.shape:
                axis, rows = _rows(tensor, tuple(wanted.shape), before, kept, f"layer {layer!r}: {path}.{name}")
                changes.append((module, name, tensor.detach().index_select(axis, rows.to(tensor.device)).contiguous()))
    for module, name, tensor in changes:
        old = getattr(module, name)
        setattr(module, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
    for path, module in block.named_modules():
        _recount(module, small.get_submodule(path), before, len(kept))


def _keep_members(experts: nn.ModuleDict | nn.ModuleList, before: int, kept: Tensor) -> None:
    """The same names, counted from zero, for the members that stay; what else the module holds stays too."""
    names = [name for name in experts._modules if name[-1:].isdigit()]
    if len(names) != before:
        return
    members = [experts._modules.pop(name) for name in names]
    for name, index in zip(names, kept.tolist(), strict=False):
        experts._modules[name] = members[index]


def _rows(tensor: Tensor, wanted: tuple[int, ...], before: int, kept: Tensor, what: str) -> tuple[int, Tensor]:
    """The axis of ``tensor`` that indexes experts, and which of its entries stay.

    An axis may have further entries behind those of the experts (rows for shared ones), or several for each expert.
    """
    differing = [axis for axis, (old, new) in enumerate(zip(tensor.shape, wanted, strict=False)) if old != new]
    after = len(kept)
    if tensor.ndim == len(wanted) and len(differing) == 1:
        (axis,) = differing
        old, new = tensor.shape[axis], wanted[axis]
        if old - new == before - after and old >= before:
            return axis, torch.cat([kept, torch.arange(before, old)])
        if old % before == 0 and new == old // before * after:
            each = old // before
            return axis, (kept[:, None] * each + torch.arange(each)).flatten()
    raise ValueError(f"{what} is {tuple(tensor.shape)}, and {wanted} with {after} instead of {before} experts")


def _recount(module: nn.Module | None, small: nn.Module, before: int, after: int) -> None:
    """Counters of experts: plain numbers that a smaller model has otherwise."""
    for name, value in vars(module).items() if module is not None else ():
        new: Any = vars(small).get(name)
        counts = isinstance(value, int) and isinstance(new, int) and not isinstance(value, bool) and value != new
        if counts and (value - new == before - after or value * after == new * before):
            setattr(module, name, new)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


# -- whether it may be done --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Correction:
    """What a family adds to the scores it chooses by, one number an expert; kept by the router, or by its block."""

    owner: nn.Module
    name: str
    by_router: str | None  # its name below the router, or None where the block hands it over

    @property
    def tensor(self) -> Tensor:
        """The numbers themselves, of any shape."""
        found: Tensor = getattr(self.owner, self.name)
        return found


def correction_of(block: nn.Module, place: Place, experts: int) -> Correction | None:
    """The correction of a block's choice; None where it has none.

    Raises:
        ValueError: several tensors may be it.
    """
    router = block.get_submodule(place.router)
    linear = router.get_submodule(place.linear)
    found = [
        Correction(owner, name, below)
        for owner, name, below, tensor in _tensors(block, router)
        if "bias" in name and owner is not linear and tensor.numel() == experts
    ]
    # The linear map of some routers is the router itself, and its own bias is one of its logits.
    if linear is router:
        found += [
            Correction(router, name, name)
            for name, tensor in [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]
            if "bias" in name and name != "bias" and tensor.numel() == experts
        ]
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} tensors beside its router may correct its choice: {[one.name for one in found]}"
        )
    return found[0] if found else None


def _tensors(block: nn.Module, router: nn.Module) -> Iterator[tuple[nn.Module, str, str | None, Tensor]]:
    for path, module in router.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield module, name, f"{path}.{name}".lstrip("."), tensor
    for name, tensor in [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]:
        yield block, name, None, tensor


def expert_sets(router: Any) -> int:
    """How many sets of consecutive experts a router chooses among before it chooses experts; 1 if it does not."""
    if getattr(router, "topk_method", None) == "greedy" or getattr(router, "topk_group", None) is None:
        return 1
    return next((int(getattr(router, name)) for name in _SETS if getattr(router, name, None)), 1)


def problem(model: Any, block: nn.Module, place: Place, kept_E: Tensor) -> str | None:
    """Why the router of ``block`` cannot go on with the experts marked in ``kept_E`` alone, or None."""
    router: Any = block.get_submodule(place.router)
    room, sets = int(kept_E.sum()), expert_sets(router)
    choices = int(getattr(router, "top_k", 0) or choices_said(model.config))
    if sets > 1:
        # A set is scored by its best two, so one with fewer kept is never taken.
        kept_G = kept_E.reshape(sets, -1).sum(dim=1)
        usable = kept_G[kept_G >= min(2, kept_E.numel() // sets)].sort().values
        taken = int(router.topk_group)
        room = int(usable[:taken].sum()) if len(usable) >= taken else 0
    if room < choices:
        return (
            f"with {int((~kept_E).sum())} of {len(kept_E)} experts dropped the router can be left with {room} to choose "
            f"{choices} from; drop fewer, or prune with a redirect (merge method 'prune')"
        )
    tables = [name for name, tensor in router.named_buffers() if tensor.ndim == 2 and not tensor.is_floating_point()]
    if tables:
        return (
            f"its router chooses experts by a table of tokens ({tables[0]}), which has no other choice for a dropped "
            "expert; prune with a redirect instead (merge method 'prune')"
        )
    return None


@torch.no_grad()
def slicing_is_exact(model: Any, layer: LayerId, place: Place, before: int, kept: Tensor) -> bool:
    """Whether a router with only the rows ``kept`` chooses and weighs as the whole one that may not choose the others.

    A router without a correction of its choice gives dropped experts no probability either way. One with a correction is
    tried with random weights, so that the answer depends on the family alone: where the correction is added to
    probabilities, fewer rows change what it is compared with. Sets of experts must keep equally many each.
    """
    block = model.get_submodule(layer)
    router = block.get_submodule(place.router)
    sets = expert_sets(router)
    kept_E = torch.zeros(before, dtype=torch.bool).index_fill_(0, kept, True)
    if sets > 1:
        kept_G = kept_E.reshape(sets, -1).sum(dim=1)
        if int(kept_G.min()) != int(kept_G.max()) or int(kept_G.min()) < 2:
            return False
    correction = correction_of(block, place, before)
    if correction is None:
        return True
    random = torch.Generator().manual_seed(0)
    whole = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    for tensor in whole.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=random))
    part = copy.deepcopy(whole)
    small = sibling(model, len(kept)).get_submodule(layer).get_submodule(place.router)
    _shrink(part, small, before, kept, layer)
    linear: Any = whole.get_submodule(place.linear)
    width = linear.weight.shape[1]
    for _ in range(_TRIALS):
        inputs = torch.randn(_PROBES, width, generator=random) * width**-0.5
        bias_E = torch.randn(before, generator=random) * 0.2
        try:
            index_TK, weight_TK = _choose(whole, correction, inputs, bias_E.masked_fill(~kept_E, NEVER))
            sliced_TK, sliced_weight_TK = _choose(part, correction, inputs, bias_E[kept])
        except (RuntimeError, IndexError, TypeError, ValueError, StopIteration):
            return False
        dense, sliced = (
            torch.zeros(_PROBES, before).scatter_add(1, index, weight.float())
            for index, weight in ((index_TK, weight_TK), (kept[sliced_TK], sliced_weight_TK))
        )
        if not torch.allclose(dense, sliced, atol=1e-5):
            return False
    return True


def _choose(router: nn.Module, correction: Correction, inputs: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and weights [T, K] that ``router`` gives with ``bias`` as the correction of its choice."""
    shape = (*correction.tensor.shape[:-1], bias.numel())
    given: dict[str, Tensor] = {}
    if correction.by_router is not None:
        path, _, name = correction.by_router.rpartition(".")
        getattr(router.get_submodule(path), name).copy_(bias.reshape(shape))
    else:
        asked = list(inspect.signature(router.forward).parameters)[1:]
        given = {next(name for name in asked if "bias" in name): bias.reshape(shape)}
    try:
        result = router(inputs, **given)
    except ValueError:  # it wants rows of tokens
        result = router(inputs[None], **given)
    index = next(one for one in result if not one.is_floating_point())
    weight = next(one for one in result if one.is_floating_point() and one.shape == index.shape)
    return index.reshape(_PROBES, -1), weight.reshape(_PROBES, -1)
