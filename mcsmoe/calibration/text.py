"""Calibration rows as tokens in padded batches, every id checked against the model's vocabulary."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mcsmoe.calibration.rows import Row, read_rows
from mcsmoe.data.vocabulary import check_ids, vocabulary_of
from mcsmoe.types import IGNORED, Batch

__all__ = ["Batch", "Row", "batches", "encoded", "needs_tokenizer", "read_rows", "vocabulary_of"]

log = logging.getLogger(__name__)
_TEMPLATE_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, ImportError)


def needs_tokenizer(rows: Sequence[Row]) -> bool:
    """Whether some row is not token ids already."""
    return any("input_ids" not in row.fields for row in rows)


def batches(
    rows: Sequence[Row],
    tokenizer: Any,
    encoder_decoder: bool,
    samples: int,
    batch_size: int,
    max_tokens: int,
    seed: int,
    vocabulary: int | None = None,
    pack: int | None = None,
) -> list[Batch]:
    """Padded batches of ``samples`` rows at random, the longest first.

    A decoder-only model sees input and target as one text, all of it labelled. An encoder-decoder model sees the first
    half of a plain text in its encoder and the second in its decoder. Messages are written by the tokenizer's chat
    template. Rows that give no tokens are left out, and counted in a line of the log.

    Args:
        max_tokens: most tokens of a row that are used, on each side of an encoder-decoder model.
        vocabulary: how many embeddings the model has; None checks no token against it.
        pack: join the texts, an end token behind each, and cut them to rows of so many tokens, so that none is padded;
            ``max_tokens`` has no part in it. What is left at the end is a row only if it is the only one.

    Returns:
        input_ids, attention_mask [B, S] and labels [B, T] (-100 where padded), int64.

    Raises:
        ValueError: a token that the model has no embedding for, messages that the chat template refuses, no tokens at
            all, or rows to pack for an encoder-decoder model; names the file and the row.
    """
    if pack is not None and encoder_decoder:
        raise ValueError("--pack joins texts to one, and an encoder-decoder model reads two; leave it out")
    if vocabulary is not None:
        for row in rows:
            for name in ("input_ids", "labels"):
                check_ids(row.fields.get(name, ()), vocabulary, f"{row.place}: field {name!r}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[:samples]
    found = [_sides(rows[number], tokenizer, encoder_decoder, vocabulary) for number in order]
    pairs = [_cut(*sides, encoder_decoder, max_tokens if pack is None else sys.maxsize) for sides in found]
    kept = [pair for pair in pairs if pair[0] and pair[1]]
    if not kept:
        raise ValueError(f"{rows[order[0]].place} and all others drawn give no tokens; give longer texts")
    if len(kept) < len(pairs):
        log.info("%d of %d calibration rows give no tokens and are left out", len(pairs) - len(kept), len(pairs))
    if pack is not None:
        kept = [(row, row) for row in packed([ids for ids, _ in kept], pack, getattr(tokenizer, "eos_token_id", None))]
    kept.sort(key=lambda pair: -len(pair[0]))
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    # Padding is masked, but has to be embedded all the same.
    pad = 0 if vocabulary is not None and pad >= vocabulary else pad
    return [_batch(kept[start : start + batch_size], pad) for start in range(0, len(kept), batch_size)]


def packed(texts: Iterable[Sequence[int]], length: int, end: int | None) -> list[list[int]]:
    """Token ids of ``texts`` one behind the other, ``end`` after each that does not end so, cut to rows of ``length``.

    The last tokens, too few for a row, are left out unless there is no other row.
    """
    stream: list[int] = []
    for ids in texts:
        stream += ids
        if end is not None and stream[-1] != end:
            stream.append(end)
    whole = len(stream) - len(stream) % length
    return [stream[start : start + length] for start in range(0, whole, length)] or [stream]


def encoded(
    row: Row, tokenizer: Any, encoder_decoder: bool, max_tokens: int, vocabulary: int | None = None
) -> Batch | None:
    """One row as a batch of its own, with arguments, fields and errors as in ``batches``; None if it gives no tokens."""
    if vocabulary is not None:
        for name in ("input_ids", "labels"):
            check_ids(row.fields.get(name, ()), vocabulary, f"{row.place}: field {name!r}")
    pair = _cut(*_sides(row, tokenizer, encoder_decoder, vocabulary), encoder_decoder, max_tokens)
    return _batch([pair], 0) if pair[0] and pair[1] else None


def _batch(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded((one for one, _ in pairs), pad),
        "attention_mask": padded(([1] * len(one) for one, _ in pairs), 0),
        "labels": padded((two for _, two in pairs), IGNORED),
    }


def _cut(inputs: list[int], labels: list[int], encoder_decoder: bool, max_tokens: int) -> tuple[list[int], list[int]]:
    """What the two sides of the model are given."""
    if not encoder_decoder:
        inputs = (inputs + labels)[:max_tokens]
        return inputs, inputs
    if not labels:
        inputs = inputs[: 2 * max_tokens]
        half = (len(inputs) + 1) // 2
        inputs, labels = inputs[:half], inputs[half:]
    return inputs[:max_tokens], labels[:max_tokens]


# -- tokens ------------------------------------------------------------------------------------------------------
def _sides(row: Row, tokenizer: Any, encoder_decoder: bool, vocabulary: int | None) -> tuple[list[int], list[int]]:
    """Token ids of a row's input and of its target, if it has one."""
    fields = row.fields
    if "input_ids" in fields:
        labels = [] if fields.get("repeated") and not encoder_decoder else fields["labels"]
        if IGNORED in labels:
            raise ValueError(
                f"{row.place}: field 'labels' has {IGNORED} before its end; give the ids of the target alone"
            )
        return fields["input_ids"], labels

    def encode(text: str, **how: Any) -> list[int]:
        if not text.strip():
            return []  # also where the tokenizer would add a special token
        found: list[int] = tokenizer(text, verbose=False, **how)["input_ids"]
        if vocabulary is not None:
            check_ids(found, vocabulary, f"{row.place}: its text", tokenizer)
        return found

    if "messages" in fields:
        # The template writes the special tokens itself.
        return encode(_chat(row, tokenizer), add_special_tokens=False) if fields["messages"] else [], []
    if "prompt" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if not encoder_decoder:
            return encode(prompt + completion), []
        return encode(prompt), encode(completion)
    return encode(fields["text"] if "text" in fields else fields["input"]), encode(fields.get("target", ""))


def _chat(row: Row, tokenizer: Any) -> str:
    """The text of a row of messages.

    Raises:
        ValueError: the tokenizer has no chat template, or it does not take these messages; names the row.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{row.place}: has messages, but the tokenizer has no chat template; give rows of text instead"
        )
    try:
        found = tokenizer.apply_chat_template(
            row.fields["messages"], tools=row.fields.get("tools"), tokenize=False, add_generation_prompt=False
        )
    except (TemplateError, RecursionError, *_TEMPLATE_ERRORS) as error:
        raise ValueError(
            f"{row.place}: the tokenizer's chat template does not take its messages ({' '.join(str(error).split())}); "
            "correct the row"
        ) from error
    return str(found)
