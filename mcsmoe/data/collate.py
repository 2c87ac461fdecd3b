"""Tokens of a table of examples, once and flat, and batches of them by length.

A batch is a function of (tokens, seed, step) alone, so that a training that resumes sees the batches it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcsmoe.artefacts.atomic import atomic_file
from mcsmoe.data.sequences import is_text, sequences, special_tokens
from mcsmoe.data.vocabulary import check_ids, check_rows
from mcsmoe.types import IGNORED, Batch

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
Ids = NDArray[np.int32]
Offsets = NDArray[np.int64]

_MEGA = 50  # batches sorted by length together: enough to pad little, few enough to keep the order random


@dataclass(frozen=True)
class Tokenised:
    """Token ids of N examples, one after another, end tokens included.

    Attributes:
        input_ids: [sum of input lengths] int32; example i is ``input_ids[input_offsets[i]:input_offsets[i + 1]]``.
        label_ids: likewise, of the targets; of a decoder-only model the token after each, -100 where none is asked for.
        pad: id that pads inputs.
        truncated: how many inputs were cut to the limit.
    """

    input_ids: Ids
    input_offsets: Offsets
    label_ids: Ids
    label_offsets: Offsets
    pad: int
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.input_offsets) - 1

    @cached_property
    def input_lengths(self) -> Offsets:
        """[N] tokens of each input."""
        return np.diff(self.input_offsets)

    @cached_property
    def label_lengths(self) -> Offsets:
        """[N] tokens of each target."""
        return np.diff(self.label_offsets)

    @cached_property
    def label_counts(self) -> Offsets:
        """[N] tokens that are asked for."""
        return np.add.reduceat(self.label_ids != IGNORED, self.label_offsets[:-1], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all tokens, to tell whether something made from examples was made from these."""
        found = hashlib.sha256()
        for array in (self.input_ids, self.input_offsets, self.label_ids, self.label_offsets):
            found.update(np.ascontiguousarray(array).tobytes() + b"\0")
        return found.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write all fields to one ``.npz`` file, atomically."""
        with atomic_file(path) as partial, partial.open("wb") as handle:
            np.savez(handle, allow_pickle=False, **{field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def load(path: str | Path) -> Tokenised:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is missing, damaged or something else; names it.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {field.name: stored[field.name] for field in fields(Tokenised)}
        except Exception as error:
            raise ValueError(
                f"{path}: not readable as tokenised examples ({error}); delete it and run again"
            ) from error
        made: dict[str, Any] = {name: int(array) if array.ndim == 0 else array for name, array in arrays.items()}
        return Tokenised(**made)


# -- tokens ------------------------------------------------------------------------------------------------------
def tokenize(
    examples: pd.DataFrame,
    tokenizer: Any,
    max_input: int,
    max_label: int,
    cache: str | Path | None = None,
    *,
    vocabulary: int | None = None,
    where: object = "examples",
    causal: bool = False,
) -> Tokenised:
    """Tokens of table ``examples``, as ``mcsmoe.data.sequences`` says; answers are closed by one end token.

    Args:
        max_input: longest input, end token included; longer ones lose what is last, and are counted and reported.
        max_label: longest target, end token included; a longer one cannot be learnt and is an error.
        cache: folder where the tokens are kept, under a name that follows from the texts, the tokenizer and the limits,
            and are looked for before anything is tokenised.
        vocabulary: how many embeddings the model has; None checks no token against it.
        where: the file that the examples are from, for messages.
        causal: whether the model is decoder-only.

    Raises:
        ValueError: a target over ``max_label``, no examples, a tokenizer without pad or end token, or a token that the
            model has no embedding for; names the file, the example and the token.
    """
    special = special_tokens(tokenizer, causal)
    if vocabulary is not None:
        check_ids(special, vocabulary, "the tokenizer", tokenizer)
    if not len(examples):
        raise ValueError("there are no examples to tokenise; give a split with rows")
    form = (causal, is_text(examples))
    key = None if cache is None else _key(examples, tokenizer, (max_input, max_label, *special, *form))
    path = None if cache is None or key is None else Path(cache) / f"tokens-{key}.npz"
    made = _stored(path)
    if made is None:
        found = sequences(examples, tokenizer, max_input, max_label, special, causal)
        made = Tokenised(*_flat(found.inputs), *_flat(found.labels), special.pad, found.truncated)
        if path is not None:
            made.save(path)
    if vocabulary is not None:
        sides = ((made.input_ids, made.input_offsets), (made.label_ids, made.label_offsets))
        for ids, offsets in sides:
            check_rows(ids, offsets, examples["idx"], vocabulary, str(where), tokenizer)
    if made.truncated:
        log.info("%d of %d inputs are longer than %d tokens and were cut", made.truncated, len(made), max_input)
    return made


def _stored(path: Path | None) -> Tokenised | None:
    if path is None or not path.is_file():
        return None
    try:
        return Tokenised.load(path)
    except ValueError as error:
        log.warning("kept tokens are damaged and are made anew: %s", error)
        return None


def _key(examples: pd.DataFrame, tokenizer: Any, settings: tuple[int, ...]) -> str | None:
    """Digest of everything the tokens follow from; None for a tokenizer that cannot be written down."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # What the last call cut and padded to is left in the tokenizer, and is no part of it.
    parts = {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")}
    found = hashlib.sha256(json.dumps([type(tokenizer).__name__, settings, parts], sort_keys=True).encode())
    for column in ("input", "target"):
        for text in examples[column]:
            found.update(str(len(text)).encode() + b"\0" + text.encode())
    return found.hexdigest()[:24]


def _flat(rows: list[list[int]]) -> tuple[Ids, Offsets]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1])), offsets


