"""Which adapter treats a model."""

from __future__ import annotations

from torch import nn

from mcsmoe.adapters.base import Adapter


def adapters() -> list[type[Adapter]]:
    """All adapters, in the order they are asked. Imported here: each pulls in the model classes of its family."""
    from mcsmoe.adapters.switch import SwitchAdapter

    return [SwitchAdapter]


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter that treats ``model`` exactly.

    Raises:
        ValueError: no adapter does; names the model class and type, and the families there are.
    """
    found = adapters()
    for adapter in found:
        if adapter.matches(model):
            return adapter()
    kind = getattr(getattr(model, "config", None), "model_type", "unknown")
    raise ValueError(
        f"{type(model).__name__} (model type {kind!r}) has no sparse layers that an adapter can treat exactly; "
        f"supported: {', '.join(adapter.name for adapter in found)}"
    )
