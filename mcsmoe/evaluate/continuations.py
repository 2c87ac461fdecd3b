"""How a model runs on: greedy continuations of texts, how many end in a loop, and how little they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mcsmoe.console import progress
from mcsmoe.evaluate.documents import distinct, loops

COLUMNS = ("looping", "distinct_4grams")
# Settings that a model comes with for sampling, and that would change what is likeliest.
_PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def prompts_of(texts: Sequence[Sequence[int]], count: int, whole: bool) -> dict[int, list[int]]:
    """By the place of a text, what is continued: the first half of ``count`` texts, spread evenly; all of it if ``whole``.

    Texts of a single token are passed over.
    """
    usable = [place for place, ids in enumerate(texts) if whole or len(ids) > 1]
    if not usable:
        return {}
    chosen = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int)).tolist()
    taken = {usable[one]: list(texts[usable[one]]) for one in chosen}
    return {place: ids if whole else ids[: len(ids) // 2] for place, ids in taken.items()}


@torch.inference_mode()
def continued(
    model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int, what: str = "continuations"
) -> list[list[int]]:
    """Greedy continuations, each up to its end token, which is not among them.

    Args:
        model: decoder-only or encoder-decoder, in memory.
        prompts: token ids, at least one each.
        new_tokens: most tokens of a continuation.
        batch_size: prompts at a time.
        what: named by the progress bar.
    """
    causal: Any = model
    device = next(model.parameters()).device
    settings = causal.generation_config
    ends = settings.eos_token_id if settings.eos_token_id is not None else causal.config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    text = causal.config.get_text_config()
    ends.discard(None)
    pad = text.pad_token_id if getattr(text, "pad_token_id", None) is not None else min(ends, default=0)
    two_sided = bool(causal.config.is_encoder_decoder)
    made: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for start in progress(range(0, len(order), batch_size), what):
        places = order[start : start + batch_size]
        longest = len(prompts[places[0]])
        ids = torch.full((len(places), longest), pad)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            # What is continued has to end the row; an encoder counts positions from its start.
            part = slice(0, len(prompts[place])) if two_sided else slice(longest - len(prompts[place]), longest)
            ids[row, part] = torch.tensor(prompts[place])
            mask[row, part] = 1
        found = causal.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=new_tokens, pad_token_id=pad, **_PLAIN
        )
        begin = 1 if two_sided else longest
        for place, row in zip(places, found[:, begin:].tolist(), strict=True):
            end = next((number for number, one in enumerate(row) if one in ends), len(row))
            made[place] = row[:end]
    return [made[place] for place in range(len(prompts))]


def columns(answers: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """For each continuation whether it ends in a loop (0 or 1), and its share of distinct 4-grams (NaN where too short)."""
    return [dict(zip(COLUMNS, (float(loops(ids)), distinct(ids)), strict=True)) for ids in answers]


def in_words(values: Sequence[dict[str, float]], reference: Sequence[dict[str, float]] | None) -> str:
    """One line for a reader, over all continuations."""

    def mean(rows: Sequence[dict[str, float]], name: str) -> float:
        found = [row[name] for row in rows if not np.isnan(row[name])]
        return float(np.mean(found)) if found else float("nan")

    beside = ["", ""]
    if reference is not None:
        beside = [f" (reference {mean(reference, COLUMNS[0]):.1%})", f" (reference {mean(reference, COLUMNS[1]):.3f})"]
    return (
        f"{len(values)} greedy continuations: {mean(values, COLUMNS[0]):.1%} end in a loop{beside[0]}, "
        f"{mean(values, COLUMNS[1]):.3f} of their 4-grams are distinct{beside[1]}"
    )
