"""mcsmoe: merge the experts of a Mixture-of-Experts model, compress what is left, and prove what was kept.

``mcsmoe.load(folder)`` returns a ready model; after ``import mcsmoe`` the Auto classes of transformers load compact
checkpoints too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcsmoe.checkpoint import auto as _auto

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_tokenizer", "save"]

_auto.register()


def load(path: str | Path, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a checkpoint, in eval mode; see ``mcsmoe.checkpoint.load.load_model``."""
    from mcsmoe.checkpoint.load import load_model

    return load_model(path, dtype=dtype, device=device)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model; see ``mcsmoe.checkpoint.load.load_tokenizer``."""
    from mcsmoe.checkpoint.load import load_tokenizer

    return load_tokenizer(path)


def save(model: nn.Module, path: str | Path, tokenizer: Any = None, provenance: dict[str, Any] | None = None) -> None:
    """Write a checkpoint; see ``mcsmoe.checkpoint.save.save_model``."""
    from mcsmoe.checkpoint.save import save_model

    save_model(model, path, tokenizer=tokenizer, provenance=provenance)
