"""How a model is asked: rank the choices, generate, or the published teacher-forced reading (``paper_compat``).

A batch is many examples of like length. Scores do not depend on the batch size beyond the last bits of float32, and
differences of that size never decide between two choices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mcsmoe.console import progress
from mcsmoe.evaluate import metrics
from mcsmoe.evaluate.encoding import Item, Wording, device_of, is_causal, items_for

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

    from mcsmoe.evaluate.passes import Reading

log = logging.getLogger(__name__)

PROTOCOLS = ("rank", "rank_normalised", "generate", "paper_compat")
RANKING = ("rank", "rank_normalised")
_TIE = 1e-5  # log-likelihoods closer than this, relative to their size, are equal: the lower index wins


@dataclass(frozen=True)
class Prepared:
    """Examples tokenised and batched for one protocol; any number of models of one kind can answer them."""

    examples: pd.DataFrame
    protocol: str
    metric: str
    wording: Wording
    items: list[Item]
    batches: list[list[int]]


def prepare(
    model: nn.Module,
    tokenizer: Any,
    examples: pd.DataFrame,
    protocol: str,
    *,
    batch_size: int,
    max_input: int,
    max_label: int,
    metric: str = "accuracy",
    score_end: bool | None = None,
) -> Prepared:
    """Tokenise ``examples`` for ``protocol``; only the kind and the special tokens of ``model`` are looked at.

    Args: as in ``predict``.

    Raises:
        ValueError: unknown protocol or metric, empty or duplicated examples, a label outside the choices, nothing to
            rank, a tokenizer without the tokens that are needed; names the field, the example and the remedy.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; there are {', '.join(PROTOCOLS)}")
    metrics.check_metric(metric)
    for name, value in (("batch_size", batch_size), ("max_input", max_input), ("max_label", max_label)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    _check_examples(examples, protocol)
    wording = Wording(model, tokenizer, max_input, max_label, score_end)
    items = items_for(wording, examples, protocol)
    # Longest first: what does not fit in memory fails at once. Sorting is stable, so the order is reproducible.
    order = sorted(range(len(items)), key=lambda row: -len(items[row].source))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return Prepared(examples, protocol, metric, wording, items, batches)


def _check_examples(examples: pd.DataFrame, protocol: str) -> None:
    if examples.empty:
        raise ValueError("there are no examples to evaluate; the split is empty")
    twice = examples["idx"][examples["idx"].duplicated()]
    if len(twice):
        raise ValueError(f"idx {twice.iloc[0]!r} occurs twice in the examples; identifiers must be unique in a split")
    for idx, choices, label in zip(examples["idx"], examples["choices"], examples["label"], strict=True):
        if len(choices) and not 0 <= label < len(choices):
            raise ValueError(
                f"example {idx!r} has label {label} for {len(choices)} choices; "
                "a split with hidden labels (-1) cannot be scored"
            )
        if protocol in RANKING and len(choices) < 2:
            raise ValueError(
                f"example {idx!r} has {len(choices)} choices, so there is nothing to rank; use protocol 'generate'"
            )


# -- answers -----------------------------------------------------------------------------------------------------
def best_choice(scores: Sequence[float]) -> int:
    """Index of the highest score; of scores that float32 cannot tell apart, the lowest index."""
    highest = max(scores)
    return next(index for index, one in enumerate(scores) if one >= highest - _TIE * max(1.0, abs(highest)))


def _choice_scores(reading: Reading, items: Sequence[Item], protocol: str) -> list[list[float]]:
    if protocol == "rank":
        return reading.likelihood
    return [
        [total / len(one) for total, one in zip(scores, item.continuations, strict=True)]
        for scores, item in zip(reading.likelihood, items, strict=True)
    ]


def answer(model: nn.Module, prepared: Prepared, show: bool = True) -> pd.DataFrame:
    """The model's answers; see ``predict``. The mode of the model (training or not) is restored."""
    import torch

    from mcsmoe.evaluate import passes

    wording, protocol = prepared.wording, prepared.protocol
    if is_causal(model) != wording.causal:
        raise ValueError("the examples were prepared for a model of the other kind (encoder-decoder, decoder only)")
    answers: list[Any] = [None] * len(prepared.items)
    training = model.training
    model.eval()
    batches = progress(prepared.batches, f"evaluate ({protocol})") if show else prepared.batches
    try:
        with torch.inference_mode(), torch.autocast(device_of(model).type, enabled=False):
            for batch in batches:
                items = [prepared.items[row] for row in batch]
                if protocol == "generate":
                    found: Sequence[Any] = passes.generate(model, wording, items)
                elif protocol == "paper_compat":
                    found = [tokens[0] for tokens in passes.read(model, wording, items).likeliest]
                else:
                    found = _choice_scores(passes.read(model, wording, items), items, protocol)
                for row, one in zip(batch, found, strict=True):
                    answers[row] = one
    finally:
        model.train(training)
    return _table(prepared, answers)


class _Row(NamedTuple):
    idx: str
    target: str
    choices: Sequence[str]
    label: int
    references: Sequence[str]
    group: str


def _table(prepared: Prepared, answers: Sequence[Any]) -> pd.DataFrame:
    import pandas as pd

    rows, unparsed = [], 0
    words = None if prepared.protocol in RANKING else prepared.wording.texts(answers)
    for number, example in enumerate(map(_Row._make, prepared.examples[list(_Row._fields)].to_numpy())):
        choices = [str(one) for one in example.choices]
        references = [choices[example.label]] if choices else [str(one) for one in example.references]
        if not choices and (prepared.protocol == "paper_compat" or not references):
            references = [str(example.target)]
        if words is None:
            index = best_choice(answers[number])
            text, correct = choices[index], index == example.label
        elif choices:
            parsed = prepared.wording.parse(words[number], choices)
            text = words[number] if parsed is None else choices[parsed]
            correct = parsed == example.label
            unparsed += parsed is None
        else:
            text = words[number]
            correct = bool(metrics.exact_match(text, references))
            unparsed += not text
        rows.append(
            {
                "idx": example.idx,
                "reference": metrics.join_references(references),
                "prediction": text,
                "correct": bool(correct),
                "score": metrics.answer_score(prepared.metric, text, references, bool(correct)),
                "group": example.group,
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs["unparsed"] = unparsed
    if unparsed:
        log.info("%d of %d answers could not be parsed and count as wrong", unparsed, len(frame))
    return frame


def predict(
    model: nn.Module,
    tokenizer: Any,
    examples: pd.DataFrame,
    protocol: str,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    max_input: int,
    max_label: int,
    metric: str = "accuracy",
    score_end: bool | None = None,
    show: bool = True,
) -> pd.DataFrame:
    """Answers of ``model``, in the order of ``examples``.

    Protocols: ``rank``, the choice with the highest log-likelihood; ``rank_normalised``, the same per token;
    ``generate``, greedy and cut at the end token; ``paper_compat``, as the published evaluation: the likeliest token at
    each position of the right answer, fed with the right answer (never a random label for one that is no choice).

    Args:
        model: encoder-decoder or decoder-only; moved to ``device`` if one is given.
        tokenizer: the one of the model.
        examples: table ``examples``.
        batch_size: examples at a time.
        max_input: tokens of the prompt; a longer one loses its end (encoder-decoder) or its beginning (decoder-only).
        max_label: tokens of an answer that is generated or, in ``paper_compat``, read. Choices to rank are never cut.
        metric: main metric of the task, for the column ``score``.
        score_end: whether a choice's end token is part of its likelihood; by default for encoder-decoder models,
            which are trained to end their answers, and not for decoder-only ones.
        show: draw a progress bar.

    Returns:
        Table ``predictions``; ``attrs["unparsed"]`` counts answers that are none of the choices (or empty).

    Raises:
        ValueError: as ``prepare``.
    """
    prepared = prepare(
        model,
        tokenizer,
        examples,
        protocol,
        batch_size=batch_size,
        max_input=max_input,
        max_label=max_label,
        metric=metric,
        score_end=score_end,
    )
    return answer(model if device is None else model.to(device), prepared, show)


def selector(prepared: Prepared, positive: str = "") -> Callable[[nn.Module], float]:
    """What ``Trainer(select=...)`` wants: a model's score, by the prepared metric, on the prepared slice."""

    def value(model: nn.Module) -> float:
        return metrics.units(prepared.metric, answer(model, prepared, show=False), positive).value()

    return value


def choice_scores(model: nn.Module, prepared: Prepared) -> list[list[float]]:
    """Log-likelihood (nats; per token under ``rank_normalised``) of each choice of each example, in their order."""
    import torch

    from mcsmoe.evaluate import passes

    if prepared.protocol not in RANKING:
        raise ValueError(f"protocol {prepared.protocol!r} scores no choices; prepare with {' or '.join(RANKING)}")
    scores: list[list[float]] = [[] for _ in prepared.items]
    model.eval()
    with torch.inference_mode(), torch.autocast(device_of(model).type, enabled=False):
        for batch in prepared.batches:
            items = [prepared.items[row] for row in batch]
            found = _choice_scores(passes.read(model, prepared.wording, items), items, prepared.protocol)
            for row, one in zip(batch, found, strict=True):
                scores[row] = one
    return scores
