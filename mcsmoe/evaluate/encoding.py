"""From examples to tokens and from tokens to answers, for encoder-decoder and decoder-only models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcsmoe.data.vocabulary import check_ids, vocabulary_of

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn


@dataclass(frozen=True)
class Item:
    """Tokens of one example: what the model is given, and what is scored after it (nothing where it generates)."""

    source: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...] = ()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def is_causal(model: Any) -> bool:
    """Whether the model is decoder-only."""
    return not getattr(model.config, "is_encoder_decoder", False)


class Wording:
    """Tokenises prompts and answers for one kind of model, and reads answers back.

    Raises:
        ValueError: the tokenizer has no end token, neither it nor the model has a padding or a start token, or the model
            has no embedding for one of them.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, max_input: int, max_label: int, score_end: bool | None = None
    ) -> None:
        self.tokenizer, self.max_input, self.max_label = tokenizer, max_input, max_label
        self.causal = is_causal(model)
        self._forms: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self.score_end = not self.causal if score_end is None else score_end
        config: Any = model.config
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token), which cuts answers; set one and save it")
        self.end = int(tokenizer.eos_token_id)
        # A decoder-only model never sees its padding, so the end token can stand in.
        pad = tokenizer.pad_token_id
        self.vocabulary = vocabulary_of(model)
        unknown = pad is None or (self.vocabulary is not None and int(pad) >= self.vocabulary)
        pad = self.end if unknown and self.causal else pad
        if pad is None:
            raise ValueError("the tokenizer has no padding token (pad_token); set one and save it")
        self.pad = int(pad)
        start = getattr(config, "decoder_start_token_id", None)
        if start is None and not self.causal:
            raise ValueError("the model's config.json has no decoder_start_token_id; its decoder cannot begin")
        self.start = int(start) if start is not None else self.pad
        if self.vocabulary is not None:
            check_ids((self.end, self.pad, self.start), self.vocabulary, "the tokenizer", tokenizer)

    # -- to tokens -----------------------------------------------------------------------------------------------
    def ids(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=limit is not None, max_length=limit, verbose=False)["input_ids"]

    def open_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Without the end token that some tokenizers append."""
        return [ids[:-1] if ids and ids[-1] == self.end else ids for ids in self.ids(texts)]

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Inputs of an encoder, closed by one end token within ``max_input``, as in training."""
        found = self.ids(texts, self.max_input)
        return [tuple(ids) if ids and ids[-1] == self.end else (*ids[: self.max_input - 1], self.end) for ids in found]

    def answers(self, texts: Sequence[str], ended: bool) -> list[tuple[int, ...]]:
        """Answers of an encoder-decoder model, with or without the end token."""
        closing = (self.end,) if ended else ()
        return [(*ids, *closing) for ids in self.open_ids(texts)]

    def _kept(self, ids: list[int]) -> tuple[int, ...]:
        """A prompt's last ``max_input`` tokens, the beginning-of-text token first where there is one."""
        if len(ids) <= self.max_input:
            return tuple(ids)
        if ids[0] == self.tokenizer.bos_token_id:
            return (ids[0], *ids[len(ids) - self.max_input + 1 :])
        return tuple(ids[-self.max_input :])

    def continued(self, prompts: Sequence[str], answers: Sequence[Sequence[str]], ended: bool) -> list[Item]:
        """Prompts and answers of a decoder-only model.

        Prompt and answer are tokenised together, because a tokenizer may join their edge. The source is what all of
        an example's answers have in common with the prompt, so that they are compared under one condition.
        """
        contexts = self.open_ids([prompt.rstrip() for prompt in prompts])
        joined = [_join(prompt, one) for prompt, some in zip(prompts, answers, strict=True) for one in some]
        wholes = iter(self.open_ids(joined))
        closing = [self.end] if ended else []
        items = []
        for context, some in zip(contexts, answers, strict=True):
            texts = list(itertools.islice(wholes, len(some)))
            shared = min([len(context), *(_alike(context, whole) for whole in texts)])
            source = self._kept(context[:shared]) or (self._beginning(),)
            items.append(Item(source, tuple((*whole[shared:], *closing) for whole in texts)))
        return items

    def _beginning(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.end if begin is None else int(begin)

    # -- from tokens ---------------------------------------------------------------------------------------------
    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Tokens up to the first end token, as words."""
        cut = [list(itertools.takewhile(lambda token: token != self.end, ids)) for ids in answers]
        return [text.strip() for text in self.tokenizer.batch_decode(cut, skip_special_tokens=True)]

    def parse(self, text: str, choices: Sequence[str]) -> int | None:
        """Index of the choice that ``text`` is, or None. Case and spacing do not count; a tokenizer may fold both."""
        seen, key = _folded(text), tuple(choices)
        if key not in self._forms:
            read = self.texts(self.open_ids(choices))
            self._forms[key] = [(_folded(choice), _folded(back)) for choice, back in zip(choices, read, strict=True)]
        return next((index for index, forms in enumerate(self._forms[key]) if seen and seen in forms), None)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _join(prompt: str, answer: str) -> str:
    """Prompt and answer with the prompt's own white space between them, a space where it has none."""
    bare = prompt.rstrip()
    return bare + (prompt[len(bare) :] or " ") + answer.lstrip()


def _alike(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of equal tokens at the beginning."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return sum(1 for _ in same)


def items_for(wording: Wording, examples: pd.DataFrame, protocol: str) -> list[Item]:
    """Tokens of every example under ``protocol``.

    Raises:
        ValueError: an answer without any token, or a token that the model has no embedding for; names the example.
    """
    items = _items_for(wording, examples, protocol)
    if wording.vocabulary is not None:
        for idx, item in zip(examples["idx"], items, strict=True):
            for ids in (item.source, *item.continuations):
                check_ids(ids, wording.vocabulary, f"example {idx!r}", wording.tokenizer)
    return items


def _items_for(wording: Wording, examples: pd.DataFrame, protocol: str) -> list[Item]:
    prompts = [str(one) for one in examples["input"]]
    if protocol == "generate":
        if wording.causal:
            found = wording.continued(prompts, [() for _ in prompts], ended=False)
        else:
            found = [Item(ids) for ids in wording.prompts(prompts)]
        return found
    reads_target = protocol == "paper_compat"
    column = [[one] for one in examples["target"]] if reads_target else examples["choices"]
    answers = [[str(one) for one in some] for some in column]
    for idx, some in zip(examples["idx"], answers, strict=True):
        if not all(one.strip() for one in some):
            raise ValueError(f"example {idx!r} has an empty {'target' if reads_target else 'choice'}; correct its text")
    ended = wording.score_end or reads_target
    if wording.causal:
        items = wording.continued(prompts, answers, ended)
    else:
        scored = iter(wording.answers([one for some in answers for one in some], ended))
        items = [
            Item(ids, tuple(itertools.islice(scored, len(some))))
            for ids, some in zip(wording.prompts(prompts), answers, strict=True)
        ]
    if reads_target:
        items = [Item(item.source, tuple(one[: wording.max_label] for one in item.continuations)) for item in items]
    for idx, item in zip(examples["idx"], items, strict=True):
        if not all(item.continuations):
            raise ValueError(f"example {idx!r} has an answer without any token; correct its text")
    return items
