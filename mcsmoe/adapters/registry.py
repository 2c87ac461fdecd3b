"""Which adapter treats a model."""

from __future__ import annotations

from torch import nn

from mcsmoe.adapters.base import Adapter


def adapters() -> list[type[Adapter]]:
    """All adapters, in the order they are asked. Imported here: each pulls in the model classes of its family."""
    from mcsmoe.adapters.fused import FusedAdapter
    from mcsmoe.adapters.nllb import NllbAdapter
    from mcsmoe.adapters.switch import SwitchAdapter

    return [SwitchAdapter, NllbAdapter, FusedAdapter]


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter that treats ``model`` exactly, after it has made ``model`` ready.

    Raises:
        ValueError: no adapter does; names the model class and type, the reason, and the families there are.
    """
    found = adapters()
    for adapter in found:
        if adapter.matches(model):
            made = adapter()
            made.prepare(model)
            return made
    kind = getattr(getattr(model, "config", None), "model_type", "unknown")
    raise ValueError(
        f"{type(model).__name__} (model type {kind!r}) {_reason(model, found)}; "
        f"supported: {', '.join(adapter.name for adapter in found)}"
    )


def known_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that treats ``model``, which is left as it is; None if there is none."""
    return next((adapter() for adapter in adapters() if adapter.matches(model)), None)


def has_experts(model: nn.Module) -> bool:
    """Whether any module of ``model`` is named like experts, treated by an adapter or not."""
    return _experts(model) is not None


def _experts(model: nn.Module) -> tuple[str, nn.Module] | None:
    around: tuple[str, nn.Module] | None = None
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "expert" in kind.lower() or path.rpartition(".")[2] == "experts":
            return path, module
        if around is None and kind.endswith(("MoE", "MoeBlock")):
            around = path, module
    return around


def _reason(model: nn.Module, found: list[type[Adapter]]) -> str:
    for adapter in found:
        reason = adapter.refusal(model)
        if reason is not None:
            return f"cannot be treated exactly: {reason}"
    known = _experts(model)
    if known is not None:
        path, module = known
        return (
            f"has experts ({path!r}, a {type(module).__name__}), but stores them in a way that no adapter can "
            "treat exactly"
        )
    return "has no sparse layers: it is not a Mixture-of-Experts model, so there are no experts to merge or compress"
