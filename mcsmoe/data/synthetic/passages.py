"""SQuAD, MultiRC, WikiQA and HotpotQA: facts about a few people, told in random order, and questions about one of them.

Every paragraph tells the same kinds of facts about two people, so that both the person and the kind of fact must be
found; where facts stand, and so where the answer is, is random.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from mcsmoe.data.synthetic.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    COUNTRIES,
    FOODS,
    JOBS,
    NAMES,
    SPORTS,
    YEARS,
    Dice,
)

Row = dict[str, Any]


class Kind(NamedTuple):
    """A kind of fact: how it is told ({n} the person, {v} the value), asked for, and what its values are."""

    told: str
    asked: str
    values: tuple[str, ...]


KINDS = (
    Kind("{n} lives in {v} .", "where does {n} live ?", CITIES),
    Kind("{n} works as a {v} .", "what is the job of {n} ?", JOBS),
    Kind("{n} owns a {v} .", "which animal does {n} own ?", ANIMALS),
    Kind("{n} likes to eat {v} .", "what does {n} eat ?", FOODS),
    Kind("{n} plays {v} .", "which game does {n} play ?", SPORTS),
    Kind("{n} was born in {v} .", "when was {n} born ?", YEARS),
    Kind("{n} wears a {v} hat .", "which colour is the hat of {n} ?", COLOURS),
)
LISTS = (
    Kind("{n} owns a {v} and a {w} .", "which animals does {n} own ?", ANIMALS),
    Kind("{n} plays {v} and {w} .", "which games does {n} play ?", SPORTS),
    Kind("{n} likes to eat {v} and {w} .", "which foods does {n} eat ?", FOODS),
)


def _identifier(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


# -- SQuAD -------------------------------------------------------------------------------------------------------
def draw_squad(dice: Dice, _label: int) -> tuple[list[str], list[Row]]:
    """(keys, rows) of one paragraph with one question."""
    people, kinds = dice.sample(NAMES, 2), dice.sample(KINDS, 2)
    facts = [
        (person, kind, value)
        for kind in kinds
        for person, value in zip(people, dice.sample(kind.values, 2), strict=True)
    ]
    facts = dice.shuffled(facts)
    person, kind, answer = dice.pick(facts)
    sentences: list[str] = []
    start = 0
    for fact in facts:
        told = fact[1].told.format(n=fact[0], v=fact[2])
        if fact == (person, kind, answer):
            start = len(" ".join([*sentences, ""])) + kind.told.format(n=person, v="\0").index("\0")
        sentences.append(told)
    context = " ".join(sentences)
    answers = {"text": [answer], "answer_start": [start]}
    row = {"title": "people", "context": context, "question": kind.asked.format(n=person), "answers": answers}
    return [context], [row]


def identify_squad(_first: int, _block: int, rows: list[Row]) -> list[Row]:
    """Rows with the hub's ``id``."""
    return [{"id": _identifier(row["context"] + row["question"])} | row for row in rows]


def squad_texts(row: Row) -> list[str]:
    """Running text of a row: the paragraph, the question and its answer."""
    return [f"{row['context']} {row['question']} {row['answers']['text'][0]} ."]


# -- MultiRC -----------------------------------------------------------------------------------------------------
def draw_multirc(dice: Dice, _label: int) -> tuple[list[str], list[Row]]:
    """(keys, rows) of one paragraph: two questions of four answers, two of them right."""
    people, kinds = dice.sample(NAMES, 2), dice.sample(LISTS, 2)
    sentences: list[str] = []
    questions = []
    for kind in kinds:
        values = dice.sample(kind.values, 5)
        asked = dice.below(2)
        for place, person in enumerate(people):
            v, w = values[2 * place : 2 * place + 2]
            sentences.append(kind.told.format(n=person, v=v, w=w))
        right = values[2 * asked : 2 * asked + 2]
        wrong = [dice.pick(values[2 - 2 * asked : 4 - 2 * asked]), values[4]]
        answers = dice.shuffled([(text, 1) for text in right] + [(text, 0) for text in wrong])
        questions.append((kind.asked.format(n=people[asked]), answers))
    paragraph = " ".join(dice.shuffled(sentences))
    rows = [
        {"paragraph": paragraph, "question": question, "answer": answer, "idx": {"question": place}, "label": label}
        for place, (question, answers) in enumerate(questions)
        for answer, label in answers
    ]
    return [paragraph], rows


