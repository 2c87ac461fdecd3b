"""Token ids held against the embeddings of the model that is to read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the model has embeddings for; None where it does not say."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    return None if weight is None else int(weight.shape[0])


def check_ids(ids: Sequence[int], vocabulary: int, where: str, tokenizer: Any = None) -> None:
    """Raise ValueError, naming ``where``, the first token that has no embedding, and the remedy.

    Args:
        tokenizer: the one that made the ids, to name the token and be blamed; None where a file holds them.
    """
    if len(ids) and max(ids) >= vocabulary:
        token = int(next(token for token in ids if token >= vocabulary))
        named = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
        remedy = "correct the row" if tokenizer is None else "give the model the tokenizer it was trained with"
        raise ValueError(f"{where} has token {token}{named}, and the model has {vocabulary} embeddings; {remedy}")


def check_rows(
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    names: Iterable[object],
    vocabulary: int,
    where: str,
    tokenizer: Any,
) -> None:
    """The same for rows that lie one after another: row i, called by the i-th of ``names``, from ``offsets[i]`` on."""
    if not len(ids) or int(ids.max()) < vocabulary:
        return
    row = int(np.searchsorted(offsets, int((ids >= vocabulary).argmax()), side="right")) - 1
    own = ids[offsets[row] : offsets[row + 1]].tolist()
    check_ids(own, vocabulary, f"{where}: example {list(names)[row]!r}", tokenizer)