# -- batches -----------------------------------------------------------------------------------------------------
def _padded(ids: Ids, offsets: Offsets, rows: Offsets, fill: int) -> Tensor:
    """[B, longest] int64: the given rows, padded on the right."""
    lengths = offsets[rows + 1] - offsets[rows]
    made = np.full((len(rows), int(lengths.max())), fill, dtype=np.int64)
    inside = np.arange(made.shape[1]) < lengths[:, None]
    positions = offsets[rows][:, None] + np.arange(made.shape[1])
    made[inside] = ids[positions[inside]]
    return torch.from_numpy(made)


def collate(tokenised: Tokenised, indices: Sequence[int] | Offsets) -> Batch:
    """The model's inputs for the given examples.

    Returns:
        input_ids [B, S] and attention_mask [B, S] int64; labels [B, T] int64, -100 where padded; row [B] int64: the
        examples' indices.
    """
    rows = np.asarray(indices, dtype=np.int64)
    input_ids = _padded(tokenised.input_ids, tokenised.input_offsets, rows, tokenised.pad)
    lengths = torch.from_numpy(tokenised.input_lengths[rows])
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "labels": _padded(tokenised.label_ids, tokenised.label_offsets, rows, IGNORED),
        "row": torch.from_numpy(rows),
    }


class TaskBatches:
    """Training batches: every example once an epoch, examples of a batch about as long, batches in random order.

    Where ``batch_size`` does not divide the examples, batches are smaller by at most one example.
    """

    def __init__(self, tokenised: Tokenised, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.tokenised, self.batch_size, self.seed = tokenised, batch_size, seed
        self.steps_per_epoch = -(-len(tokenised) // batch_size)
        self._epoch: tuple[int, list[Offsets]] = (-1, [])

    def indices(self, step: int) -> Offsets:
        """Examples of step ``step`` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][place]

    def _shuffled(self, epoch: int) -> list[Offsets]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.tokenised))
        pieces = []
        for number, start in enumerate(range(0, len(order), self.batch_size * _MEGA)):
            piece = order[start : start + self.batch_size * _MEGA]
            piece = piece[np.lexsort((self.tokenised.label_lengths[piece], self.tokenised.input_lengths[piece]))]
            # Up, then down: a batch that straddles two pieces has examples of one length all the same.
            pieces.append(piece[::-1] if number % 2 else piece)
        batches = np.array_split(np.concatenate(pieces), self.steps_per_epoch)
        return [batches[place] for place in rng.permutation(self.steps_per_epoch)]

    def batch(self, step: int) -> Batch:
        """The whole batch of step ``step`` (from 0); see ``collate``."""
        return collate(self.tokenised, self.indices(step))


def evaluation_batches(tokenised: Tokenised, batch_size: int, rows: Collection[int] | None = None) -> list[list[int]]:
    """Examples of each batch, every example once, longest first, so that memory runs out at once or not at all.

    Args:
        rows: only these examples.
    """
    order = np.lexsort((-tokenised.label_lengths, -tokenised.input_lengths))
    if rows is not None:
        order = order[np.isin(order, np.fromiter(rows, dtype=np.int64))]
    return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]


def calibration_batches(tokenised: Tokenised, samples: int, batch_size: int, seed: int) -> list[Batch]:
    """Batches of ``samples`` examples at random (all where there are fewer), each once, by length.

    Raises:
        ValueError: no samples are asked for.
    """
    if samples < 1:
        raise ValueError(f"calibration.samples is {samples}; at least 1 is needed")
    chosen = np.random.default_rng((seed, 2)).permutation(len(tokenised))[:samples]
    chosen = chosen[np.lexsort((chosen, -tokenised.label_lengths[chosen], -tokenised.input_lengths[chosen]))]
    return [collate(tokenised, chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]


def domain_batches(
    tokenised: Tokenised,
    groups: Sequence[str],
    samples: int,
    batch_size: int,
    seed: int,
    mixture: Mapping[str, float] | None = None,
) -> list[tuple[str, Batch]]:
    """(domain, batch) of ``samples`` examples at random, each once and every batch of one domain.

    Args:
        groups: by example its domain.
        mixture: by domain its share of the samples; None takes examples of all as they come, as domain ``all``.

    Raises:
        ValueError: no samples are asked for, or a domain of the mixture that no example has; names it.
    """
    if samples < 1:
        raise ValueError(f"calibration.samples is {samples}; at least 1 is needed")
    order = np.random.default_rng((seed, 2)).permutation(len(tokenised))
    chosen: dict[str, Offsets] = {"all": order[:samples]}
    if mixture is not None:
        names = np.asarray(groups)[order]
        total = sum(mixture.values())
        chosen = {}
        for domain, share in sorted(mixture.items()):
            rows = order[names == domain]
            if not len(rows) or not total:
                raise ValueError(
                    f"mixture names domain {domain!r}; the examples are of {sorted(set(groups))}, give them shares"
                )
            if share:
                chosen[domain] = rows[: max(1, round(samples * share / total))]
    made = []
    for domain, rows in chosen.items():
        rows = rows[np.lexsort((rows, -tokenised.label_lengths[rows], -tokenised.input_lengths[rows]))]
        made += [
            (domain, collate(tokenised, rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)
        ]
    return made


class PaddingShare(NamedTuple):
    """Share of the positions of an epoch's batches, inputs and labels, that are padding."""

    shuffled: float
    by_length: float


def padding_share(tokenised: Tokenised, batch_size: int, seed: int = 0) -> PaddingShare:
    """Padding with batches of shuffled examples, and with those of ``TaskBatches``, over one epoch."""
    batches = TaskBatches(tokenised, batch_size, seed)
    order = np.random.default_rng((seed, 3)).permutation(len(tokenised))
    shuffled = np.array_split(order, batches.steps_per_epoch)
    return PaddingShare(
        _padding(tokenised, shuffled), _padding(tokenised, [batches.indices(s) for s in range(batches.steps_per_epoch)])
    )


def _padding(tokenised: Tokenised, batches: list[Offsets]) -> float:
    positions = sum(
        len(rows) * int(lengths[rows].max())
        for rows in batches
        for lengths in (tokenised.input_lengths, tokenised.label_lengths)
    )
    return 1.0 - (len(tokenised.input_ids) + len(tokenised.label_ids)) / positions
