"""The generator: structure to learn, and nothing that gives labels away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from mcsmoe.data import synthetic
from mcsmoe.data.synthetic import events, sentiment
from mcsmoe.data.tasks import load_task

RANKED = ("SST-2", "MRPC", "MultiRC", "COPA", "WinoGrande", "WikiQA")
ROWS = 1200


def rows(name: str, split: str = "train", count: int = ROWS, seed: int = 0) -> pd.DataFrame:
    return synthetic.generate(name, split, count, seed)


def examples(name: str, split: str = "train", count: int = ROWS, seed: int = 0) -> pd.DataFrame:
    return load_task(name).examples(rows(name, split, count, seed), split)


def _accuracy(features: np.ndarray[Any, Any], labels: pd.Series[Any]) -> float:
    """Held-out accuracy of a logistic regression, labels against features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half = len(labels) // 2
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    model.fit(features[:half], labels[:half])
    return float(model.score(features[half:], labels[half:]))


@pytest.mark.parametrize("name", synthetic.NAMES)
def test_same_seed_same_rows_and_splits_are_disjoint(name: str) -> None:
    first = examples(name, count=300)
    pd.testing.assert_frame_equal(first, examples(name, count=300))
    other = examples(name, count=300, seed=1)
    assert first["input"].tolist() != other["input"].tolist()
    held_out = set(examples(name, "validation", 300)["input"])
    assert not held_out & (set(first["input"]) | set(other["input"]))
    assert len(set(first["input"])) == 300


@pytest.mark.parametrize("name", synthetic.NAMES)
def test_more_rows_begin_with_the_same_rows(name: str) -> None:
    pd.testing.assert_frame_equal(rows(name, count=200).head(64), rows(name, count=64))


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_majority_class_is_at_most_055(name: str, split: str) -> None:
    assert examples(name, split, 400)["label"].value_counts(normalize=True).max() <= 0.55


@pytest.mark.parametrize("name", RANKED)
def test_labels_do_not_follow_from_length_or_position(name: str) -> None:
    # 600 held-out rows: a coin stays below 0.5 + 3 * sqrt(0.25 / 600) = 0.561.
    made = examples(name)
    texts = made["input"]
    features = [texts.str.len(), texts.str.split().str.len()]
    if made["choices"].map(tuple).nunique() > 1:
        features += [made["choices"].str[place].str.len() for place in (0, 1)]
        features += [made["choices"].str[place].str.split().str.len() for place in (0, 1)]
        # Where in the prompt a choice first stands, before the choices are listed.
        before = [text.split(" one: ")[0] for text in texts]
        places = [[b.find(c) for b, c in zip(before, made["choices"].str[place], strict=True)] for place in (0, 1)]
        features += [pd.Series(place) for place in places]
        features.append((features[-2] < features[-1]).astype(int))
    assert _accuracy(np.column_stack(features), made["label"]) < 0.561


@pytest.mark.parametrize("name", ["SST-2", "MRPC", "COPA", "WinoGrande"])
def test_no_bag_of_words_gives_labels_away(name: str) -> None:
    from sklearn.feature_extraction.text import CountVectorizer

    made = examples(name, count=3000)
    counts = CountVectorizer(token_pattern=r"\S+", binary=True).fit_transform(made["input"])
    assert _accuracy(np.asarray(counts.todense()), made["label"]) < 0.75


def test_sentiment_follows_from_negation_and_clause() -> None:
    """An independent reading of every sentence agrees with its label."""

    def clause(text: str) -> bool:
        words = set(text.split())
        good = bool(words & {*sentiment.GOOD, *sentiment.LIKES, *sentiment.WISHES})
        bad = bool(words & {*sentiment.BAD, *sentiment.HATES, *sentiment.GRUDGES})
        assert good != bad
        return good != any(f" {flip} " in f" {text} " for flip in sentiment.FLIPS)

    flipped = 0
    for row in rows("SST-2").itertuples():
        text = str(row.sentence)
        if " but " in text:
            text = text.split(" but ")[1]
        elif text.startswith("although "):
            text = text.split(" , ")[1]
        elif " , although " in text:
            text = text.split(" , ")[0]
        parts = text.split(" and ")
        assert {clause(part) for part in parts} == {bool(row.label)}
        flipped += any(f" {flip} " in f" {text} " for flip in sentiment.FLIPS)
    assert 0.25 < flipped / ROWS < 0.5


