"""MRPC: two wordings of a fact, or of two facts that differ in one point.

Wordings differ by synonyms, by active and passive voice and by the place of the time; roles may be exchanged in the
second fact, which leaves the words the same. How a fact is worded does not depend on whether it is the same.
"""

from __future__ import annotations

from typing import Any

from mcsmoe.data.synthetic.words import COLOURS, DAYS, PEOPLE, Dice

ACTS = (
    (("bought", "purchased"), ("bought", "purchased")),
    (("repaired", "fixed"), ("repaired", "fixed")),
    (("took", "stole"), ("taken", "stolen")),
    (("hid", "concealed"), ("hidden", "concealed")),
    (("destroyed", "ruined"), ("destroyed", "ruined")),
)
DEEDS = (
    (("helped", "aided"), ("helped", "aided")),
    (("praised", "lauded"), ("praised", "lauded")),
    (("called", "phoned"), ("called", "phoned")),
    (("blamed", "accused"), ("blamed", "accused")),
    (("saw", "noticed"), ("seen", "noticed")),
)
THINGS = (
    ("car", "vehicle"),
    ("couch", "sofa"),
    ("picture", "photo"),
    ("coat", "jacket"),
    ("stone", "rock"),
    ("boat", "ship"),
)
PLACES = ("at home", "in town", "at school", "in court", "at sea", "in church")

Fact = dict[str, Any]


def _fact(dice: Dice) -> Fact:
    agent, patient = dice.sample(PEOPLE, 2)
    fact: Fact = {"agent": agent, "day": dice.pick(DAYS), "place": dice.pick(PLACES)}
    if dice.chance(0.4):
        return fact | {"verb": dice.pick(DEEDS), "patient": patient}
    return fact | {"verb": dice.pick(ACTS), "thing": dice.pick(THINGS), "colour": dice.pick(COLOURS)}


def _changed(dice: Dice, fact: Fact) -> Fact:
    if "patient" in fact and dice.chance(0.5):
        return fact | {"agent": fact["patient"], "patient": fact["agent"]}
    pools: dict[str, Any] = {
        "day": DAYS,
        "place": PLACES,
        "thing": THINGS,
        "colour": COLOURS,
        "verb": DEEDS if "patient" in fact else ACTS,
    }
    field = dice.pick([name for name in pools if name in fact])
    return fact | {field: dice.pick([value for value in pools[field] if value != fact[field]])}


def _wording(dice: Dice, fact: Fact) -> str:
    object_ = f"the {fact['patient']}" if "patient" in fact else f"the {fact['colour']} {dice.pick(fact['thing'])}"
    active, passive = fact["verb"]
    word = dice.below(2)
    if dice.chance(0.5):
        core = f"the {fact['agent']} {active[word]} {object_} {fact['place']}"
    else:
        core = f"{object_} was {passive[word]} by the {fact['agent']} {fact['place']}"
    return f"on {fact['day']} {core} ." if dice.chance(0.5) else f"{core} on {fact['day']} ."


def draw(dice: Dice, label: int) -> tuple[list[str], list[dict[str, Any]]]:
    """(keys, rows) of one pair; ``label`` 1 says the sentences mean the same."""
    fact = _fact(dice)
    other = fact if label else _changed(dice, fact)
    pair = _wording(dice, fact), _wording(dice, other)
    while pair[0] == pair[1]:
        pair = _wording(dice, fact), _wording(dice, other)
    return [" ".join(sorted(pair))], [{"sentence1": pair[0], "sentence2": pair[1], "label": label}]


def texts(row: dict[str, Any]) -> list[str]:
    """Running text of a row: the sentences, one after the other where they mean the same."""
    if row["label"]:
        return [f"{row['sentence1'].rstrip(' .')} that is to say {row['sentence2']}"]
    return [row["sentence1"], row["sentence2"]]
