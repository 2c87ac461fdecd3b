"""Layers reduced in sequence, kept in a folder that outlives the process: the same command goes on after a kill.

After every block the folder holds the reduced layers so far, the states after the block, and what is behind. States go to
two files in turn, so that a kill while one is written finds the other as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsmoe.artefacts.atomic import write_json
from mcsmoe.calibration.files import load_tensors, save_tensors
from mcsmoe.calibration.states import States
from mcsmoe.console import log
from mcsmoe.transform.reduce import Reduced
from mcsmoe.transform.refit import RefitReport
from mcsmoe.types import ExpertWeights, Grouping, LayerId, Novices, Role

_PROGRESS = "progress.json"
_SMALL = ("expert_to_group", "dominant", "share_E", "table_E", "deleted_E")


class Unfinished:
    """What a run has done so far.

    Args:
        folder: where it is kept.
        request: all that the result depends on, as plain values; a run of another request is not gone on with.
        memory: bytes of hidden states that may be held in memory.
        weights: whether the weights of reduced layers are kept; not needed where experts stay as they are.
        needs_whole: whether states of the whole model are kept beside those of the reduced one.

    Raises:
        ValueError: a run of another request was stopped there, or its files are damaged; names the folder.
    """

    def __init__(
        self, folder: Path, request: Mapping[str, Any], memory: int, weights: bool, needs_whole: bool = False
    ) -> None:
        self.folder, self.weights = folder, weights
        self.request = json.loads(json.dumps(request))
        self.states = States(folder / "states", memory, durable=True)
        self.whole = States(folder / "whole", memory, durable=True) if needs_whole else None
        self.order: list[str] = []
        self._files: dict[LayerId, str] = {}
        self._resume()

    @property
    def layers(self) -> list[LayerId]:
        """Reduced layers, in the order in which they were."""
        return list(self._files)

    def _resume(self) -> None:
        file = self.folder / _PROGRESS
        if not file.is_file():
            return
        try:
            found = json.loads(file.read_text())
            before, self.order, self._files = found["request"], found["order"], dict(found["layers"])
            states, whole = found["states"], found["whole"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete {self.folder} and run again") from error
        for name in self.request:
            if before.get(name) != self.request[name]:
                raise ValueError(
                    f"{self.folder}: a run that was stopped there had another {name}; run the same command as then, or "
                    "delete the folder (--overwrite does)"
                )
        self.states.restore(states)
        if self.whole is not None:
            self.whole.restore(whole)
        log.info("%s: going on after %d blocks and %d sparse layers", self.folder, len(self.order), len(self._files))

    def commit(self, block: str, reduced: Mapping[LayerId, Reduced]) -> None:
        """What a block has become is kept, whatever happens to the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.order.append(block)
        for layer, one in reduced.items():
            name = f"layer-{len(self._files)}.safetensors"
            _save(self.folder / name, one, self.weights)
            self._files[layer] = name
        progress = {"request": self.request, "order": self.order, "layers": list(self._files.items())}
        whole = None if self.whole is None else self.whole.manifest()
        write_json(self.folder / _PROGRESS, progress | {"states": self.states.manifest(), "whole": whole})

    def get(self, layer: LayerId) -> Reduced:
        """A layer that was reduced; without its weights where they are not kept."""
        return _load(self.folder / self._files[layer])

    def close(self) -> None:
        """The result is complete: nothing of it is needed any more."""
        for states in (self.states, self.whole):
            if states is not None:
                states.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def unfinished(
    out: Path, request: Mapping[str, Any], memory: int, weights: bool, overwrite: bool, needs_whole: bool = False
) -> Iterator[Unfinished]:
    """What there is of ``out`` so far, beside it; gone when the context ends well, and kept when it does not.

    Args:
        overwrite: a run of another request that was stopped there is not in the way.

    Raises:
        ValueError: as ``Unfinished``.
    """
    folder = out.resolve().with_name(f"{out.name}.partial")
    try:
        run = Unfinished(folder, request, memory, weights, needs_whole)
    except ValueError:
        if not overwrite:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        run = Unfinished(folder, request, memory, weights, needs_whole)
    yield run
    run.close()


def _save(path: Path, reduced: Reduced, weights: bool) -> None:
    small = {**vars(reduced.grouping), **vars(reduced)}
    tensors: dict[str, Tensor] = {name: small[name].contiguous() for name in _SMALL if small[name] is not None}
    roles = {name: role.value for name, role in reduced.weights.roles.items()}
    plain = {
        "roles": roles if weights else {},
        "refit": None if reduced.refit is None else asdict(reduced.refit),
        "novices": reduced.novices is not None,
        "shared": list(reduced.shared),
        "expected": reduced.expected,
    }
    tensors["plain"] = torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)
    save_tensors(path, {**tensors, **(reduced.stored() if weights else {})})


def _load(path: Path) -> Reduced:
    tensors = load_tensors(path)
    plain = json.loads(bytes(tensors["plain"].tolist()))
    roles = {name: Role(value) for name, value in plain["roles"].items()}
    groups = Grouping(tensors["expert_to_group"], tensors["dominant"])
    novices = None
    if plain["novices"]:
        names = ("constant_ND", "u_NDR", "v_NRD")
        novices = Novices(**{name: tensors.get(f"novices.{name}") for name in names})  # type: ignore[arg-type]
    return Reduced(
        groups,
        tensors["share_E"],
        ExpertWeights({name: tensors[f"weights.{name}"] for name in roles}, roles),
        tensors["table_E"],
        tensors.get("deleted_E"),
        novices,
        {name: tensors[f"shared.{name}"] for name in plain["shared"]},
        None if plain["refit"] is None else RefitReport(**plain["refit"]),
        plain.get("expected"),
    )
