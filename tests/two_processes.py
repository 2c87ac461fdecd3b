"""What the two processes of ``test_processes`` do: train the same model on shares of the same batches. Not a test module."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import tiny_switch
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mcsmoe import modules
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.compress.residual import KeptSchedule, ResidualPruner
from mcsmoe.data.collate import tokenize
from mcsmoe.train import processes
from mcsmoe.train.loop import Trainer, TrainingPlan, TrainingResult
from mcsmoe.train.objectives import TaskObjective
from mcsmoe.train.state import StateStore
from mcsmoe.train.task_specific import UsagePruner
from mcsmoe.train.tokenizer import train_tokenizer
from mcsmoe.transform.compress import CompressSettings, compress_layers
from mcsmoe.transform.layers import ModelLayers

STEPS, ROWS, SELECT_EVERY = 6, 7, 2  # rows: odd, so that the processes' shares differ
UNUSED = 2  # an expert that no token is ever sent to
VALUES = ([1.0, 3.0, 2.0], [3.0, 1.0, 2.0])  # of the selection slice, as each process sees them


def batch(step: int) -> dict[str, Tensor]:
    return tiny_switch.batch(rows=ROWS, seed=100 + step)


def plan(**changes: Any) -> TrainingPlan:
    values = {"steps": STEPS, "steps_per_epoch": STEPS, "learning_rate": 1e-3, "dropout": False, "save_every": 0}
    return TrainingPlan(**{**values, **changes})


def train(folder: Path, model: nn.Module, pruner: Any = None, **changes: Any) -> tuple[Trainer, TrainingResult]:
    adapter = adapter_for(model)
    balance, usage = 0.0 if changes.get("accumulation", 1) > 1 else 0.1, getattr(pruner, "count", None)
    values = iter(VALUES[processes.rank()])
    trainer = Trainer(
        *(
            model,
            plan(select_every=SELECT_EVERY, **changes),
            TaskObjective(adapter, balance, 0.01 * balance, usage),
            batch,
        ),
        StateStore(folder / "state", "test"),
        pruner=pruner,
        select=None if pruner else lambda _: next(values),
        selection_metric="given",
        device="cpu",
    )
    return trainer, trainer.run("test")


def with_unused_expert() -> nn.Module:
    model = tiny_switch.model()
    adapter = adapter_for(model)
    for layer in adapter.layers(model):
        adapter.mask_router(model, layer, torch.arange(6) == UNUSED)
    return model


def keep(file: Path, trainer: Trainer, result: TrainingResult, pruner: Any = None) -> None:
    """Weights, moments, curve and choice of one training, to compare with those of another."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    made = {f"model/{name}": parameter.detach() for name, parameter in trainer.model.named_parameters()}
    for parameter, moments in trainer.optimizer.state.items():
        made |= {f"{key}/{names[id(parameter)]}": torch.as_tensor(value) for key, value in moments.items()}
    curve = result.training.drop(columns="seconds").to_numpy(dtype="float64")
    made |= {"curve": torch.from_numpy(curve).nan_to_num(-1.0), "best": torch.tensor(result.best_step)}
    if isinstance(pruner, UsagePruner):
        made |= {f"alive/{layer}": alive_E for layer, alive_E in pruner.pruner.alive.items()}
        made |= {f"usage/{layer}": share_E for layer, share_E in pruner.average.frequency.items()}
    elif pruner is not None:
        made |= {f"kept/{name}": (residual != 0).any(dim=2) for name, residual in pruner.residuals.items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in made.items()}, file)


def plain(folder: Path, name: str, **changes: Any) -> None:
    keep(folder / f"{name}-{processes.rank()}.safetensors", *train(folder / name, with_unused_expert(), **changes))


def pruned(folder: Path, name: str, noise: float = 0.0) -> None:
    """Compression; with ``noise`` the second process finds other importances, as other hardware may."""
    model = tiny_switch.model()
    adapter = adapter_for(model)
    compress_layers(ModelLayers(model, adapter), CompressSettings(rank=2))
    pruner = ResidualPruner(modules.residuals(model), KeptSchedule(0.3, STEPS, 1, 1), 0.85)
    if noise and processes.rank():
        observe = pruner.observe

        def noisy() -> None:
            observe()
            for number, score in enumerate(pruner.scores.values()):
                score.mul_(1 + noise * torch.rand(score.shape, generator=torch.Generator().manual_seed(number)))

        pruner.observe = noisy  # type: ignore[method-assign]
    keep(folder / f"{name}-{processes.rank()}.safetensors", *train(folder / name, model, pruner), pruner)


def experts_fall(folder: Path, name: str) -> None:
    """Task-specific pruning of experts."""
    model = tiny_switch.model()
    adapter = adapter_for(model)
    pruner = UsagePruner(model, adapter, adapter.layers(model), experts=3, steps=STEPS, interval=2, until=0.7)
    keep(folder / f"{name}-{processes.rank()}.safetensors", *train(folder / name, model, pruner), pruner)


def refused(folder: Path, name: str, action: Any) -> None:
    try:
        action()
    except ValueError as error:
        (folder / f"{name}-{processes.rank()}.txt").write_text(str(error))


def tokens(folder: Path) -> None:
    """Tokenise the same examples into one folder at the same time, over a damaged file of the same name."""
    tokenizer = train_tokenizer(["a b c d e f"] * 4, 40, 2, lowercase=True)
    frame = pd.DataFrame({"idx": ["0", "1"], "input": ["a b c", "d e"], "target": ["a", "b"]})
    cache = folder / "tokens"
    found = []
    for _ in range(10):
        processes.summed(torch.zeros(1))  # both start together
        found.append(tokenize(frame, tokenizer, 16, 16, cache).digest)
        if processes.is_main():
            for file in cache.glob("*.npz"):
                file.write_bytes(file.read_bytes()[:100])
    (folder / f"tokens-{processes.rank()}.txt").write_text("\n".join(found))


def everything(rank: int, folder: Path, port: int) -> None:
    """All of it, in one start of two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    processes.start("cpu")
    assert processes.count() == 2
    plain(folder, "plain")
    plain(folder, "pieces", accumulation=2)
    pruned(folder, "pruned")
    pruned(folder, "noisy", noise=0.5)
    experts_fall(folder, "fallen")
    # State that only one process can see, and a batch with too few rows.
    own = folder / f"own-{rank}"
    if rank == 0:
        StateStore(own / "state", "test").save(2, {}, {})
    refused(folder, "state", lambda: train(own, tiny_switch.model()))
    few = Trainer(
        *(tiny_switch.model(), plan(), TaskObjective(adapter_for(tiny_switch.model()))),
        lambda _: tiny_switch.batch(rows=1),
        StateStore(folder / "few", "test"),
        device="cpu",
    )
    refused(folder, "few", lambda: few.run("test"))
    tokens(folder)
    processes.end()


if __name__ == "__main__":
    everything(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
