"""WinoGrande: a blank that stands for one of two people or things, decided by a property at the end of the sentence."""

from __future__ import annotations

from typing import Any

from mcsmoe.data.synthetic.words import DAYS, NAMES, Dice

# (sentence, ends that point to the first, ends that point to the second)
THINGS = (
    ("the {a} did not fit into the {b} because _ was too {p}", ("big", "large", "wide"), ("small", "narrow", "tiny")),
    ("the {a} broke the {b} because _ was so {p}", ("hard", "heavy", "solid"), ("fragile", "thin", "delicate")),
    (
        "they sold the {a} and kept the {b} since _ was {p}",
        ("worthless", "useless", "ugly"),
        ("precious", "useful", "pretty"),
    ),
    (
        "we carried the {a} but not the {b} as _ was {p}",
        ("light", "easy to lift", "handy"),
        ("heavy", "hard to lift", "bulky"),
    ),
)
PERSONS = (
    (
        "{a} thanked {b} because _ had {p}",
        ("received help", "been rescued", "got a gift"),
        ("given help", "been kind", "sent a gift"),
    ),
    ("{a} asked {b} a question because _ was {p}", ("curious", "unsure", "puzzled"), ("wise", "an expert", "informed")),
    ("{a} beat {b} in the race because _ was {p}", ("fast", "quick", "fit"), ("slow", "tired", "lame")),
    ("{a} lent {b} some money because _ was {p}", ("rich", "generous", "wealthy"), ("poor", "broke", "in debt")),
    ("{a} comforted {b} because _ felt {p}", ("pity", "compassion", "concern"), ("sad", "lonely", "upset")),
    ("{a} taught {b} because _ was {p}", ("skilled", "a master", "trained"), ("a beginner", "untrained", "clueless")),
)
OBJECTS = (
    *("trophy", "suitcase", "vase", "box", "table", "lamp", "mirror", "statue", "bottle", "drawer", "basket", "clock"),
    *("guitar", "printer", "chair", "shelf", "bucket", "barrel", "stove", "piano"),
)


def draw(dice: Dice, label: int) -> tuple[list[str], list[dict[str, Any]]]:
    """(keys, rows) of one sentence; ``label`` 0 is option 1. The order of the options is that of neither the sentence nor the answer."""
    is_thing = dice.chance(0.4)
    sentence, first, second = dice.pick(THINGS if is_thing else PERSONS)
    a, b = dice.sample(OBJECTS if is_thing else NAMES, 2)
    is_first = dice.chance(0.5)
    text = sentence.format(a=a, b=b, p=dice.pick(first if is_first else second)) + " ."
    text = dice.pick(("", *(f"on {day} " for day in DAYS))) + text
    right, wrong = (a, b) if is_first else (b, a)
    options = (right, wrong) if label == 0 else (wrong, right)
    return [text], [{"sentence": text, "option1": options[0], "option2": options[1], "answer": str(label + 1)}]


def texts(row: dict[str, Any]) -> list[str]:
    """Running text of a row: the sentence with its blank filled in."""
    right = row[f"option{row['answer']}"]
    article = "the " if right in OBJECTS else ""
    return [row["sentence"].replace("_", article + right)]
