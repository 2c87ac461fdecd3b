"""Passes of a model over one batch: likelihoods of given answers, and greedy generation.

The encoder runs once per example and all its answers are scored against that one output; answers that begin alike
share a decoder row as far as that is exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcsmoe.evaluate.encoding import Item, Wording, device_of

Rows = Sequence[tuple[int, tuple[int, ...]]]  # decoder rows: number of the source, inputs after its start
_LOGITS = 2**25  # logits held at a time, 128 MiB in float32


def quiet(model: Any) -> dict[str, bool]:
    """Models whose configuration asks for router logits would compute a balance loss for nothing."""
    return {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """[N, T] ids and their mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)


def _cover(continuations: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Fewest rows of decoder inputs that serve all continuations, and the row of each.

    The input that predicts a continuation is all of it but its last token. A causal decoder gives a prefix the same
    logits whatever follows, so a row that begins with that input serves it exactly.
    """
    rows: list[tuple[int, ...]] = []
    for inputs in sorted({one[:-1] for one in continuations}, key=lambda one: (-len(one), one)):
        if not any(row[: len(inputs)] == inputs for row in rows):
            rows.append(inputs)
    owners = [next(place for place, row in enumerate(rows) if row[: len(one) - 1] == one[:-1]) for one in continuations]
    return rows, owners


@dataclass
class Reading:
    """What a pass found for each continuation of a batch: its log-likelihood (nats) and the likeliest tokens."""

    likelihood: list[list[float]]
    likeliest: list[list[list[int]]]


def read(model: Any, wording: Wording, items: Sequence[Item]) -> Reading:
    """Score every continuation of every item: log p(tokens | source), and the argmax at each of its positions."""
    device = device_of(model)
    sources, covers = [item.source for item in items], [_cover(item.continuations) for item in items]
    flat = [(number, row) for number, (rows, _) in enumerate(covers) for row in rows]
    first_row, total = [], 0
    for rows, _ in covers:
        first_row.append(total)
        total += len(rows)
    # One entry per scored token: its row, its place in the row, itself, and the continuation it belongs to.
    entries: list[tuple[int, int, int, int]] = []
    count = 0
    for number, item in enumerate(items):
        for one, owner in zip(item.continuations, covers[number][1], strict=True):
            entries += [(first_row[number] + owner, place, token, count) for place, token in enumerate(one)]
            count += 1
    scores = torch.zeros(count, dtype=torch.float64)
    likeliest = torch.zeros(len(entries), dtype=torch.int64)
    logits_of = _decoder_only(model, wording, sources) if wording.causal else _encoder_decoder(model, wording, sources)
    longest = 1 + max(len(row) for _, row in flat)
    step = max(1, _LOGITS // (longest * int(model.config.vocab_size)))
    table = torch.tensor(entries, dtype=torch.int64)
    for start in range(0, total, step):
        piece = flat[start : start + step]
        chosen = ((table[:, 0] >= start) & (table[:, 0] < start + len(piece))).nonzero()[:, 0]
        row_P, place_P, token_P, owner_P = table[chosen].to(device).unbind(1)
        logits_PV = logits_of(piece)[row_P - start, place_P].float()
        score_P = logits_PV.gather(1, token_P[:, None])[:, 0] - logits_PV.logsumexp(1)
        scores.index_add_(0, owner_P.cpu(), score_P.double().cpu())
        likeliest[chosen] = logits_PV.argmax(1).cpu()
    return _nested(items, scores.tolist(), likeliest.tolist())


def _nested(items: Sequence[Item], scores: list[float], tokens: list[int]) -> Reading:
    found = Reading([], [])
    place = number = 0
    for item in items:
        found.likelihood.append(scores[number : number + len(item.continuations)])
        number += len(item.continuations)
        found.likeliest.append([])
        for one in item.continuations:
            found.likeliest[-1].append(tokens[place : place + len(one)])
            place += len(one)
    return found


def _encoder_decoder(model: Any, wording: Wording, sources: Sequence[Sequence[int]]) -> Callable[[Rows], Tensor]:
    """Runs the encoder once; the function returned gives [N, T, V] logits of rows (number of the source, inputs)."""
    device = device_of(model)
    ids, mask = _padded(sources, wording.pad, device)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask, **quiet(model))

    def logits_of(rows: Rows) -> Tensor:
        owner = torch.tensor([number for number, _ in rows], device=device)
        # Right padding is enough: in a causal decoder nothing before it can see it.
        inputs, _ = _padded([(wording.start, *row) for _, row in rows], wording.pad, device)
        shared = type(encoded)(last_hidden_state=encoded.last_hidden_state[owner])
        done = model(
            encoder_outputs=shared,
            attention_mask=mask[owner],
            decoder_input_ids=inputs,
            use_cache=False,
            **quiet(model),
        )
        return done.logits

    return logits_of


def _decoder_only(model: Any, wording: Wording, sources: Sequence[Sequence[int]]) -> Callable[[Rows], Tensor]:
    """The function returned gives [N, T, V] logits from the last token of the source on, rows padded on the left."""
    device = device_of(model)
    accepts = inspect.signature(model.forward).parameters

    def logits_of(rows: Rows) -> Tensor:
        ids, mask = _padded([(*sources[number], *row) for number, row in rows], wording.pad, device, left=True)
        extra: dict[str, Any] = {}
        if "position_ids" in accepts:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        kept = 1 + max(len(row) for _, row in rows)
        if "logits_to_keep" in accepts:
            extra["logits_to_keep"] = kept
        done = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra, **quiet(model))
        return _shifted(done.logits[:, -kept:], [kept - 1 - len(row) for _, row in rows])

    return logits_of


def _shifted(logits_NTV: Tensor, offsets: Sequence[int]) -> Tensor:
    """Rows moved to the left by their own offset, so that a row's first scored position is at 0."""
    length = logits_NTV.shape[1]
    start = torch.tensor(list(offsets), device=logits_NTV.device)[:, None]
    place = (torch.arange(length, device=logits_NTV.device)[None] + start).clamp_max(length - 1)
    return logits_NTV[torch.arange(len(logits_NTV), device=logits_NTV.device)[:, None], place]


def generate(model: Any, wording: Wording, items: Sequence[Item]) -> list[list[int]]:
    """Greedy answers, at most ``max_label`` tokens each, with the key-value cache."""
    from transformers import GenerationConfig

    ids, mask = _padded([item.source for item in items], wording.pad, device_of(model), left=wording.causal)
    greedy = GenerationConfig(
        max_new_tokens=wording.max_label,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=wording.pad,
        eos_token_id=wording.end,
        decoder_start_token_id=None if wording.causal else wording.start,
    )
    made = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    return made[:, ids.shape[1] if wording.causal else 1 :].tolist()
