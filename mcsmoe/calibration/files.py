"""What calibration found, in files and back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mcsmoe.artefacts.tensors import read_sealed, write_sealed
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import ExpertWeights, LayerId

log = logging.getLogger(__name__)
_MODEL = "@model"  # fingerprint of the weights that statistics were taken on


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors atomically as safetensors, with their digest."""
    write_sealed(path, tensors)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        ValueError: missing, unreadable or altered since it was written; names the file and the remedy.
    """
    return read_sealed(path)[0]


def save_statistics(path: Path, statistics: RoutingStatistics, model: str) -> None:
    """Write routing statistics atomically; ``model`` is the ``fingerprint`` of the weights they were taken on."""
    # Not among the metadata, which the library writes in no certain order: the same statistics are the same bytes.
    taken_on = torch.tensor(list(model.encode()), dtype=torch.uint8)
    write_sealed(path, statistics.tensors() | {_MODEL: taken_on})


def load_statistics(path: Path, lineage: Sequence[str] | None = None) -> RoutingStatistics:
    """Routing statistics that ``save_statistics`` wrote, or a folder that was collected.

    Args:
        lineage: fingerprints of the weights that they may have been taken on: the model's own, then those it was made
            from with its experts kept (``checkpoint.lineage``); None asks for none. A file that does not say what it was
            taken on is accepted with a warning.

    Raises:
        ValueError: missing, unreadable, altered, no statistics, or taken on another model; names the file and the remedy.
    """
    if Path(path).is_dir():
        # Not at the top: most stages read single files, and are not to be run again for what a folder is.
        from mcsmoe.calibration.folder import open_statistics, read_description

        _check_model(path, str(read_description(path).get("model", "")), lineage)
        return open_statistics(path)
    tensors = load_tensors(path)
    taken_on = tensors.pop(_MODEL, torch.empty(0, dtype=torch.uint8))
    _check_model(path, bytes(taken_on.flatten().to(torch.uint8).tolist()).decode(errors="replace"), lineage)
    try:
        return RoutingStatistics.from_tensors(tensors)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _check_model(path: Path, taken_on: str, lineage: Sequence[str] | None) -> None:
    if lineage is None or taken_on in lineage[:1]:
        return
    if taken_on in lineage:
        log.info("%s: were taken on weights that this model was made from; its experts are taken for those", path)
        return
    if not taken_on:
        log.warning("%s: does not say what model it was taken on; it is taken for this one's", path)
        return
    raise ValueError(
        f"{path}: these statistics were taken on another model (other weights: another family, seed or state of training), "
        "and this one does not say that it was made from that; collect them on this one"
    )


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
