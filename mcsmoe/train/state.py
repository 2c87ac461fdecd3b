"""State of an unfinished training, kept outside the rule's outputs, which Snakemake wipes before it starts again."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mcsmoe.artefacts.tensors import read_sealed, write_sealed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateStore:
    """A folder with the newest state of one training, believed only if ``signature`` is the one it was saved under."""

    folder: Path
    signature: str

    @staticmethod
    def sign(settings: Any) -> str:
        """Digest of everything that decides the course of a training: plan, inputs, code."""
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def save(self, step: int, tensors: dict[str, Tensor], records: dict[str, Any]) -> None:
        """Write the state after ``step``; older states go once it is on disk."""
        metadata = {"signature": self.signature, "step": str(step), "records": json.dumps(records)}
        target = self.folder / f"step-{step:09d}.safetensors"
        write_sealed(target, tensors, metadata)
        for file in self.folder.glob("*"):
            if file != target:
                file.unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """(step, tensors, records) of the newest whole state with this signature, or None to start from the beginning."""
        for file in sorted(self.folder.glob("step-*.safetensors"), reverse=True):
            try:
                tensors, metadata = read_sealed(file, lambda found: found.get("signature") == self.signature)
            except ValueError as error:
                log.warning("the saved state is damaged and is ignored: %s", error)
                continue
            if metadata.get("signature") != self.signature:
                log.info("the saved state %s belongs to other settings or code; starting afresh", file)
                continue
            return int(metadata["step"]), tensors, json.loads(metadata["records"])
        return None

    def clear(self) -> None:
        """Remove the state: the training is finished and its outputs are in place."""
        shutil.rmtree(self.folder, ignore_errors=True)
