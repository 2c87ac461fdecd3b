"""What weights a checkpoint was made from: what was found out about those may be used for it.

A checkpoint made by a step that keeps the experts (alignment, merging, pruning, recovery, compression, another form) names
the fingerprints of the weights before it in its provenance, the nearest first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcsmoe.artefacts.tensors import TensorFolder
from mcsmoe.checkpoint.format import SECTION, read_config
from mcsmoe.console import log

PROVENANCE = "provenance.json"
ANCESTORS = "ancestors"
"""Entry of the provenance: fingerprints of the weights that a checkpoint was made from, the nearest first."""
EXPECTED = "expected_errors"
"""Entry of the provenance: by layer the error that it was reduced with, where one could be told beforehand."""
WEIGHTS = "weights"
"""Entry of provenance.json: fingerprint of the weights it was written for, which others may have replaced since."""


def lineage(folder: str | Path, fingerprint: str | None = None) -> list[str]:
    """Fingerprints of the weights of a checkpoint folder and of all that they were made from, the nearest first.

    Args:
        fingerprint: of the folder's own weights, where it is known already.
    """
    own = TensorFolder(folder).fingerprint if fingerprint is None else fingerprint
    told = _provenance(Path(folder), own)
    found = told.get(ANCESTORS)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        return [own]
    return list(dict.fromkeys((own, *found)))


def origin(folder: str | Path, fingerprint: str | None = None) -> dict[str, Sequence[str]]:
    """The entry of the provenance of a checkpoint that is made from the one in ``folder``."""
    return {ANCESTORS: lineage(folder, fingerprint)}


def expected_errors(folder: str | Path) -> dict[str, float]:
    """By layer what the step that made a checkpoint expected it to lose; empty where nothing was."""
    found = _provenance(Path(folder), TensorFolder(folder).fingerprint).get(EXPECTED)
    if not isinstance(found, dict):
        return {}
    return {str(layer): float(error) for layer, error in found.items() if isinstance(error, int | float)}


def _provenance(folder: Path, own: str) -> dict[str, Any]:
    section = read_config(folder).get(SECTION)
    if isinstance(section, dict):
        told: Any = section.get("provenance")  # of these weights: their digests stand beside it
    else:
        told = _of_stock(folder / PROVENANCE)
        if isinstance(told, dict) and ANCESTORS in told and told.get(WEIGHTS) != own:
            log.warning("%s: was written for other weights, and is not believed", folder / PROVENANCE)
            return {}
    return told if isinstance(told, dict) else {}


def _of_stock(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: not readable, so it is not known what the model was made from (%s)", file, error)
        return None
