"""What calibration found, in files and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mcsmoe.artefacts.tensors import read_sealed, write_sealed
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import ExpertWeights, LayerId

if TYPE_CHECKING:
    pass


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors atomically as safetensors, with their digest."""
    write_sealed(path, tensors)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        ValueError: missing, unreadable or altered since it was written; names the file and the remedy.
    """
    return read_sealed(path)[0]


def load_statistics(path: Path) -> RoutingStatistics:
    """Routing statistics that ``save_tensors(path, statistics.tensors())`` wrote, or a folder that was collected."""
    if Path(path).is_dir():
        # Not at the top: most stages read single files, and are not to be run again for what a folder is.
        from mcsmoe.calibration.folder import open_statistics

        return open_statistics(path)
    return RoutingStatistics.from_tensors(load_tensors(path))


def gradient_tensors(
    gradients: dict[LayerId, ExpertWeights], squares: dict[LayerId, ExpertWeights]
) -> dict[str, Tensor]:
    """Flat names ``gradient/<layer>/<tensor>`` and ``fisher/<layer>/<tensor>``."""
    return {
        f"{kind}/{layer}/{name}": tensor
        for kind, kept in (("gradient", gradients), ("fisher", squares))
        for layer, weights in kept.items()
        for name, tensor in weights.tensors.items()
    }


def expert_tensors(tensors: dict[str, Tensor], kind: str, layer: LayerId, like: ExpertWeights) -> ExpertWeights:
    """The gradients (``gradient``) or Fisher information (``fisher``) of a layer, with the roles of its weights.

    Raises:
        ValueError: the file is of another model; names the layer.
    """
    missing = [name for name in like.tensors if f"{kind}/{layer}/{name}" not in tensors]
    if missing:
        raise ValueError(f"layer {layer!r}: no {kind} of {missing[0]!r}; the gradients are of another model")
    return like.map(lambda name, _: tensors[f"{kind}/{layer}/{name}"])