def identify_multirc(first: int, block: int, rows: list[Row]) -> list[Row]:
    """Rows with the hub's ``idx``: numbers of the paragraph, the question and the answer in the split."""
    return [
        row | {"idx": {"paragraph": block, "question": 2 * block + row["idx"]["question"], "answer": first + place}}
        for place, row in enumerate(rows)
    ]


def multirc_texts(row: Row) -> list[str]:
    """Running text of a row: the paragraph and, where it is right, the answer."""
    return [f"{row['paragraph']} {row['question']} {row['answer']} ."] if row["label"] else []


# -- WikiQA ------------------------------------------------------------------------------------------------------
def _both(dice: Dice, person: str, kinds: list[Kind]) -> str:
    first, second = (kind.told.format(n=person, v=dice.pick(kind.values)) for kind in dice.shuffled(kinds))
    return f"{first.removesuffix(' .')} and{second.removeprefix(person)}"


def draw_wikiqa(dice: Dice, _label: int) -> tuple[list[str], list[Row]]:
    """(keys, rows) of one question with a sentence that answers it and one that does not, in random order.

    The wrong sentence tells the same of another person, or other things of the same person.
    """
    (person, other), (kind, *unasked) = dice.sample(NAMES, 2), dice.sample(KINDS, 4)
    right = _both(dice, person, [kind, unasked[0]])
    wrong = _both(dice, other, [kind, unasked[0]]) if dice.chance(0.5) else _both(dice, person, unasked[1:])
    question = kind.asked.format(n=person)
    rows = [
        {"question": question, "document_title": person, "answer": answer, "label": label}
        for answer, label in dice.shuffled([(right, 1), (wrong, 0)])
    ]
    return [f"{question} {right}", f"{question} {wrong}"], rows


def identify_wikiqa(_first: int, block: int, rows: list[Row]) -> list[Row]:
    """Rows with the hub's ``question_id``."""
    return [{"question_id": f"Q{block}"} | row for row in rows]


def wikiqa_texts(row: Row) -> list[str]:
    """Running text of a row: the question with a sentence that answers it, or that sentence alone."""
    return [f"{row['question']} {row['answer']}"] if row["label"] else [row["answer"]]


# -- HotpotQA ----------------------------------------------------------------------------------------------------
def draw_hotpotqa(dice: Dice, _label: int) -> tuple[list[str], list[Row]]:
    """(keys, rows) of one question that takes two paragraphs: where a person lives, and where that city lies.

    Which country a city lies in is drawn anew in every row, so it cannot be learnt by heart.
    """
    people, cities, countries = dice.sample(NAMES, 2), dice.sample(CITIES, 2), dice.sample(COUNTRIES, 2)
    paragraphs: dict[str, list[str]] = {}
    homes = []
    for person, city in zip(people, cities, strict=True):
        homes.append(f"{person} lives in {city} .")
        paragraphs[person] = dice.shuffled([homes[-1], f"{person} works as a {dice.pick(JOBS)} ."])
    lies = []
    for city, country in zip(cities, countries, strict=True):
        lies.append(f"{city} lies in {country} .")
        paragraphs[city] = dice.shuffled([lies[-1], f"people in {city} like {dice.pick(FOODS)} ."])
    asked = dice.below(2)
    titles = dice.shuffled(list(paragraphs))
    facts = [(people[asked], homes[asked]), (cities[asked], lies[asked])]
    row = {
        "question": f"in which country does {people[asked]} live ?",
        "answer": countries[asked],
        "type": "bridge",
        "level": "medium",
        "supporting_facts": {
            "title": [title for title, _ in facts],
            "sent_id": [paragraphs[title].index(sentence) for title, sentence in facts],
        },
        "context": {"title": titles, "sentences": [paragraphs[title] for title in titles]},
    }
    told = " ".join(line for title in titles for line in paragraphs[title])
    return [f"in which country does {people[asked]} live ? {told}"], [row]


def identify_hotpotqa(_first: int, _block: int, rows: list[Row]) -> list[Row]:
    """Rows with the hub's ``id``."""
    return [{"id": _identifier(row["question"] + str(row["context"]))} | row for row in rows]


def hotpotqa_texts(row: Row) -> list[str]:
    """Running text of a row: its paragraphs, the question and its answer."""
    told = " ".join(line for lines in row["context"]["sentences"] for line in lines)
    return [f"{told} {row['question']} {row['answer']} ."]
