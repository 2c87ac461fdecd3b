"""The teacher's cache: the full model runs once over what its students learn from, and only its final states are kept.

Its logits are recomputed from the states with its own output matrix, the very product the model makes, so a student
sees the online teacher's logits without paying for its forward pass in any epoch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mcsmoe.artefacts.atomic import atomic_directory
from mcsmoe.artefacts.digests import check_sums
from mcsmoe.console import progress
from mcsmoe.evaluate.documents import model_inputs
from mcsmoe.types import IGNORED

_STATES, _OFFSETS, _OUTPUT, _INFO = "states.npy", "offsets.npy", "output.safetensors", "teacher.json"


class TeacherCache:
    """Read-only view of a cache folder; states are memory-mapped, so its size does not count as memory.

    Raises:
        ValueError: a file is missing, damaged or altered, or the cache is of other examples; names it.
    """

    def __init__(self, folder: str | Path, examples_digest: str | None = None) -> None:
        self.folder = Path(folder)
        check_sums(self.folder)
        try:
            self.info: dict[str, Any] = json.loads((self.folder / _INFO).read_text())
            self.offsets = np.load(self.folder / _OFFSETS)
            self.states = np.load(self.folder / _STATES, mmap_mode="r")
            output = load_file(self.folder / _OUTPUT)
        except (OSError, ValueError) as error:
            raise ValueError(f"teacher cache {self.folder}: unreadable ({error}); delete it and run again") from error
        if len(self.states) != self.offsets[-1]:
            raise ValueError(f"teacher cache {self.folder}: {len(self.states)} states, {self.offsets[-1]} expected")
        if examples_digest is not None and self.info["examples"] != examples_digest:
            raise ValueError(
                f"teacher cache {self.folder}: it was made from other examples or another tokenizer; delete it and run again"
            )
        self.weight_VD, self.bias_V = output["weight"], output.get("bias")

    def logits(self, rows: Tensor, device: torch.device) -> Tensor:
        """[N, V]: teacher logits at the label positions of the given examples, in their order."""
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows.tolist()]
        absent = [row for row, span in zip(rows.tolist(), spans, strict=True) if not len(span)]
        if absent:
            raise ValueError(
                f"teacher cache {self.folder}: example {absent[0]} is not in it, for it was made for a shorter training; delete it "
                "and run again"
            )
        states_ND = torch.from_numpy(self.states[np.concatenate(spans)]).to(device)
        if self.weight_VD.device != device:
            self.weight_VD = self.weight_VD.to(device)
            self.bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return torch.nn.functional.linear(states_ND.to(self.weight_VD.dtype), self.weight_VD, self.bias_V)


def _reserve(file: Path) -> None:
    """Take the blocks of a file from the disk now: a full disk would end a process that writes to mapped memory."""
    with file.open("rb+") as handle:
        os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


@torch.no_grad()
def cache_teacher(
    model: nn.Module,
    batches: list[list[int]],
    batch_of: Any,
    label_counts: list[int],
    folder: str | Path,
    info: dict[str, Any],
    device: torch.device,
) -> None:
    """Run ``model`` once over the examples of ``batches`` and write its final decoder states.

    Args:
        batches: example indices, every example that a student learns from exactly once.
        batch_of: from indices to the model's inputs with labels.
        label_counts: label tokens per example; decides where its states are stored.
        folder: created atomically.
        info: written as JSON; ``examples`` is the digest students must show.
    """
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    stored = np.zeros(len(label_counts), dtype=np.int64)
    for indices in batches:
        stored[indices] = np.asarray(label_counts, dtype=np.int64)[indices]
    offsets = np.concatenate([[0], np.cumsum(stored)])
    seen: list[Tensor] = []
    handle = output.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.eval()
    try:
        with atomic_directory(folder) as partial:
            states = np.lib.format.open_memmap(
                partial / _STATES, mode="w+", dtype=np.float32, shape=(int(offsets[-1]), output.weight.shape[1])
            )
            _reserve(partial / _STATES)
            for indices in progress(batches, "teacher"):
                batch = {name: tensor.to(device) for name, tensor in batch_of(indices).items()}
                seen.clear()
                model(**model_inputs(model, batch), use_cache=False)
                kept = seen[-1].float()
                labelled = batch["labels"] != IGNORED
                for place, index in enumerate(indices):
                    states[offsets[index] : offsets[index + 1]] = kept[place][labelled[place]].cpu().numpy()
            states.flush()
            np.save(partial / _OFFSETS, offsets)
            tensors = {"weight": output.weight.detach().cpu().clone()}
            if output.bias is not None:
                tensors["bias"] = output.bias.detach().cpu().clone()
            save_file(tensors, partial / _OUTPUT)
            (partial / _INFO).write_text(json.dumps(info, indent=2, sort_keys=True))
    finally:
        handle.remove()
