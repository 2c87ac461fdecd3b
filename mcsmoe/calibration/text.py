"""Calibration text of the command line: lines, or rows with ``text``, with ``input`` and ``target``, or with tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mcsmoe.train.losses import IGNORED

Batch = dict[str, Tensor]
SUFFIXES = (".txt", ".jsonl", ".parquet")
_HELP = "one text a line (.txt), or rows with text, with input and target, or with input_ids (.jsonl, .parquet)"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a calibration file, each with ``text``, with ``input`` and ``target``, or with ``input_ids``.

    Raises:
        ValueError: missing, unreadable, of another kind, or without rows; names the file and the line.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: calibration is {_HELP}")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        if file.suffix == ".txt":
            rows: list[dict[str, Any]] = [{"text": line} for line in file.read_text().splitlines() if line.strip()]
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        else:
            import pyarrow.parquet as pq

            rows = pq.read_table(file).to_pylist()
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not readable as {file.suffix[1:]} ({error})") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not ({"text", "input", "input_ids"} & set(row)):
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"{file}: row {number} has {found}; {_HELP}")
    if not rows:
        raise ValueError(f"{file}: there are no rows in it")
    return rows


def batches(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    encoder_decoder: bool,
    samples: int,
    batch_size: int,
    max_tokens: int,
    seed: int,
) -> list[Batch]:
    """Padded batches of ``samples`` rows at random, the longest first.

    A decoder-only model sees input and target as one text, all of it labelled. An encoder-decoder model sees the first
    half of a plain text in its encoder and the second in its decoder.

    Returns:
        input_ids, attention_mask [B, S] and labels [B, T] (-100 where padded), int64.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[:samples]
    pairs = [_ids(rows[row], tokenizer, encoder_decoder, max_tokens) for row in order]
    pairs = [pair for pair in pairs if pair[0] and pair[1]]
    if not pairs:
        raise ValueError("the calibration rows give no tokens; give longer texts")
    pairs.sort(key=lambda pair: -len(pair[0]))
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    return [_batch(pairs[start : start + batch_size], pad) for start in range(0, len(pairs), batch_size)]


def _batch(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded((one for one, _ in pairs), pad),
        "attention_mask": padded(([1] * len(one) for one, _ in pairs), 0),
        "labels": padded((two for _, two in pairs), IGNORED),
    }


def _ids(row: Mapping[str, Any], tokenizer: Any, encoder_decoder: bool, max_tokens: int) -> tuple[list[int], list[int]]:
    if "input_ids" in row:
        inputs = [int(token) for token in row["input_ids"]]
        labels = [int(token) for token in row.get("labels") or []]
    else:

        def encode(text: str) -> list[int]:
            found: list[int] = tokenizer(text, verbose=False)["input_ids"]
            return found

        inputs = encode(str(row.get("input", row.get("text"))))
        labels = encode(str(row["target"])) if row.get("target") else []
    if not encoder_decoder:
        inputs = (inputs + labels)[:max_tokens]
        return inputs, inputs
    if not labels:
        inputs = inputs[: 2 * max_tokens]
        half = (len(inputs) + 1) // 2
        inputs, labels = inputs[:half], inputs[half:]
    return inputs[:max_tokens], labels[:max_tokens]
