"""Statistics of a checkpoint into a folder, in one layer-major pass that a kill does not undo."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcsmoe.artefacts.atomic import explained, write_json
from mcsmoe.calibration import folder as statistics_folder
from mcsmoe.calibration.layer_major import Block, DomainBatch, LayerMajor, Options
from mcsmoe.calibration.states import States
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.console import log
from mcsmoe.types import Batch

_PROGRESS, _LOCK, _REQUEST = "progress.json", "lock", "request.json"


@dataclass(frozen=True)
class Domain:
    """Calibration rows of one kind."""

    name: str
    batches: list[Batch]
    weight: float | None = None  # share of the tokens in the blend; None for every token once


def identity(source: Streamed) -> str:
    """SHA-256 over the configuration and the headers and sizes of the weights: no weight is read for it."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    for name, file in sorted(source.tensors.files.items()):
        with file.path.open("rb") as handle:
            length = handle.read(8)
            digest.update(name.encode() + length + handle.read(int.from_bytes(length, "little")))
        digest.update(str(file.path.stat().st_size).encode())
    return digest.hexdigest()


class _Run:
    """A pass whose finished layers are in ``partial``, beside the folder that it becomes."""

    def __init__(self, source: Streamed, domains: Sequence[Domain], out: Path, options: Options) -> None:
        self.source, self.domains, self.out, self.options = source, domains, out, options
        self.partial = out.with_name(f"{out.name}.partial")
        encoder_decoder = bool(source.model.config.is_encoder_decoder)
        self.described: dict[str, Any] = {
            "version": statistics_folder.VERSION,
            "model": source.tensors.fingerprint,
            "architecture": type(source.model).__name__,
            "layers": {layer: statistics_folder.layer_file(number) for number, layer in enumerate(source.layers)},
            "domains": {
                domain.name: {
                    "weight": domain.weight,
                    "rows": sum(batch["input_ids"].shape[0] for batch in domain.batches),
                    "tokens": sum(statistics_folder.tokens_of(batch, encoder_decoder) for batch in domain.batches),
                    "sha256": statistics_folder.digest_of(domain.batches),
                }
                for domain in domains
            },
            "settings": {
                "reservoir": options.reservoir,
                "seed": options.seed,
                "device": str(options.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }
        changed = [file.path.stat().st_mtime_ns for _, file in sorted(source.tensors.files.items())]
        self.request = self.described | {"files": identity(source), "changed": changed, "outputs": options.outputs}
        self.start_anew()

    def start_anew(self) -> None:
        """Nothing is done yet."""
        self.convergence: dict[str, float] = {}
        self.done: list[str] = []
        self.order: list[str] = []
        self.states = States(self.partial, self.options.cache_memory, durable=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes into the same folder."""
        self.partial.mkdir(parents=True, exist_ok=True)
        with (self.partial / _LOCK).open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"{self.partial}: another process is collecting into it; wait for it") from error
            yield

    def finished(self) -> bool:
        """Whether a run that says so (``finish``) has ended well, and was of the same request.

        Raises:
            ValueError: as ``resume``.
        """
        file = self.out / _REQUEST
        if not file.is_file():
            return False
        try:
            before = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: damaged ({error}); delete {self.out} and run again") from error
        self._check_same(self.out, before)
        return True

    def _check_same(self, folder: Path, before: Any) -> None:
        request = json.loads(json.dumps(self.request))
        for name in request:
            if not isinstance(before, dict) or before.get(name) != request[name]:
                raise ValueError(
                    f"{folder}: a run that was stopped there had another {name}; run the same command as then, "
                    "or delete the folder (--overwrite does)"
                )

    def resume(self) -> None:
        """Go on where a killed run stopped, if there was one.

        Raises:
            ValueError: it was of another model, of other rows or settings; names the first difference.
        """
        file = self.partial / _PROGRESS
        if not file.is_file():
            return
        try:
            found = json.loads(file.read_text())
            before = found["request"]
            order, done, convergence = found["order"], found["done"], found["convergence"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete {self.partial} and run again") from error
        self._check_same(self.partial, before)
        self.order, self.done, self.convergence = order, done, convergence
        self.states.restore(found["states"])
        log.info("%s: going on after %d blocks and %d sparse layers", self.partial, len(order), len(done))

    def commit(self, block: Block) -> None:
        """What this block has found is kept, whatever happens to the process."""
        self.order.append(block.path)
        for layer, domains in block.layers.items():
            halves = block.halves.get(layer)
            path = self.partial / self.described["layers"][layer]
            statistics_folder.write_layer(path, layer, domains, halves)
            self.done.append(layer)
            if halves is not None:
                self.convergence[layer] = halves.overlap(max(1, halves.tokens_2E.shape[1] // 2))
        progress = {
            "request": self.request,
            "order": self.order,
            "done": self.done,
            "convergence": self.convergence,
            "states": self.states.manifest(),
        }
        write_json(self.partial / _PROGRESS, progress)

    def finish(self, say_request: bool) -> None:
        """The folder is complete and takes its place; with ``say_request`` it holds what ``finished`` asks for."""
        described = self.described | {"convergence": self.convergence}
        self.states.close()
        write_json(self.partial / statistics_folder.DESCRIPTION, described)
        wanted = {statistics_folder.DESCRIPTION, _PROGRESS, *self.described["layers"].values()}
        if say_request:
            write_json(self.partial / _REQUEST, self.request)
            wanted.add(_REQUEST)
        for path in self.partial.iterdir():
            if path.name not in wanted and path.is_file():
                path.unlink()
        (self.partial / _PROGRESS).unlink(missing_ok=True)
        replaced = self.out.with_name(f".{self.out.name}.replaced")
        if self.out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.replace(replaced)
        self.partial.replace(self.out)
        shutil.rmtree(replaced, ignore_errors=True)


def collect(
    source: Streamed,
    domains: Sequence[Domain],
    out: str | Path,
    options: Options,
    overwrite: bool = False,
    reuse: bool = False,
) -> None:
    """Collect the statistics of all sparse layers into the folder ``out``.

    Killed anywhere, the same call goes on after the last block that was finished, and ends with the same bits.

    Args:
        overwrite: a run of another request that was stopped there is not in the way.
        reuse: the folder is a step on the way to something else; if it is complete, there is nothing to do.

    Raises:
        ValueError: no rows, two domains of one name, a stopped run of other settings in the way, or what the pass says.
    """
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise ValueError(f"two domains are called {max(names, key=names.count)!r}; name them apart")
    run = _Run(source, domains, Path(out), options)
    with explained(out), run.locked():
        try:
            if reuse and run.finished():
                log.info("%s: complete; going on with it", run.out)
                shutil.rmtree(run.partial, ignore_errors=True)
                return
            run.resume()
        except ValueError:
            if not overwrite:
                raise
            _clear(run.partial)
            run.start_anew()
        batches = [DomainBatch(domain.name, inputs) for domain in domains for inputs in domain.batches]
        major = LayerMajor(source, batches, run.states, options, start=run.order, done=run.done)
        total = sum(len(blocks) for blocks in major.replay.stacks.values())
        started, first = time.monotonic(), len(run.order)
        with major.open():
            for block in major.blocks():
                run.commit(block)
                _say(block, major, total, (time.monotonic() - started) / (len(run.order) - first))
        run.finish(say_request=reuse)
    if run.convergence:
        share = sum(run.convergence.values()) / len(run.convergence)
        worst = min(run.convergence, key=lambda layer: run.convergence[layer])
        log.info(
            "two halves of the rows agree on %.1f %% of the experts if half of them are kept by saliency (least, %.1f %%, "
            "in %s); more rows bring them closer",
            100 * share,
            100 * run.convergence[worst],
            worst,
        )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _say(block: Block, major: LayerMajor, total: int, seconds: float) -> None:
    rest = time.strftime("%H:%M:%S", time.gmtime(seconds * max(0, total - block.number - 1)))
    log.info(
        "block %d of %d (%s): %.1f rows/s, %.2f GB read, %s left at most",
        block.number + 1,
        total,
        block.path,
        major.rows / max(block.seconds, 1e-9),
        major.bytes_read / 1e9,
        rest,
    )
