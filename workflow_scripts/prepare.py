"""Take a Mixture-of-Experts checkpoint, or build a model, train its tokenizer and pre-train it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mcsmoe import console
from mcsmoe.workflow import options
from mcsmoe.workflow.schema import fill, section

EXAMPLE = (
    "python workflow_scripts/prepare.py --corpus files --files wikitext/train.parquet --steps 1000 "
    "--model base --training base.parquet --state .state/base"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--checkpoint", help="folder or hub name of a model to take as it is")
    parser.add_argument("--dense", action="store_true", help="take or build a model without experts, to compare with")
    parser.add_argument("--corpus-seed", type=int, default=0, help="of the generated corpus")
    parser.add_argument("--examples", type=Path, nargs="*", default=[], help="examples to train on as text")
    parser.add_argument("--architecture", type=json.loads, default={}, help="fields of the model's configuration, JSON")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--model", type=Path, required=True, help="written: checkpoint folder")
    parser.add_argument("--training", type=Path, required=True, help="written: training curve")
    parser.add_argument("--state", type=Path, required=True, help="folder of the state to resume from")
    scale = section("model")["residual_scale"]
    parser.add_argument("--residual-scale", type=float, default=scale["default"], help=scale["description"])
    near = section("model")["near_heads"]
    parser.add_argument(
        "--near-heads", action=argparse.BooleanOptionalAction, default=near["default"], help=near["description"]
    )
    options.add_section(parser, "pretrain")
    for key, part in section("model")["tokenizer"]["properties"].items():
        kind = {"integer": int}.get(part["type"])
        flag = "--" + key.replace("_", "-")
        if kind is None:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=part["default"], help=part["description"]
            )
        else:
            parser.add_argument(flag, type=kind, default=part["default"], help=part["description"])
    return parser.parse_args()


def take(arguments: argparse.Namespace) -> None:
    """Load the given checkpoint, which checks it, and write it where the workflow expects it."""
    from mcsmoe.artefacts import tables
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.checkpoint.save import save_model

    if console.rank() > 0:
        return  # nothing is trained, so the processes have nothing to share
    model = load_model(arguments.checkpoint, dense=arguments.dense)
    tokenizer = load_tokenizer(arguments.checkpoint)
    tables.write_table(arguments.training, tables.empty("training"), "training")
    save_model(model, arguments.model, tokenizer, provenance={"checkpoint": str(arguments.checkpoint)})


def texts(arguments: argparse.Namespace) -> list[str]:
    """The corpus, one paragraph an entry."""
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.data import sources
    from mcsmoe.data.sequences import is_text

    source: dict[str, Any] = {"kind": "synthetic"}
    if arguments.corpus == "files":
        source = {"kind": "files", "files": arguments.files, "column": arguments.column}
    found = [] if arguments.corpus == "tasks" else list(sources.corpus(source, arguments.corpus_seed))
    for file in arguments.examples:
        rows = read_table(file, "examples")
        found += (rows["input"] + rows["target"] if is_text(rows) else rows["input"]).tolist()
    return found


def stream_of(tokenizer: Any, corpus: list[str], order: list[int], end: int) -> Any:
    """Tokens of all texts in that order, each closed by the end token."""
    import numpy as np

    encoded = tokenizer([corpus[place] for place in order], verbose=False)["input_ids"]
    closed = [ids if ids and ids[-1] == end else [*ids, end] for ids in encoded]
    return np.concatenate([np.asarray(ids, dtype=np.int64) for ids in closed])


def encoder_decoder(
    arguments: argparse.Namespace, architecture: dict[str, Any], corpus: list[str], order: list[int]
) -> tuple[Any, Any, Any]:
    """A Switch Transformer, or one without experts, its tokenizer, and batches of corrupted spans."""
    from mcsmoe.train.pretrain import SpanCorruption, build_dense, build_switch
    from mcsmoe.train.tokenizer import sentinel_ids, train_tokenizer

    tokenizer = train_tokenizer(corpus, arguments.vocab_size, arguments.sentinels, arguments.lowercase)
    made = build_dense if arguments.dense else build_switch
    model = made(architecture, len(tokenizer), arguments.seed, arguments.near_heads, arguments.residual_scale)
    end = int(tokenizer.eos_token_id)
    batches = SpanCorruption(
        stream_of(tokenizer, corpus, order, end),
        arguments.window,
        arguments.batch_size,
        sentinel_ids(tokenizer),
        end,
        arguments.density,
        arguments.mean_span,
        arguments.seed,
    )
    return model, tokenizer, batches


def decoder_only(
    arguments: argparse.Namespace, architecture: dict[str, Any], corpus: list[str], order: list[int]
) -> tuple[Any, Any, Any]:
    """A decoder-only model, its tokenizer, and batches of windows whose next tokens are asked for."""
    from mcsmoe.train.decoder import NextToken, build_decoder, train_byte_tokenizer

    if arguments.dense:
        raise ValueError(f"no dense model is built like one of family {architecture['family']!r}; give --checkpoint")
    tokenizer = train_byte_tokenizer(corpus, arguments.vocab_size)
    end, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    model = build_decoder(architecture, len(tokenizer), max(2048, arguments.window), arguments.seed, end, pad)
    stream = stream_of(tokenizer, corpus, order, end)
    return model, tokenizer, NextToken(stream, arguments.window, arguments.batch_size, arguments.seed)


def build(arguments: argparse.Namespace) -> None:
    """Train a tokenizer and a model on the corpus."""
    import numpy as np
    import torch

    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.checkpoint.save import save_model
    from mcsmoe.train import processes
    from mcsmoe.train.decoder import FAMILIES
    from mcsmoe.train.loop import Trainer
    from mcsmoe.train.objectives import TaskObjective
    from mcsmoe.train.stages import plan_of, signature
    from mcsmoe.train.state import StateStore

    torch.set_num_threads(arguments.threads)
    processes.start(arguments.device)
    settings = options.settings(arguments, "pretrain")
    architecture = fill(arguments.architecture, section("model")["architecture"])
    corpus = texts(arguments)
    order = np.random.default_rng(arguments.seed).permutation(len(corpus)).tolist()
    start = decoder_only if architecture["family"] in FAMILIES else encoder_decoder
    model, tokenizer, batches = start(arguments, architecture, corpus, order)
    console.log.info(
        "corpus: %d texts, %d tokens; vocabulary: %d; model: %.2f M parameters",
        *(len(corpus), len(batches.stream), len(tokenizer), sum(p.numel() for p in model.parameters()) / 1e6),
    )
    plan = plan_of({**settings, "select_every": 0}, batches.windows, arguments.seed)
    files = [Path(file) for file in arguments.files] + arguments.examples
    made_from = signature(__file__, files, processes=processes.count(), **vars(arguments))
    store = StateStore(arguments.state, made_from)
    adapter = None if arguments.dense else adapter_for(model)
    objective = TaskObjective(adapter, arguments.balance_weight, arguments.z_weight)
    result = Trainer(model, plan, objective, batches.batch, store, device=arguments.device).run("pre-train")
    if processes.is_main():
        write_table(arguments.training, result.training, "training")
        about = {"pretrain": settings, "seed": arguments.seed}
        save_model(model.cpu(), arguments.model, tokenizer, provenance=about)
        store.clear()
    processes.end()


def main(arguments: argparse.Namespace) -> None:
    if arguments.checkpoint:
        take(arguments)
    else:
        build(arguments)


if __name__ == "__main__":
    console.run(main, parse())
