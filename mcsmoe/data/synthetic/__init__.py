"""Data sets in the hub's schema from a seeded generator: small closed vocabulary, real structure to learn.

Whether a row belongs to the training or the validation split follows from its content alone, so the splits are disjoint
whatever the seeds and sizes; labels are balanced and never follow from length, position or a single word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from mcsmoe.data.synthetic.words import Dice

ROWS = {"train": 24_000, "validation": 1_000}
"""Rows where the configuration names no number."""

CORPUS_ROWS = 2_000
"""Rows of each task that the pre-training text is made from."""

NAMES = ("SST-2", "MRPC", "MultiRC", "COPA", "WinoGrande", "SQuAD", "WikiQA", "HotpotQA")

LANGUAGE = "Language"
"""The task whose rows are running text in the vocabulary of the others, each of which is a domain."""

CHARACTERS = 300  # longest document
_VALIDATION_SHARE = 8  # one key in so many
_PATIENCE = 2_000  # draws in a row that give nothing new before the supply counts as used up

Row = dict[str, Any]


@dataclass(frozen=True)
class Generator:
    """How a task is drawn.

    Attributes:
        draw: (dice, label) -> (keys, rows): rows that belong together, and the texts that must be new and that decide
            the split. ``label`` is 0 and 1 equally often, in random order; tasks that balance themselves ignore it.
        texts: running text of a row, for pre-training.
        identify: (first row number of the block, number of the block, rows) -> rows with the hub's identifiers.
    """

    draw: Callable[[Dice, int], tuple[list[str], list[Row]]]
    texts: Callable[[Row], list[str]]
    identify: Callable[[int, int, list[Row]], list[Row]]


def _numbered(first: int, _block: int, rows: list[Row]) -> list[Row]:
    return [row | {"idx": first + place} for place, row in enumerate(rows)]


def _unnumbered(_first: int, _block: int, rows: list[Row]) -> list[Row]:
    return rows


def _generator(name: str) -> Generator:
    from mcsmoe.data.synthetic import events, paraphrase, passages, reference, sentiment

    return {
        "SST-2": Generator(sentiment.draw, sentiment.texts, _numbered),
        "MRPC": Generator(paraphrase.draw, paraphrase.texts, _numbered),
        "COPA": Generator(events.draw, events.texts, _numbered),
        "WinoGrande": Generator(reference.draw, reference.texts, _unnumbered),
        "SQuAD": Generator(passages.draw_squad, passages.squad_texts, passages.identify_squad),
        "MultiRC": Generator(passages.draw_multirc, passages.multirc_texts, passages.identify_multirc),
        "WikiQA": Generator(passages.draw_wikiqa, passages.wikiqa_texts, passages.identify_wikiqa),
        "HotpotQA": Generator(passages.draw_hotpotqa, passages.hotpotqa_texts, passages.identify_hotpotqa),
    }[name]


def require(name: str) -> None:
    """Raises ValueError, with the known names, for a task that the generator does not write."""
    if name not in (*NAMES, LANGUAGE):
        raise ValueError(
            f"data.source is 'synthetic', but the generator does not write task {name!r}, only "
            f"{', '.join((*NAMES, LANGUAGE))}; "
            "set data.source to files or hub"
        )


def split_of(key: str) -> str:
    """The split that a row with this key belongs to, whatever the seed."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") % _VALIDATION_SHARE == 0 else "train"


def _blocks(name: str, split: str, rows: int, seed: int) -> Iterator[tuple[Generator, list[Row]]]:
    import numpy as np

    from mcsmoe.data.synthetic.words import Dice

    generator = _generator(name)
    dice = Dice(np.random.default_rng([seed, NAMES.index(name), list(ROWS).index(split)]))
    seen: set[str] = set()
    labels: list[int] = []
    made = blocks = failures = 0
    while made < rows:
        if not labels:
            labels = dice.shuffled([0, 1] * 50)
        keys, found = generator.draw(dice, labels[-1])
        if any(split_of(key) != split for key in keys):
            continue
        if not seen.isdisjoint(keys):
            failures += 1
            if failures > _PATIENCE:
                raise ValueError(
                    f"the generator has no more than about {made} different {split} rows of {name}, {rows} were asked "
                    f"for; lower data.{split}_rows"
                )
            continue
        labels.pop()
        failures = 0
        seen.update(keys)
        yield generator, generator.identify(made, blocks, found)
        made += len(found)
        blocks += 1


def generate(name: str, split: str, rows: int | None, seed: int) -> pd.DataFrame:
    """Rows of a split of a task in the hub's schema; the same arguments give the same rows.

    Args:
        split: ``train`` or ``validation``.
        rows: how many; None for ``ROWS``. Blocks that belong together (a MultiRC paragraph) are cut at the end.

    Raises:
        ValueError: a task the generator does not write, a size below 1, or more rows than it has.
    """
    import pandas as pd

    require(name)
    wanted = ROWS[split] if rows is None else rows
    if wanted < 1:
        raise ValueError(f"data.{split}_rows is {wanted}; at least 1 is needed")
    if name == LANGUAGE:
        return pd.DataFrame(_documents(split, wanted, seed))
    made = [row for _, block in _blocks(name, split, wanted, seed) for row in block]
    return pd.DataFrame(made[:wanted])


def _documents(split: str, rows: int, seed: int) -> list[Row]:
    """Running text of every task in turn: rows with ``idx``, ``domain`` and ``text``."""
    each = -(-rows // len(NAMES))
    made: dict[str, list[Row]] = {}
    for name in NAMES:
        made[name] = []
        pending = ""
        for generator, block in _blocks(name, split, 1_000_000_000, seed):
            for text in (text for row in block for text in generator.texts(row)):
                joined = f"{pending} {text}".strip()
                if len(joined) <= CHARACTERS or not pending:
                    pending = joined
                    continue
                idx = f"{name}-{len(made[name])}"
                made[name].append({"idx": idx, "domain": name, "text": pending})
                pending = text
            if len(made[name]) >= each:
                break
    return [made[name][place] for place in range(each) for name in NAMES][:rows]


def corpus(seed: int, rows: int | None = None) -> Iterator[str]:
    """Text in the vocabulary of all tasks, from their training sides alone; right answers appear only as running text.

    Args:
        rows: how many of each task; None for ``CORPUS_ROWS``.
    """
    from mcsmoe.data.tasks import load_task

    for name in NAMES:
        task = load_task(name)
        choices = f" {' or '.join(task.choices)} ." if isinstance(task.choices, tuple) else ""
        prompt = task.row_prompt()
        for number, (generator, block) in enumerate(_blocks(name, "train", rows or CORPUS_ROWS, seed)):
            for row in block:
                yield from generator.texts(row)
            # Now and then the prompt, with all answers and not the right one, so that no word of a task is unknown.
            if number % 8 == 0:
                yield prompt(block[0]) + choices