def test_copa_asks_for_the_neighbour_on_the_right_side() -> None:
    place = {event: (number, at) for number, chain in enumerate(events.CHAINS) for at, event in enumerate(chain)}
    assert len(place) == sum(map(len, events.CHAINS)), "an event stands in two chains"
    directions = 0
    for row in rows("COPA").itertuples():
        who = str(row.premise).split()[0]
        premise = str(row.premise).rsplit(" on ", 1)[0] if str(row.premise).endswith("day") else str(row.premise)
        texts = [str(text).removeprefix(f"{who} ") for text in (premise, row.choice1, row.choice2)]
        (chain, at), *choices = (place[text] for text in texts)
        wanted = (chain, at + (1 if row.question == "effect" else -1))
        assert choices[row.label] == wanted
        assert choices[1 - row.label] != wanted
        directions += choices[1 - row.label][0] == chain
    assert 0.4 < directions / ROWS < 0.6


def test_squad_answers_stand_where_they_are_said_to() -> None:
    starts = []
    for row in rows("SQuAD").itertuples():
        (text,), (start,) = row.answers["text"], row.answers["answer_start"]
        assert row.context[start : start + len(text)] == text
        starts.append(row.context[:start].count(" . "))
    shares = np.bincount(starts, minlength=4) / ROWS
    assert len(shares) == 4
    assert shares.min() > 0.2
    assert shares.max() < 0.3


def test_multirc_answers_follow_from_the_paragraph() -> None:
    made = rows("MultiRC")
    for row in made.itertuples():
        person = row.question.split()[-3]
        sentence = [s for s in row.paragraph.split(" . ") if s.startswith(person) and row.answer in s.split()]
        assert bool(sentence) == bool(row.label)
    assert made.groupby(made["idx"].map(lambda idx: idx["question"]))["label"].sum().unique().tolist() == [2]


def test_hotpotqa_takes_both_paragraphs() -> None:
    for row in rows("HotpotQA", count=300).itertuples():
        told = dict(zip(row.context["title"], row.context["sentences"], strict=True))
        gold = [told[title][at] for title, at in zip(*row.supporting_facts.values(), strict=True)]
        person, city = row.supporting_facts["title"]
        assert person in row.question
        assert gold == [f"{person} lives in {city} .", f"{city} lies in {row.answer} ."]
        assert len(told) == 4


def test_winogrande_has_one_blank_and_two_different_options() -> None:
    made = rows("WinoGrande")
    assert (made["sentence"].str.count("_") == 1).all()
    assert (made["option1"] != made["option2"]).all()
    assert all(row.option1 in row.sentence and row.option2 in row.sentence for row in made.itertuples())


def test_corpus_is_of_the_training_sides_and_of_small_vocabulary() -> None:
    texts = list(synthetic.corpus(0, 400))
    words = {word for text in texts for word in text.split()}
    assert 400 <= len(words) <= 900
    joined = "\n".join(texts)
    for name, column in (("SST-2", "sentence"), ("SQuAD", "context"), ("MRPC", "sentence1"), ("MultiRC", "paragraph")):
        held_out = rows(name, "validation", 200)[column]
        # One clause alone may be a part of a longer training sentence; whole contents may not recur.
        assert not {f"{text} ." for text in held_out} & set(texts)
        assert name == "SST-2" or not any(text in joined for text in held_out if name != "MRPC")
    prompts = " ".join(word for name in RANKED for word in examples(name, "validation", 50)["input"]).split()
    assert set(prompts) <= words
    assert {
        word for name in RANKED for word in load_task(name).choices if isinstance(load_task(name).choices, tuple)
    } <= words


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_PATIENCE", 1)
    with pytest.raises(ValueError, match=r"does not write task 'OpenBookQA', only SST-2"):
        synthetic.generate("OpenBookQA", "train", 4, 0)
    with pytest.raises(ValueError, match=r"data\.train_rows is 0"):
        synthetic.generate("SST-2", "train", 0, 0)
    with pytest.raises(ValueError, match=r"the generator has no more than about \d+ different validation rows of COPA"):
        synthetic.generate("COPA", "validation", 10_000_000, 0)
