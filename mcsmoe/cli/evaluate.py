"""``mcsmoe evaluate``: how well a checkpoint predicts texts, by domain and beside the model it came from."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.cli import options

if TYPE_CHECKING:
    from mcsmoe.calibration.scores import Document
    from mcsmoe.checkpoint.streaming import Streamed

NAME = "evaluate"
HELP = """Score a checkpoint on texts: nats a token by domain, and what was lost to a reference.

The worst domain comes first. Intervals cover 95 %, by bootstrap over documents; the difference to --reference is paired,
with the divergence KL(reference, model) and the share of equal likeliest tokens. Both models run one block at a time.
"""
EXAMPLE = "mcsmoe evaluate merged --text held-out.jsonl --reference full --domain-column domain --out scores.parquet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("model", type=Path, help="checkpoint folder, stock or written by mcsmoe")
    parser.add_argument("--text", type=Path, metavar="FILE", help="documents, one a row, as in calibration")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-eval (an extra: mcsmoe[lm-eval]) by name, or folders of task files, in the place of --text; the model "
        "is in memory as a whole",
    )
    parser.add_argument(
        "--shots", type=int, help="for --tasks: examples shown before each question; else the task's own"
    )
    parser.add_argument("--reference", type=Path, metavar="MODEL", help="the model to compare with")
    parser.add_argument("--domain-column", metavar="NAME", help="field of the rows that names their domain")
    parser.add_argument("--out", type=Path, metavar="TABLE.parquet", help="also write the scores of every document")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument(
        "--card", action="store_true", help="also write the losses by domain into the model's README.md"
    )
    parser.add_argument("--samples", type=int, help="score this many rows at random; all without it")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per forward pass")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens of a row that are scored, per side")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of the bootstrap")
    parser.add_argument(
        "--continuations",
        type=int,
        default=0,
        metavar="N",
        help="continue the first halves of N documents greedily, and say how many end in a loop; each model is in memory as "
        "a whole for it",
    )
    parser.add_argument("--new-tokens", type=int, default=256, help="most tokens of a continuation")
    options.add_pass(parser)


def run(arguments: argparse.Namespace) -> None:
    """Score a checkpoint on texts."""
    out = arguments.out
    if out is not None and out.suffix != ".parquet":
        raise ValueError(f"--out is {out}; the table is written as parquet, so give a name that ends in .parquet")
    if out is not None and out.exists() and not arguments.overwrite:
        raise ValueError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    if (arguments.text is None) == (arguments.tasks is None):
        raise ValueError("give either --text FILE, whose documents are predicted, or --tasks, which are answered")
    if arguments.continuations < 0:
        raise ValueError(f"--continuations is {arguments.continuations}; give 0 or more")
    for name in ("samples", "batch_size", "max_tokens", "new_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.tasks is not None:
        _answer(arguments)
        return
    import torch

    from mcsmoe.artefacts.tables import frame_of, write_table
    from mcsmoe.calibration.scores import score
    from mcsmoe.checkpoint.card import check_card, write_losses
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.console import log
    from mcsmoe.evaluate.language import by_domain, in_words

    torch.set_num_threads(arguments.threads)
    passing = options.pass_options(arguments)
    source = Streamed(arguments.model)
    if arguments.card:
        check_card(source.folder)
    reference = None if arguments.reference is None else Streamed(arguments.reference)
    documents = _documents(source, arguments)
    rows = score(source, documents, passing, arguments.batch_size, reference)
    said = _run_on(arguments, documents, rows, passing.device)
    frame = frame_of(rows, "language")
    if out is not None:
        write_table(out, frame, "language")
    lines = [in_words(one) for one in by_domain(frame, seed=arguments.seed)]
    lines += [] if said is None else [said]
    for line in lines:
        log.info("%s", line)
    if arguments.card:
        against = "" if reference is None else f", beside `{reference.folder.name}`"
        write_losses(source.folder, [f"On `{arguments.text.name}`{against}:", "", *(f"- {line}" for line in lines)])


def _answer(arguments: argparse.Namespace) -> None:
    """Answer the tasks of the harness with the model in memory."""
    from mcsmoe.evaluate import harness

    given = ("reference", "domain_column", "continuations")
    for name in given:
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is of --text, and --tasks is given; leave one out")
    harness.require()
    harness.split_names(arguments.tasks)
    import torch

    from mcsmoe.artefacts.tables import write_table
    from mcsmoe.checkpoint.load import load_model, load_tokenizer
    from mcsmoe.console import log

    torch.set_num_threads(arguments.threads)
    found = harness.evaluate(
        load_model(arguments.model),
        load_tokenizer(arguments.model),
        arguments.tasks,
        batch_size=arguments.batch_size,
        device=getattr(arguments, "device", "auto"),
        limit=arguments.samples,
        shots=arguments.shots,
        seed=arguments.seed,
    )
    if arguments.out is not None:
        write_table(arguments.out, found, "harness")
    for row in found.to_dict("records"):
        log.info("%s", harness.in_words({str(name): value for name, value in row.items()}))


def _run_on(
    arguments: argparse.Namespace, documents: list[Document], rows: list[dict[str, Any]], device: Any
) -> str | None:
    """Say of ``rows`` how the models continue them, where ``--continuations`` asks for it; what there is to say in words."""
    from mcsmoe.checkpoint.load import load_model
    from mcsmoe.evaluate import continuations

    for row in rows:
        row |= {f"{of}{name}": float("nan") for of in ("", "reference_") for name in continuations.COLUMNS}
    if not arguments.continuations:
        return None
    texts = [one.inputs["input_ids"][0].tolist() for one in documents]
    found: list[list[dict[str, float]]] = []
    for of, folder in (("", arguments.model), ("reference_", arguments.reference)):
        if folder is None:
            continue
        model: Any = load_model(folder, device=device)
        seq2seq = bool(model.config.is_encoder_decoder)
        prompts = continuations.prompts_of(texts, arguments.continuations, seq2seq)
        answers = continuations.continued(
            model, list(prompts.values()), arguments.new_tokens, arguments.batch_size, f"{of}continuations"
        )
        found.append(continuations.columns(answers))
        for place, values in zip(prompts, found[-1], strict=True):
            rows[place] |= {f"{of}{name}": value for name, value in values.items()}
    return continuations.in_words(found[0], found[1] if len(found) > 1 else None)


def _documents(source: Streamed, arguments: argparse.Namespace) -> list[Document]:
    """Every row as a batch of its own; rows without a token to predict are left out, and counted."""
    import torch

    from mcsmoe.calibration import text
    from mcsmoe.calibration.scores import Document
    from mcsmoe.checkpoint.load import load_tokenizer
    from mcsmoe.console import log

    rows = text.read_rows(arguments.text, () if arguments.domain_column is None else (arguments.domain_column,))
    domains = _domains(arguments.text, arguments.domain_column)
    if arguments.samples is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
        rows = [rows[place] for place in sorted(order[: arguments.samples])]
    tokenizer = load_tokenizer(source.folder) if text.needs_tokenizer(rows) else None
    settings: dict[str, Any] = {
        "encoder_decoder": bool(source.model.config.is_encoder_decoder),
        "max_tokens": arguments.max_tokens,
        "vocabulary": text.vocabulary_of(source.model),
    }
    found, empty, cut = [], 0, 0
    for row in rows:
        inputs = text.encoded(row, tokenizer, **settings)
        if inputs is None:
            empty += 1
            continue
        cut += inputs["input_ids"].shape[1] == arguments.max_tokens
        found.append(Document(row.place, domains.get(row.place, "text") if domains else "text", inputs))
    if empty:
        log.log(logging.WARNING, "%d of %d rows give no tokens and are left out", empty, len(rows))
    if cut:
        log.info("%d rows have %d tokens or more: what comes after these is not scored", cut, arguments.max_tokens)
    if not found:
        raise ValueError(f"{arguments.text}: no row gives tokens to score; give longer texts")
    return found


def _domains(file: Path, column: str | None) -> dict[str, str]:
    """By the place of a row, the domain that its field ``column`` names.

    Raises:
        ValueError: the file has no such field, or a row has none; names it.
    """
    if column is None:
        return {}
    if file.suffix.lower() == ".txt":
        raise ValueError(f"--domain-column is {column!r}, but {file} has lines of text and no fields")
    if file.suffix.lower() == ".jsonl":
        from mcsmoe.data.lines import json_lines

        found = {f"{file}: line {number}": row.get(column) for number, row in json_lines(file)}
    else:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                raise ValueError(f"{file}: --domain-column is {column!r}; its columns are {names}")
            values = opened.read(columns=[column]).column(0).to_pylist()
        found = {f"{file}: row {number}": value for number, value in enumerate(values, 1)}
    for place, value in found.items():
        if value is None:
            raise ValueError(f"{place}: has no field {column!r}, which --domain-column asks for")
    return {place: str(value) for place, value in found.items()}
