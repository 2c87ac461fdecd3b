"""From examples to the tokens a model reads and those it is asked for, for each kind of model and of task.

An encoder-decoder model reads the input and is asked for the target. A decoder-only model reads both as one sequence; what it
is asked for at each position is the token after it, so that logits and labels lie side by side for either kind. Of a text,
which is an example without references, every token is asked for; of a question only those of the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mcsmoe.types import IGNORED

if TYPE_CHECKING:
    import pandas as pd


class Special(NamedTuple):
    """Token ids that pad and that end."""

    pad: int
    end: int


class Sequences(NamedTuple):
    """By example, tokens read and tokens asked for; and how many examples lost tokens to a limit."""

    inputs: list[list[int]]
    labels: list[list[int]]
    truncated: int


def is_text(examples: pd.DataFrame) -> bool:
    """Whether the examples are texts to predict, which have no references, and not questions to answer."""
    return "references" in examples and not any(len(some) for some in examples["references"])


def special_tokens(tokenizer: Any, causal: bool = False) -> Special:
    """What batches are padded and closed with.

    A decoder-only model never sees its padding, so the end token can stand in.

    Raises:
        ValueError: the tokenizer lacks one; names it.
    """
    end, pad = getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "pad_token_id", None)
    pad = end if pad is None and causal else pad
    if pad is None or end is None:
        name = "eos_token" if end is None else "pad_token"
        raise ValueError(
            f"the tokenizer has no {name}, which batches need; set it (tokenizer.{name} = ...) and save it again"
        )
    return Special(int(pad), int(end))


def sequences(
    examples: pd.DataFrame, tokenizer: Any, max_input: int, max_label: int, special: Special, causal: bool
) -> Sequences:
    """Tokens of table ``examples``, within the limits.

    Args:
        max_input: of an encoder's input, end token included; a longer one loses its end, and of a text its beginning.
        max_label: of a target, end token included; a longer one cannot be learnt. A text is cut there.
            A decoder-only model reads up to ``max_input + max_label`` tokens.

    Raises:
        ValueError: a target over ``max_label``, or a text without a token to predict; names the example.
    """
    make = (_text_causal if causal else _text_halves) if is_text(examples) else (_answers if causal else _pairs)
    return make(examples, tokenizer, max_input, max_label, special)


# -- encoder-decoder ---------------------------------------------------------------------------------------------
def _pairs(examples: pd.DataFrame, tokenizer: Any, max_input: int, max_label: int, special: Special) -> Sequences:
    end = special.end
    inputs = [_closed(ids, end) for ids in tokenizer(examples["input"].tolist(), verbose=False)["input_ids"]]
    targets = tokenizer(text_target=examples["target"].tolist(), verbose=False)["input_ids"]
    labels = [_closed(ids, end) for ids in targets]
    _check_targets(examples, labels, max_label)
    long = [row for row, ids in enumerate(inputs) if len(ids) > max_input]
    if long:
        texts = [examples["input"].iloc[row] for row in long]
        cut = tokenizer(texts, truncation=True, max_length=max_input)["input_ids"]
        for row, ids in zip(long, cut, strict=True):
            inputs[row] = ids if ids[-1] == end else [*ids[: max_input - 1], end]
    return Sequences(inputs, labels, len(long))


def _text_halves(examples: pd.DataFrame, tokenizer: Any, max_input: int, max_label: int, special: Special) -> Sequences:
    firsts = _open(tokenizer, examples["input"].tolist(), special.end)
    seconds = _open(tokenizer, examples["target"].tolist(), special.end)
    for row, ids in enumerate(seconds):
        _check_some(examples, row, ids)
    # What stands next to the second half is kept.
    inputs = [[*ids[max(0, len(ids) - max_input + 1) :], special.end] for ids in firsts]
    long = sum(len(one) >= max_input or len(two) > max_label for one, two in zip(firsts, seconds, strict=True))
    return Sequences(inputs, [ids[:max_label] for ids in seconds], long)


# -- decoder-only ------------------------------------------------------------------------------------------------
def _text_causal(examples: pd.DataFrame, tokenizer: Any, max_input: int, max_label: int, special: Special) -> Sequences:
    wholes = _open(tokenizer, (examples["input"] + examples["target"]).tolist(), special.end)
    for row, ids in enumerate(wholes):
        _check_some(examples, row, ids[1:])
    cut = [ids[: max_input + max_label] for ids in wholes]
    long = sum(len(ids) > max_input + max_label for ids in wholes)
    return Sequences(cut, [[*ids[1:], IGNORED] for ids in cut], long)


def _answers(examples: pd.DataFrame, tokenizer: Any, max_input: int, max_label: int, special: Special) -> Sequences:
    """The prompt is what the whole has in common with it, as where answers are scored."""
    prompts = [str(one).rstrip() for one in examples["input"]]
    contexts = _open(tokenizer, prompts, special.end)
    wholes = _open(
        tokenizer, [f"{one} {two.lstrip()}" for one, two in zip(prompts, examples["target"], strict=True)], special.end
    )
    inputs, labels, targets, long = [], [], [], 0
    for context, whole in zip(contexts, wholes, strict=True):
        same = next(
            (n for n, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), min(len(context), len(whole))
        )
        target = [*whole[same:], special.end]
        source = whole[max(0, same - max_input) : same] or [special.end]
        long += same > max_input
        targets.append(target)
        inputs.append([*source, *target[:-1]])
        labels.append([IGNORED] * (len(source) - 1) + target)
    _check_targets(examples, targets, max_label)
    return Sequences(inputs, labels, long)


# -- both --------------------------------------------------------------------------------------------------------
def _open(tokenizer: Any, texts: list[str], end: int) -> list[list[int]]:
    """Without the end token that some tokenizers append."""
    found: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]


def _closed(ids: list[int], end: int) -> list[int]:
    return ids if ids and ids[-1] == end else [*ids, end]


def _check_targets(examples: pd.DataFrame, targets: list[list[int]], max_label: int) -> None:
    for row, ids in enumerate(targets):
        if len(ids) > max_label:
            raise ValueError(
                f"example {examples['idx'].iloc[row]}: field target has {len(ids)} tokens, end token included, more "
                f"than max_label ({max_label}); raise data.max_label or leave the example out"
            )


def _check_some(examples: pd.DataFrame, row: int, ids: list[int]) -> None:
    if not ids:
        raise ValueError(f"example {examples['idx'].iloc[row]}: its text has no token to predict; leave it out")
