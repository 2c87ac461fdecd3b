"""Tokens once and flat, and batches by length that are a function of the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mcsmoe.data import collate
from mcsmoe.data.collate import TaskBatches, Tokenised, tokenize
from mcsmoe.data.vocabulary import check_rows
from mcsmoe.train.tokenizer import train_tokenizer

WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([" ".join(WORDS)] * 3, 400, 4, lowercase=True)


@pytest.fixture(scope="module")
def examples() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for _ in range(403)]
    targets = [" ".join(rng.choice(WORDS, size=rng.integers(1, 4))) for _ in range(403)]
    return pd.DataFrame({"idx": [f"e{i}" for i in range(403)], "input": texts, "target": targets})


@pytest.fixture(scope="module")
def tokens(examples: pd.DataFrame, tokenizer: Any) -> Tokenised:
    return tokenize(examples, tokenizer, 128, 16)


def test_tokens_are_the_tokenizers_with_one_end_token(
    tokens: Tokenised, examples: pd.DataFrame, tokenizer: Any
) -> None:
    assert len(tokens) == 403
    assert tokens.truncated == 0
    for row in (0, 17, 402):
        ids = tokens.input_ids[tokens.input_offsets[row] : tokens.input_offsets[row + 1]].tolist()
        assert ids == tokenizer(examples["input"][row])["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1
        labels = tokens.label_ids[tokens.label_offsets[row] : tokens.label_offsets[row + 1]].tolist()
        assert tokenizer.decode(labels, skip_special_tokens=True).strip() == examples["target"][row]
        assert labels[-1] == tokenizer.eos_token_id


def test_an_end_token_is_added_where_the_tokenizer_adds_none(examples: pd.DataFrame, tokenizer: Any) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    raw = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.Sequence([])
    bare = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assert tokenizer.eos_token_id not in bare("w1 w2")["input_ids"]
    made = tokenize(examples, bare, 16, 16)
    wanted = tokenize(examples, tokenizer, 16, 16)
    assert made.digest == wanted.digest
    assert made.truncated == wanted.truncated > 0


def test_batch_pads_masks_and_ignores(tokens: Tokenised, tokenizer: Any) -> None:
    rows = [5, 0, 9]
    batch = collate.collate(tokens, rows)
    assert batch["row"].tolist() == rows
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, tokens.input_lengths[rows].max())
    assert batch["labels"].shape == (3, tokens.label_lengths[rows].max())
    for place, row in enumerate(rows):
        n, m = tokens.input_lengths[row], tokens.label_lengths[row]
        assert batch["input_ids"][place, n:].eq(tokenizer.pad_token_id).all()
        assert batch["attention_mask"][place].sum() == n
        assert batch["labels"][place, m:].eq(-100).all()
        assert batch["labels"][place, m - 1] == tokenizer.eos_token_id
        assert (batch["labels"][place, :m] >= 0).all()


def test_long_inputs_are_cut_and_counted(
    examples: pd.DataFrame, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        made = tokenize(examples, tokenizer, 12, 16)
    full = tokenize(examples, tokenizer, 128, 16)
    long = full.input_lengths > 12
    assert made.truncated == long.sum() > 0
    assert made.input_lengths.tolist() == np.minimum(full.input_lengths, 12).tolist()
    assert (made.input_ids[made.input_offsets[1:] - 1] == tokenizer.eos_token_id).all()
    assert f"{long.sum()} of 403 inputs" in caplog.text


def test_a_long_target_is_an_error(examples: pd.DataFrame, tokenizer: Any) -> None:
    longer = examples.copy()
    longer.loc[7, "target"] = " ".join(WORDS[:20])
    length = len(tokenizer(longer["target"][7])["input_ids"])
    with pytest.raises(ValueError, match=rf"example e7: field target has {length} tokens.*max_label \(16\)"):
        tokenize(longer, tokenizer, 128, 16)


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_tokenizer_without_special_tokens(examples: pd.DataFrame, tokenizer: Any, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    kept = {key: value for key, value in {"eos_token": "</s>", "pad_token": "<pad>"}.items() if key != name}
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", **kept)
    with pytest.raises(ValueError, match=f"tokenizer has no {name}"):
        tokenize(examples, bare, 128, 16)


def test_no_examples(examples: pd.DataFrame, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no examples"):
        tokenize(examples.iloc[:0], tokenizer, 128, 16)


def test_save_and_load(tokens: Tokenised, tmp_path: Path) -> None:
    tokens.save(tmp_path / "tokens.npz")
    found = Tokenised.load(tmp_path / "tokens.npz")
    assert found.digest == tokens.digest
    assert (found.pad, found.truncated, len(found)) == (tokens.pad, 0, len(tokens))
    assert [file.name for file in tmp_path.iterdir()] == ["tokens.npz"]
    (tmp_path / "bad.npz").write_bytes((tmp_path / "tokens.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"bad\.npz: not readable as tokenised examples"):
        Tokenised.load(tmp_path / "bad.npz")


def test_tokens_are_kept_under_what_they_follow_from(
    examples: pd.DataFrame, tokenizer: Any, tokens: Tokenised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(examples, tokenizer, 128, 16, cache=tmp_path)
    tokenize(examples.head(50), tokenizer, 128, 16, cache=tmp_path)
    tokenize(examples, tokenizer, 64, 16, cache=tmp_path)
    other = train_tokenizer([" ".join(WORDS[:40])] * 3, 300, 4, lowercase=True)
    tokenize(examples, other, 128, 16, cache=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4
    tokenizer("w1 w2 w3", truncation=True, max_length=2)
    with monkeypatch.context() as patch:
        patch.setattr(collate, "sequences", lambda *_: pytest.fail("tokenised again"))
        assert tokenize(examples, tokenizer, 128, 16, cache=tmp_path).digest == tokens.digest
    for file in kept:
        file.write_bytes(file.read_bytes()[:200])
    assert tokenize(examples, tokenizer, 128, 16, cache=tmp_path).digest == tokens.digest
    assert sorted(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("size", [1, 32, 64, 403, 1000])
def test_an_epoch_has_every_example_once(tokens: Tokenised, size: int) -> None:
    batches = TaskBatches(tokens, size, seed=1)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        parts = [batches.indices(step) for step in steps]
        assert sorted(np.concatenate(parts).tolist()) == list(range(403))
        sizes = [len(part) for part in parts]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1


def test_a_batch_follows_from_the_step_alone(tokens: Tokenised) -> None:
    ahead = TaskBatches(tokens, 32, seed=1)
    expected = [ahead.batch(step) for step in range(30)]
    for step in (29, 3, 14, 0):
        found = TaskBatches(tokens, 32, seed=1).batch(step)
        assert all(torch.equal(found[name], expected[step][name]) for name in found)
    other = TaskBatches(tokens, 32, seed=2)
    assert other.indices(0).tolist() != ahead.indices(0).tolist()
    assert ahead.indices(0).tolist() != ahead.indices(ahead.steps_per_epoch).tolist()


def test_batches_by_length_pad_less(tokens: Tokenised) -> None:
    share = collate.padding_share(tokens, 16)
    batches = TaskBatches(tokens, 16, 0)
    padded = total = 0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        padded += int((batch["attention_mask"] == 0).sum() + (batch["labels"] == -100).sum())
        total += batch["attention_mask"].numel() + batch["labels"].numel()
    assert share.by_length == pytest.approx(padded / total)
    assert share.by_length < 0.12 < 0.35 < share.shuffled


def test_training_batches_are_not_in_order_of_length(tokens: Tokenised) -> None:
    batches = TaskBatches(tokens, 16, 0)
    means = [tokens.input_lengths[batches.indices(step)].mean() for step in range(batches.steps_per_epoch)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_evaluation_batches_are_complete_and_longest_first(tokens: Tokenised) -> None:
    batches = collate.evaluation_batches(tokens, 50)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(403))
    assert tokens.input_lengths[order].tolist() == sorted(tokens.input_lengths, reverse=True)


def test_calibration_batches(tokens: Tokenised) -> None:
    batches = collate.calibration_batches(tokens, 100, 32, seed=0)
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    assert len(rows) == len(set(rows)) == 100
    assert len(collate.calibration_batches(tokens, 10_000, 403, seed=0)[0]["row"]) == 403
    # The same samples whatever the batch size, so that statistics do not depend on it.
    assert set(rows) == set(torch.cat([b["row"] for b in collate.calibration_batches(tokens, 100, 1, seed=0)]).tolist())
    with pytest.raises(ValueError, match="samples is 0"):
        collate.calibration_batches(tokens, 0, 32, seed=0)


@pytest.mark.parametrize("column", ["input", "target"])
def test_a_token_without_an_embedding_is_named_with_file_example_and_remedy(
    column: str, tmp_path: Path, tokenizer: Any
) -> None:
    highest = max(range(len(WORDS)), key=lambda number: max(tokenizer(WORDS[number])["input_ids"]))
    rest = [word for number, word in enumerate(WORDS) if number != highest]
    made = pd.DataFrame({"idx": [f"e{row}" for row in range(9)], "input": rest[:9], "target": rest[9:18]})
    made.loc[7, column] = WORDS[highest]
    limit = max(tokenizer(WORDS[highest])["input_ids"])
    tokenize(made, tokenizer, 128, 16, vocabulary=limit + 1, cache=tmp_path)
    # Whether they were tokenised before or not: kept tokens are of a tokenizer, and any model may come after.
    for cache in (None, tmp_path):
        with pytest.raises(ValueError, match="embeddings") as raised:
            tokenize(made, tokenizer, 128, 16, cache, vocabulary=limit, where="train.parquet")
        assert str(raised.value) == (
            f"train.parquet: example 'e7' has token {limit} ({tokenizer.convert_ids_to_tokens(limit)!r}), and the model has "
            f"{limit} embeddings; give the model the tokenizer it was trained with"
        )
    with pytest.raises(ValueError, match=r"^the tokenizer has token"):
        tokenize(made, tokenizer, 128, 16, vocabulary=tokenizer.eos_token_id)


@pytest.mark.parametrize("row", [0, 1, 3])
def test_the_row_of_a_token_is_found_past_empty_ones(row: int, tokenizer: Any) -> None:
    rows = [[5], [5, 6], [], [7]]
    rows[row] = [*rows[row], 99]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in rows])])
    flat = np.array([token for one in rows for token in one], dtype=np.int32)
    with pytest.raises(ValueError, match=f"t: example '{'abcd'[row]}' has token 99 "):
        check_rows(flat, offsets, "abcd", 99, "t", tokenizer)
    check_rows(flat, offsets, "abcd", 100, "t", tokenizer)
