"""``mcsmoe recover``: train a reduced model on text until it is nearer to the full one."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe.cli import options
from mcsmoe.methods import HEALED

NAME = "recover"
HELP = """Heal a merged, pruned or compressed checkpoint on text, by its divergence from the model it came from.

The full model runs once over the text and its final states are kept; then the reduced one is trained on the divergence of
its predictions. A fifth of the text is held out: without a gain there, the weights stay as they were. Routers alone are
quick and safe; adapters are of low rank, on everything but the experts, and become part of the weights.
"""
EXAMPLE = "mcsmoe recover pruned --teacher full --text text.jsonl --train adapters --steps 200 --out healed"
_SETTINGS = ("train", "steps", "learning_rate", "rank", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder to heal")
    parser.add_argument("--teacher", type=Path, required=True, metavar="MODEL", help="the model that it came from")
    options.add_out(parser)
    group = parser.add_argument_group("text")
    group.add_argument("--text", type=Path, required=True, metavar="FILE", help="text, as in calibration")
    options.add_rows(group, "rows drawn from the file")
    group = parser.add_argument_group("training")
    group.add_argument("--train", choices=HEALED, default="routers", help="what is trained")
    group.add_argument("--steps", type=int, default=100, help="steps of the optimiser, a batch each")
    group.add_argument(
        "--learning-rate", type=float, help="peak of the learning rate; what suits --train if none is given"
    )
    group.add_argument("--rank", type=int, default=16, help="of the adapters")
    group.add_argument(
        "--device", default="auto", help="where to train: auto (an accelerator if there is one), cpu, cuda"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train and write the healed checkpoint."""
    arguments.calibration = arguments.text
    options.prepare(arguments)
    import tempfile

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.atomic import atomic_directory
    from mcsmoe.checkpoint.companions import copy_companions
    from mcsmoe.checkpoint.load import load_model
    from mcsmoe.checkpoint.save import save_model
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.cli._calibration import batches
    from mcsmoe.cli._outputs import EXPERTS, GROUPS, copy_beside
    from mcsmoe.console import log
    from mcsmoe.train.healing import Healing, heal, keep_states, numbered

    settings = {name: getattr(arguments, name) for name in _SETTINGS}
    healing = Healing(**settings, device=arguments.device)
    source, full = Streamed(arguments.model), Streamed(arguments.teacher)
    if source.model.config.get_text_config().vocab_size != full.model.config.get_text_config().vocab_size:
        raise ValueError(f"--teacher {arguments.teacher}: has another vocabulary; give the model that it came from")
    rows = numbered(batches(source, arguments))
    if len(rows) < 2:
        raise ValueError(
            f"--text {arguments.text}: gives one batch, of which none could be held out; lower --batch-size"
        )
    origin, folder = source.origin, source.folder
    arguments.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".healing-", dir=arguments.out.resolve().parent) as work:
        states = Path(work) / "states"
        keep_states(load_model(full.folder), rows, states, arguments.device)
        model = load_model(folder)
        found = heal(model, adapter_for(model), rows, states, healing)
        log.info(
            "divergence from the full model on held-out rows: %.4f nats a token, %.4f after training; %s",
            *(found.before, found.after, "kept" if found.kept else "the weights stay as they were"),
        )
        provenance = {"stage": "recover", "tool": "mcsmoe recover", "settings": settings, **origin}
        with atomic_directory(arguments.out) as written:
            inner = written / ".healed"
            save_model(model.cpu(), inner, provenance=provenance)
            for file in inner.iterdir():
                file.replace(written / file.name)
            inner.rmdir()
            copy_companions(folder, written)
            for name in (GROUPS, EXPERTS):
                copy_beside(name, folder, written)
