"""The closed vocabulary of the generator, and the one source of chance it draws from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Cheap draws from a numpy generator: uniform numbers are taken in blocks and used one by one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._block: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self._rng.random(4096).tolist()
        return self._block.pop()

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self.uniform() * count)

    def pick(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.below(len(items))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different ones of ``items``, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """``items`` in random order."""
        return self.sample(items, len(items))


NAMES = (
    *("anna", "ben", "clara", "david", "emma", "felix", "grace", "henry", "iris", "jack", "karen", "leo"),
    *("maria", "nina", "oscar", "paul", "rosa", "simon", "tina", "victor"),
)
PEOPLE = (
    "man",
    "woman",
    "boy",
    "girl",
    "teacher",
    "student",
    "farmer",
    "doctor",
    "lawyer",
    "singer",
    "tourist",
    "nurse",
)
CITIES = (
    *("rome", "paris", "london", "berlin", "madrid", "vienna", "dublin", "oslo", "cairo", "delhi", "tokyo", "lima"),
    *("boston", "geneva", "prague", "lisbon"),
)
COUNTRIES = (
    *("spain", "france", "norway", "egypt", "india", "japan", "peru", "chile", "kenya", "canada", "poland", "greece"),
    *("turkey", "brazil", "sweden", "cuba"),
)
JOBS = (
    *("baker", "pilot", "painter", "dentist", "judge", "gardener", "cook", "driver", "writer", "carpenter", "banker"),
    *("sailor", "tailor", "plumber", "librarian", "guard"),
)
ANIMALS = ("dog", "cat", "horse", "goat", "rabbit", "parrot", "donkey", "duck", "hamster", "turtle", "sheep", "pig")
FOODS = ("rice", "soup", "bread", "cheese", "fish", "pasta", "salad", "cake", "apples", "beans", "honey", "grapes")
SPORTS = (
    "tennis",
    "chess",
    "football",
    "golf",
    "hockey",
    "rugby",
    "cricket",
    "poker",
    "darts",
    "cards",
    "bowling",
    "squash",
)
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "purple", "orange")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
YEARS = tuple(str(year) for year in range(1930, 1990, 5))
