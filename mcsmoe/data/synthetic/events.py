"""COPA: chains of events; the premise is a link, and the question asks for the one before it or the one after.

The wrong choice is the link on the other side (so that the question's direction matters) or a link of another chain
with the same person in it (so that the premise's content matters).
"""

from __future__ import annotations

from typing import Any

from mcsmoe.data.synthetic.words import DAYS, NAMES, Dice

CHAINS: tuple[tuple[str, ...], ...] = (
    ("forgot the umbrella", "got wet in the rain", "caught a cold", "stayed in bed"),
    ("dropped the glass", "stepped on the pieces", "cut a foot", "needed a bandage"),
    ("studied all night", "passed the exam", "got a diploma", "found a good job"),
    ("skipped breakfast", "felt hungry", "bought a sandwich", "spent the last coins"),
    ("planted some seeds", "watered the garden", "grew tomatoes", "cooked a sauce"),
    ("lost the keys", "was locked out", "called a locksmith", "paid a large bill"),
    ("drove too fast", "was stopped by the police", "got a fine", "sold the car"),
    ("heard a strange noise", "looked out of the window", "saw a thief", "shouted for help"),
    ("practised the piano", "won the contest", "received a prize", "gave a speech"),
    ("ate too much cake", "felt sick", "took some medicine", "slept until noon"),
    ("turned off the alarm", "woke up late", "missed the bus", "walked to work"),
    ("left the door open", "lost the cat", "put up posters", "thanked a neighbour"),
    ("broke the phone", "missed a call", "failed to hear the news", "came to an empty room"),
    ("found a wallet", "returned it to its owner", "earned a reward", "treated some friends"),
    ("ran in the park", "became thirsty", "drank cold water", "felt refreshed"),
    ("forgot the oven", "burned the dinner", "filled the kitchen with smoke", "opened all windows"),
    ("read a sad letter", "began to cry", "wiped both eyes", "phoned a sister"),
    ("slipped on the ice", "broke an arm", "went to the hospital", "wore a cast"),
    ("saved some money", "bought a ticket", "flew to an island", "swam in the sea"),
    ("told a joke", "made the crowd laugh", "gained some fans", "appeared on television"),
    ("worked in the sun", "got a burn", "applied a cream", "rested in the shade"),
    ("insulted a friend", "started a quarrel", "said sorry", "shook hands"),
    ("painted the fence", "had dirty clothes", "did the laundry", "hung up the shirts"),
    ("lit a candle", "read by its light", "finished the novel", "wrote a review"),
    ("trained every day", "became strong", "lifted the heavy box", "impressed the coach"),
    ("saw a spider", "screamed loudly", "frightened the baby", "sang a lullaby"),
    ("spilled the ink", "ruined the carpet", "hid the stain", "bought a new rug"),
    ("borrowed a ladder", "climbed on the roof", "fixed the leak", "kept the attic dry"),
)

JOINS = {"cause": "because", "effect": "so"}


def draw(dice: Dice, label: int) -> tuple[list[str], list[dict[str, Any]]]:
    """(keys, rows) of one item; ``label`` is the index of the right choice."""
    chain = dice.pick(CHAINS)
    question = dice.pick(("cause", "effect"))
    step = -1 if question == "cause" else 1
    place = 1 + dice.below(len(chain) - 2)
    right = chain[place + step]
    if dice.chance(0.5):
        wrong = chain[place - step]
    else:
        other = dice.pick(CHAINS)
        while other is chain:
            other = dice.pick(CHAINS)
        wrong = dice.pick(other)
    who = dice.pick(NAMES)
    events = [f"{who} {event}" for event in (right, wrong)]
    choices = events if label == 0 else events[::-1]
    when = dice.pick(("", *(f" on {day}" for day in DAYS)))
    premise = f"{who} {chain[place]}{when}"
    row = {
        "premise": premise,
        "choice1": choices[0],
        "choice2": choices[1],
        "question": question,
        "label": label,
    }
    return [" ".join([question, premise, *sorted((right, wrong))])], [row]


def texts(row: dict[str, Any]) -> list[str]:
    """Running text of a row: the premise with what caused it or followed."""
    right = row["choice2" if row["label"] else "choice1"]
    return [f"{row['premise']} {JOINS[row['question']]} {right} ."]
