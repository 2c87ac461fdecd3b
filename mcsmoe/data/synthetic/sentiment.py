"""SST-2: the sentiment of a review, decided by negation and by which clause carries the point, never by one word."""

from __future__ import annotations

from typing import Any

from mcsmoe.data.synthetic.words import Dice

ASPECTS = (
    *("acting", "plot", "script", "music", "ending", "dialogue", "story", "pacing", "camera work", "cast", "humour"),
    *(
        "direction",
        "film",
        "movie",
        "drama",
        "comedy",
        "sequel",
        "opening",
        "romance",
        "villain",
        "lighting",
        "editing",
    ),
)
GOOD = (
    *("good", "great", "brilliant", "charming", "clever", "funny", "moving", "fresh", "lovely", "superb", "gripping"),
    *("tender", "witty", "elegant", "honest", "warm", "vivid", "smart", "exciting", "bold", "delightful", "graceful"),
)
BAD = (
    *("bad", "awful", "terrible", "boring", "clumsy", "dull", "annoying", "stale", "ugly", "tedious", "lifeless"),
    *("shallow", "silly", "messy", "hollow", "cold", "bland", "stupid", "tiresome", "weak", "horrible", "pointless"),
)
FLIPS = ("not", "never", "hardly", "far from", "not at all", "by no means")
DEGREES = ("", "", "", "very", "really", "so", "quite", "rather", "truly")
VERBS = ("is", "was", "seems", "feels")
LIKES = ("loved", "enjoyed", "admired", "liked")
HATES = ("hated", "despised", "disliked", "regretted")
FLIPPED = 0.25  # share of clauses whose words say the opposite of what they mean
FORMS = (*["one"] * 4, *["and"] * 3, "but", "although first", "although last")
WISHES = ("enjoy", "love", "like", "admire")
GRUDGES = ("hate", "despise", "dislike", "regret")


def _describes(dice: Dice, subject: str, good: bool) -> str:
    flip = dice.chance(FLIPPED)
    word = dice.pick(GOOD if good != flip else BAD)
    parts = [subject, dice.pick(VERBS), dice.pick(FLIPS) if flip else "", dice.pick(DEGREES), word]
    return " ".join(part for part in parts if part)


def _reacts(dice: Dice, subject: str, good: bool) -> str:
    who = dice.pick(("i", "we", "everyone"))
    if dice.chance(FLIPPED):
        return f"{who} did {dice.pick(('not', 'never'))} {dice.pick(GRUDGES if good else WISHES)} {subject}"
    return f"{who} {dice.pick(LIKES if good else HATES)} {subject}"


def _clause(dice: Dice, subject: str, good: bool) -> str:
    return (_describes if dice.chance(0.75) else _reacts)(dice, subject, good)


def draw(dice: Dice, label: int) -> tuple[list[str], list[dict[str, Any]]]:
    """(keys, rows) of one sentence; ``label`` 1 is positive. Its form is drawn before the words that follow the label."""
    good = bool(label)
    first, second = (f"the {aspect}" for aspect in dice.sample(ASPECTS, 2))
    form = dice.pick(FORMS)
    if form == "one":
        text = _clause(dice, first, good)
    elif form == "and":
        text = f"{_clause(dice, first, good)} and {_clause(dice, second, good)}"
    elif form == "but":
        text = f"{_clause(dice, first, not good)} but {_clause(dice, second, good)}"
    elif form == "although first":
        text = f"although {_clause(dice, first, not good)} , {_clause(dice, second, good)}"
    else:
        text = f"{_clause(dice, first, good)} , although {_clause(dice, second, not good)}"
    return [text], [{"sentence": text, "label": label}]


def texts(row: dict[str, Any]) -> list[str]:
    """Running text of a row."""
    return [f"{row['sentence']} ."]
