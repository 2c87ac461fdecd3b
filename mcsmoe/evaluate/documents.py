"""How well a model in memory predicts texts, document by document, beside the full model, and how its own text runs on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mcsmoe.console import progress
from mcsmoe.data.collate import Tokenised, collate, evaluation_batches, tokenize
from mcsmoe.data.vocabulary import vocabulary_of
from mcsmoe.evaluate.encoding import device_of, is_causal
from mcsmoe.evaluate.passes import quiet
from mcsmoe.types import IGNORED, Batch

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
LONGEST_PERIOD = 64
REPEATS = 4
_CELLS = {"cpu": 2**20}  # logits looked at together: what the cache holds; else what fills a GPU


def tokenise_texts(
    model: nn.Module, tokenizer: Any, examples: pd.DataFrame, max_input: int, max_label: int
) -> Tokenised:
    """Tokens of texts for ``model``; arguments and errors as in ``mcsmoe.data.collate.tokenize``."""
    return tokenize(examples, tokenizer, max_input, max_label, vocabulary=vocabulary_of(model), causal=is_causal(model))


def model_inputs(model: Any, batch: Batch) -> Batch:
    """What a model is given of a batch: a decoder-only one is asked by position, and would shift labels itself."""
    names = ("input_ids", "attention_mask") if is_causal(model) else ("input_ids", "attention_mask", "labels")
    return {name: batch[name] for name in names if name in batch}


@torch.inference_mode()
def predict_texts(
    model: nn.Module,
    tokenizer: Any,
    examples: pd.DataFrame,
    *,
    batch_size: int,
    max_input: int,
    max_label: int,
    reference: nn.Module | None = None,
    continuations: int = 0,
    show: bool = True,
) -> pd.DataFrame:
    """Table ``documents``: sums over the predicted tokens of each text, in the order of ``examples``.

    Args:
        model: encoder-decoder (the second half of a text is predicted) or decoder-only (all of it).
        reference: the full model, of the same vocabulary, to compare with.
        continuations: how many documents are continued greedily for up to ``max_label`` tokens after their first half; the
            columns that say how it runs on are NaN for the others.

    Raises:
        ValueError: as ``tokenise_texts``, or a reference of another vocabulary.
    """
    import pandas as pd

    tokenised = tokenise_texts(model, tokenizer, examples, max_input, max_label)
    found: dict[int, dict[str, float]] = {}
    batches = evaluation_batches(tokenised, batch_size)
    modes = [(one, one.training) for one in (model, reference) if one is not None]
    for one, _ in modes:
        one.eval()
    for rows in progress(batches, "evaluate (language)") if show else batches:
        batch = {name: tensor.to(device_of(model)) for name, tensor in collate(tokenised, rows).items()}
        for row, sums in zip(rows, _sums(model, reference, batch), strict=True):
            found[row] = sums
    table = pd.DataFrame([found[row] for row in range(len(examples))])
    table.insert(0, "idx", examples["idx"].tolist())
    table.insert(1, "group", examples["group"].tolist())
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(continuations, len(examples))).astype(int)).tolist()
    answers = _continued(model, tokenizer, examples.iloc[chosen], tokenised, batch_size, max_input, max_label)
    table["looping"] = _placed(chosen, [float(loops(ids)) for ids in answers], len(table))
    table["distinct_4grams"] = _placed(chosen, [distinct(ids) for ids in answers], len(table))
    for one, training in modes:
        one.train(training)
    return table


def _placed(chosen: Sequence[int], values: Sequence[float], length: int) -> np.ndarray:
    made = np.full(length, np.nan)
    made[list(chosen)] = values
    return made


def _sums(model: nn.Module, reference: nn.Module | None, batch: Batch) -> list[dict[str, float]]:
    logits_BTV = model(**model_inputs(model, batch), use_cache=False, **quiet(model)).logits
    other_BTV = (
        None
        if reference is None
        else reference(**model_inputs(reference, batch), use_cache=False, **quiet(reference)).logits
    )
    if other_BTV is not None and other_BTV.shape[-1] != logits_BTV.shape[-1]:
        raise ValueError(
            f"the reference predicts {other_BTV.shape[-1]} tokens, the model {logits_BTV.shape[-1]}; give the model it came "
            "from"
        )
    cells = _CELLS.get(logits_BTV.device.type, 2**25)
    step = max(1, cells // (logits_BTV.shape[1] * logits_BTV.shape[2]))
    made: list[dict[str, float]] = []
    for start in range(0, len(logits_BTV), step):
        part = slice(start, start + step)
        made += _compared(logits_BTV[part], None if other_BTV is None else other_BTV[part], batch["labels"][part])
    return made


def _compared(own_BTV: Tensor, full_BTV: Tensor | None, labels_BT: Tensor) -> list[dict[str, float]]:
    asked_BT = labels_BT != IGNORED
    target_BT1 = labels_BT.clamp(min=0)[:, :, None]
    own_BTV = functional.log_softmax(own_BTV.float(), dim=-1)

    def over(values_BT: Tensor) -> list[float]:
        found: list[float] = values_BT.masked_fill(~asked_BT, 0).sum(dim=1, dtype=torch.float64).tolist()
        return found

    columns = {"tokens": asked_BT.sum(dim=1).tolist(), "nats": over(-own_BTV.gather(2, target_BT1)[:, :, 0])}
    unknown = [float("nan")] * len(labels_BT)
    if full_BTV is None:
        columns |= dict.fromkeys(("reference_nats", "divergence", "agreement"), unknown)
    else:
        full_BTV = functional.log_softmax(full_BTV.float(), dim=-1)
        columns["reference_nats"] = over(-full_BTV.gather(2, target_BT1)[:, :, 0])
        # A sum of rounded terms may come out below 0, which no divergence is.
        gap_BT = (full_BTV.exp() * (full_BTV - own_BTV)).sum(dim=-1)
        columns["divergence"] = [max(0.0, one) for one in over(gap_BT)]
        columns["agreement"] = over((full_BTV.argmax(dim=-1) == own_BTV.argmax(dim=-1)).double())
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# -- how text runs on --------------------------------------------------------------------------------------------
def loops(ids: Sequence[int]) -> bool:
    """Whether a text ends in a loop: a period of at most 64 tokens, repeated to the end four times or more."""
    for period in range(1, min(LONGEST_PERIOD, len(ids) // REPEATS) + 1):
        tail = ids[len(ids) - period * REPEATS :]
        if all(tail[place] == tail[place % period] for place in range(len(tail))):
            return True
    return False


def distinct(ids: Sequence[int], length: int = 4) -> float:
    """Share of the ``length``-grams of a text that differ from all others; NaN of a shorter text."""
    grams = [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _continued(
    model: Any,
    tokenizer: Any,
    examples: pd.DataFrame,
    tokenised: Tokenised,
    batch_size: int,
    max_input: int,
    max_label: int,
) -> list[list[int]]:
    """Greedy continuations of the first halves, each up to its end token."""
    from mcsmoe.evaluate import passes
    from mcsmoe.evaluate.encoding import Item, Wording

    wording = Wording(model, tokenizer, max_input, max_label)
    if wording.causal:
        prompts = wording.open_ids(examples["input"].tolist())
        items = [Item(tuple(ids[-max_input:]) or (wording.end,)) for ids in prompts]
    else:
        items = [Item(ids) for ids in wording.prompts(examples["input"].tolist())]
    made: list[list[int]] = []
    for start in range(0, len(items), batch_size):
        for ids in passes.generate(model, wording, items[start : start + batch_size]):
            made.append(ids[: ids.index(wording.end)] if wording.end in ids else ids)
    return made


def text_selector(
    model: nn.Module, tokenizer: Any, examples: pd.DataFrame, batch_size: int, max_input: int, max_label: int
) -> Callable[[nn.Module], float]:
    """What ``Trainer(select=...)`` wants, where less is better: minus the nats a token on ``examples``."""
    tokenised = tokenise_texts(model, tokenizer, examples, max_input, max_label)
    batches = evaluation_batches(tokenised, batch_size)

    def value(one: nn.Module) -> float:
        nats = tokens = 0.0
        with torch.inference_mode():
            for rows in batches:
                batch = {name: tensor.to(device_of(one)) for name, tensor in collate(tokenised, rows).items()}
                for sums in _sums(one, None, batch):
                    nats, tokens = nats + sums["nats"], tokens + sums["tokens"]
        return -nats / tokens

    return value
