"""``mcsmoe evaluate``: the numbers of the model in memory, by domain, with intervals, beside a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_models
import tiny_switch
import torch
from torch.nn import functional

import mcsmoe
from mcsmoe.artefacts.tables import read_table
from mcsmoe.cli import main as cli
from mcsmoe.evaluate.language import by_domain, ratio


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def write_rows(file: Path, seq2seq: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows: list[dict[str, Any]] = []
    for row in range(7):
        one: dict[str, Any] = {"input_ids": torch.randint(2, 90, (3 + row,), generator=generator).tolist()}
        if seq2seq:
            one["labels"] = torch.randint(2, 90, (2 + row % 3,), generator=generator).tolist()
        rows.append(one | {"domain": "code" if row % 3 else "prose"})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return rows


def log_probabilities(model: Any, row: dict[str, Any], seq2seq: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] of the tokens that are predicted, and the tokens, of one row by itself."""
    inputs = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        if seq2seq:
            labels = torch.tensor([row["labels"]])
            found = model(input_ids=inputs, labels=labels, use_cache=False).logits[0]
            return functional.log_softmax(found.double(), dim=-1), labels[0]
        found = model(input_ids=inputs, use_cache=False).logits[0, :-1]
    return functional.log_softmax(found.double(), dim=-1), inputs[0, 1:]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe", "switch"])
def test_scores_are_those_of_the_model_in_memory(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seq2seq = family == "switch"
    rows = write_rows(tmp_path / "text.jsonl", seq2seq)
    models = {
        # A capacity counts padding, and rows are scored beside others.
        name: tiny_switch.model(seed=seed, expert_capacity=64) if seq2seq else tiny_models.model(family, seed=seed)
        for seed, name in enumerate(("full", "small"))
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run("evaluate", tmp_path / "small", "--text", tmp_path / "text.jsonl", "--reference", tmp_path / "full",
        "--domain-column", "domain", "--batch-size", 3, "--out", tmp_path / "scores.parquet")  # fmt: skip
    found = read_table(tmp_path / "scores.parquet", "language")
    assert found["domain"].tolist() == [row["domain"] for row in rows]
    assert "not read are" not in caplog.text
    for row, (_, one) in zip(rows, found.iterrows(), strict=True):
        own_NV, target_N = log_probabilities(models["small"], row, seq2seq)
        full_NV, _ = log_probabilities(models["full"], row, seq2seq)
        assert one["tokens"] == len(target_N)
        assert one["nats"] == pytest.approx(float(-own_NV.gather(1, target_N[:, None]).sum()), rel=1e-4)
        assert one["reference_nats"] == pytest.approx(float(-full_NV.gather(1, target_N[:, None]).sum()), rel=1e-4)
        assert one["divergence"] == pytest.approx(float((full_NV.exp() * (full_NV - own_NV)).sum()), rel=1e-3)
        assert one["agreement"] == int((full_NV.argmax(1) == own_NV.argmax(1)).sum())


def test_a_model_beside_itself_has_lost_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path / "text.jsonl")
    tiny_models.model("mixtral").save_pretrained(tmp_path / "full")
    run("evaluate", tmp_path / "full", "--text", tmp_path / "text.jsonl", "--reference", tmp_path / "full")
    line = next(record.getMessage() for record in caplog.records if "nats a token" in record.getMessage())
    assert "+0.0000 [+0.0000, +0.0000], divergence 0.0000, same likeliest token 100.0%" in line


def documents(count: int, seed: int = 0) -> pd.DataFrame:
    drawn = np.random.default_rng(seed)
    tokens = drawn.integers(20, 60, count)
    full = tokens * drawn.normal(4.0, 0.5, count)
    made = {"tokens": tokens, "nats": full + 0.1 * tokens, "reference_nats": full}
    return pd.DataFrame(made | {"row": "r", "domain": "prose", "divergence": 0.05 * tokens, "agreement": 0.9 * tokens})


def test_a_paired_difference_knows_more_than_two_intervals() -> None:
    (one,) = by_domain(documents(200))
    assert one.difference is not None
    assert one.difference.value == pytest.approx(0.1)
    assert one.difference.high - one.difference.low < 0.01 * (one.nats.high - one.nats.low)


def test_the_interval_covers_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        tokens = drawn.integers(20, 60, 80)
        found = ratio(tokens * drawn.normal(4.0, 0.5, 80), tokens, resamples=400)
        hits += found.low <= 4.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_worst_domain_comes_first_and_all_of_them_last() -> None:
    parts = [documents(20, seed).assign(domain=name) for seed, name in enumerate(("code", "prose", "tools"))]
    parts[1]["nats"] += 3.0 * parts[1]["tokens"]
    found = by_domain(pd.concat(parts))
    assert found[0].domain == "prose"
    assert found[-1].domain == "all"
    assert found[-1].documents == 60


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--domain-column", "topic"), "'topic'"),
        (("--out", "scores.csv"), ".parquet"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--device", "nowhere"), "'nowhere'"),
    ],
)
def test_errors_are_one_message(
    words: tuple[str, ...], match: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "text.jsonl")
    tiny_models.model("mixtral").save_pretrained(tmp_path / "full")
    with pytest.raises(SystemExit) as stopped:
        run("evaluate", tmp_path / "full", "--text", tmp_path / "text.jsonl", *words)
    assert stopped.value.code == 1
    assert match in caplog.text


@pytest.mark.parametrize("family", ["qwen3_moe", "nllb_moe"])
def test_continuations_are_the_likeliest_tokens_one_by_one(family: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "text.jsonl", seq2seq=family == "nllb_moe")
    tiny_models.model(family).save_pretrained(tmp_path / "full")
    model: Any = mcsmoe.load(tmp_path / "full")
    run("evaluate", tmp_path / "full", "--text", tmp_path / "text.jsonl", "--continuations", 3, "--new-tokens", 9, "--batch-size", 1,
        "--reference", tmp_path / "full", "--out", tmp_path / "scores.parquet")  # fmt: skip
    found = read_table(tmp_path / "scores.parquet", "language")
    ends = {model.generation_config.eos_token_id}
    for place in (0, 3, 6):
        ids = rows[place]["input_ids"]
        prompt, made = (ids, []) if family == "nllb_moe" else (ids[: len(ids) // 2], [])
        while len(made) < 9:
            with torch.no_grad():
                if family == "nllb_moe":
                    start = [model.config.decoder_start_token_id, *made]
                    given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([start])}
                else:
                    given = {"input_ids": torch.tensor([[*prompt, *made]])}
                likeliest = int(model(**given, use_cache=False).logits[0, -1].argmax())
            if likeliest in ends:
                break
            made.append(likeliest)
        grams = [tuple(made[at : at + 4]) for at in range(len(made) - 3)]
        expected = len(set(grams)) / len(grams) if grams else float("nan")
        np.testing.assert_equal(found["distinct_4grams"][place], expected)
        np.testing.assert_equal(found["reference_distinct_4grams"][place], expected)
    assert found["looping"].notna().sum() == 3
