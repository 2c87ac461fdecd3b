"""Protocols against a brute force that asks about one choice of one example at a time, without padding or sharing."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import pytest
import tiny_switch
import torch
from torch import nn

from mcsmoe.artefacts.tables import SCHEMAS, read_table, write_table
from mcsmoe.evaluate import metrics
from mcsmoe.evaluate.encoding import Wording
from mcsmoe.evaluate.passes import _cover
from mcsmoe.evaluate.protocols import (
    answer,
    best_choice,
    choice_scores,
    predict,
    prepare,
    selector,
)
from mcsmoe.train.tokenizer import train_tokenizer

TEXTS = [
    "the film is good and the cast is warm",
    "a dull story told badly",
    "what a very bad film it is not worth seeing for anyone at all",
    "good",
    "the cast is warm but the story is dull",
]
LIMITS: dict[str, Any] = {"max_input": 12, "max_label": 6}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([*TEXTS, "good very good bad not bad at all"] * 3, 90, 2, lowercase=True)


@pytest.fixture(scope="module")
def switch() -> nn.Module:
    return tiny_switch.model(output_router_logits=True)


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
        sliding_window=None,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config).eval()


def ranked(choices: list[str] | None = None, label: int = 0) -> pd.DataFrame:
    options = choices or ["good", "very good", "bad", "not bad at all"]
    return pd.DataFrame(
        {
            "idx": [f"r{row}" for row in range(len(TEXTS))],
            "input": TEXTS,
            "target": options[label],
            "choices": [list(options) for _ in TEXTS],
            "label": label,
            "references": [[options[label]] for _ in TEXTS],
            "group": "",
        }
    )


def asked(references: list[str]) -> pd.DataFrame:
    frame = ranked()
    frame["choices"] = [[] for _ in TEXTS]
    frame["label"] = -1
    frame["references"] = [list(references) for _ in TEXTS]
    frame["target"] = references[0]
    return frame


def one_by_one(model: Any, tokenizer: Any, prompt: str, choice: str, end: bool) -> tuple[float, int, list[int]]:
    """Log-likelihood of a choice by one unpadded forward pass, its number of tokens, and the argmax at each."""
    ids = tokenizer(choice)["input_ids"]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            source = torch.tensor([tokenizer(prompt, truncation=True, max_length=LIMITS["max_input"])["input_ids"]])
            targets = ids if end else ids[:-1]
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([[0, *targets[:-1]]])).logits[0]
        else:
            context = tokenizer(prompt)["input_ids"][:-1]
            whole = tokenizer(f"{prompt} {choice}")["input_ids"][:-1]
            assert whole[: len(context)] == context
            targets = whole[len(context) :] + ([1] if end else [])
            source = context[-LIMITS["max_input"] :]
            logits = model(input_ids=torch.tensor([source + targets])).logits[0, len(source) - 1 : -1]
    logs = logits.double().log_softmax(-1)
    total = sum(float(logs[place, token]) for place, token in enumerate(targets))
    return total, len(targets), logits.argmax(-1).tolist()


@pytest.fixture(params=["switch", "mixtral"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("protocol", ["rank", "rank_normalised"])
def test_rank_agrees_with_one_pass_per_choice(model: Any, tokenizer: Any, protocol: str, end: bool) -> None:
    examples = ranked()
    prepared = prepare(model, tokenizer, examples, protocol, batch_size=3, score_end=end, **LIMITS)
    found = choice_scores(model, prepared)
    wanted = []
    for text in TEXTS:
        alone = [one_by_one(model, tokenizer, text, choice, end) for choice in examples["choices"][0]]
        wanted.append([total / (count if protocol == "rank_normalised" else 1) for total, count, _ in alone])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    predictions = answer(model, prepared, show=False)
    best = [examples["choices"][0][max(range(4), key=lambda i: row[i])] for row in wanted]
    assert predictions["prediction"].tolist() == best
    assert predictions["correct"].tolist() == [one == "good" for one in best]
    assert predictions["idx"].tolist() == examples["idx"].tolist()


@pytest.mark.parametrize("protocol", ["rank", "generate", "paper_compat"])
def test_batch_size_changes_nothing(model: Any, tokenizer: Any, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_in(size: int) -> tuple[pd.DataFrame, Any]:
        prepared = prepare(model, tokenizer, ranked(), protocol, batch_size=size, **LIMITS)
        scores = torch.tensor(choice_scores(model, prepared)) if protocol == "rank" else None
        return answer(model, prepared, show=False), scores

    table, scores = asked_in(5)
    for size in (1, 2, 4):
        other, others = asked_in(size)
        pd.testing.assert_frame_equal(table, other)
        if scores is not None:
            torch.testing.assert_close(others, scores, rtol=0, atol=1e-5)
    monkeypatch.setattr("mcsmoe.evaluate.passes._LOGITS", 1)  # one decoder row at a time
    pd.testing.assert_frame_equal(table, asked_in(5)[0])


def test_generate_is_the_greedy_loop(model: Any, tokenizer: Any) -> None:
    wanted = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=LIMITS["max_input"])["input_ids"]
        if not model.config.is_encoder_decoder:
            ids = tokenizer(text)["input_ids"][:-1][-LIMITS["max_input"] :]
        made: list[int] = []
        while len(made) < LIMITS["max_label"]:
            with torch.no_grad():
                if model.config.is_encoder_decoder:
                    logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, *made]])).logits
                else:
                    logits = model(input_ids=torch.tensor([ids + made])).logits
            made.append(int(logits[0, -1].argmax()))
            if made[-1] == tokenizer.eos_token_id:
                made.pop()
                break
        wanted.append(tokenizer.decode(made, skip_special_tokens=True).strip())
    found = predict(model, tokenizer, asked(["good", "warm"]), "generate", batch_size=2, show=False, **LIMITS)
    assert found["prediction"].tolist() == wanted
    assert found["reference"].tolist() == ["good | warm"] * len(TEXTS)


def test_paper_compat_reads_the_argmax_fed_with_the_right_answer(model: Any, tokenizer: Any) -> None:
    examples = ranked(label=3)
    found = predict(model, tokenizer, examples, "paper_compat", batch_size=2, show=False, **LIMITS)
    for text, seen in zip(TEXTS, found["prediction"], strict=True):
        _, _, tokens = one_by_one(model, tokenizer, text, "not bad at all", end=True)
        tokens = tokens[: LIMITS["max_label"]]
        kept = tokens[: tokens.index(1)] if 1 in tokens else tokens
        assert seen == tokenizer.decode(kept, skip_special_tokens=True).strip()


class Scripted(nn.Module):
    """An encoder-decoder that always writes the same tokens, whatever it is fed; it stands in for a trained model."""

    def __init__(self, tokens: list[int], start: int = 0) -> None:
        super().__init__()
        from transformers.modeling_outputs import BaseModelOutput

        self.tokens, self.output = tokens, BaseModelOutput
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = type(
            "Config", (), {"is_encoder_decoder": True, "decoder_start_token_id": start, "vocab_size": 96}
        )
        self.calls = 0

    def get_encoder(self) -> Any:
        def encode(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            self.calls += len(input_ids)
            return self.output(last_hidden_state=torch.zeros(*input_ids.shape, 1))

        return encode

    def forward(self, decoder_input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*decoder_input_ids.shape, 96)
        for place in range(decoder_input_ids.shape[1]):
            logits[:, place, self.tokens[min(place, len(self.tokens) - 1)]] = 9.0
        return type("Output", (), {"logits": logits})


def test_answers_that_are_no_choice_are_wrong_counted_and_not_random(tokenizer: Any) -> None:
    dull = tokenizer("dull")["input_ids"]
    results = [
        predict(Scripted(dull), tokenizer, ranked(["good", "bad"]), "paper_compat", show=False, **LIMITS)
        for _ in range(2)
    ]
    pd.testing.assert_frame_equal(*results)
    assert results[0].attrs["unparsed"] == len(TEXTS)
    assert not results[0]["correct"].any()
    assert metrics.score(["accuracy", "f1"], results[0], positive="bad") == {"accuracy": 0.0, "f1": 0.0}


def test_what_follows_the_end_token_is_cut(tokenizer: Any) -> None:
    good, more = tokenizer("good")["input_ids"], tokenizer("very bad")["input_ids"]
    target = ranked(["good", "not bad at all"], label=1)
    found = predict(Scripted([*good, *more]), tokenizer, target, "paper_compat", show=False, **LIMITS)
    assert found["prediction"].tolist() == ["good"] * len(TEXTS)
    assert not found["correct"].any()
    assert found.attrs["unparsed"] == 0


def test_paper_compat_uses_one_reference_and_generate_all(tokenizer: Any) -> None:
    frame = asked(["bad", "Good!"])
    script = Scripted(tokenizer("good")["input_ids"])
    found = predict(script, tokenizer, frame, "paper_compat", show=False, metric="token_f1", **LIMITS)
    assert found["reference"].tolist() == ["bad"] * len(TEXTS)
    assert found["score"].tolist() == [0.0] * len(TEXTS)


def test_encoder_runs_once_per_example(tokenizer: Any) -> None:
    script = Scripted(tokenizer("good")["input_ids"])
    predict(script, tokenizer, ranked(), "rank", batch_size=2, show=False, **LIMITS)
    assert script.calls == len(TEXTS)


def test_normalising_takes_length_out(tokenizer: Any) -> None:
    # Every token of the choices is equally likely: raw likelihood prefers the shorter, the mean sees a tie.
    script, examples = Scripted([95]), ranked(["not bad at all", "good"])
    raw = predict(script, tokenizer, examples, "rank", show=False, **LIMITS)
    mean = predict(script, tokenizer, examples, "rank_normalised", show=False, **LIMITS)
    assert set(raw["prediction"]) == {"good"}
    assert set(mean["prediction"]) == {"not bad at all"}


def test_shared_rows_serve_every_choice() -> None:
    rows, owners = _cover([(5, 1), (6, 1), (5, 7, 1), (5,), (6,)])
    assert rows == [(5, 7), (6,)]
    assert owners == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("scores", "best"),
    [([-1.0, -1.0], 0), ([-2.0, -1.0, -1.0], 1), ([-1.0 - 1e-7, -1.0], 0), ([-1.001, -1.0], 1), ([-50.0001, -50.0], 0)],
)
def test_ties_go_to_the_lower_index(scores: list[float], best: int) -> None:
    assert best_choice(scores) == best


def test_equal_choices_tie(model: Any, tokenizer: Any) -> None:
    found = predict(model, tokenizer, ranked(["good", "GOOD"], label=1), "rank", show=False, **LIMITS)
    assert found["prediction"].tolist() == ["good"] * len(TEXTS)


def test_selector_is_the_metric_and_keeps_the_mode(model: Any, tokenizer: Any) -> None:
    prepared = prepare(model, tokenizer, ranked(["good", "bad"], 1), "rank", batch_size=4, metric="f1", **LIMITS)
    model.train()
    value = selector(prepared, positive="bad")(model)
    assert model.training
    model.eval()
    table = answer(model, prepared, show=False)
    assert value == pytest.approx(metrics.score(["f1"], table, positive="bad")["f1"])


def test_predictions_are_the_table(switch: Any, tokenizer: Any, tmp_path: Any) -> None:
    found = predict(switch, tokenizer, ranked(), "generate", show=False, **LIMITS)
    assert list(found.columns) == SCHEMAS["predictions"].names
    write_table(tmp_path / "p.parquet", found, "predictions")
    write_table(tmp_path / "e.parquet", ranked(), "examples")
    examples = read_table(tmp_path / "e.parquet", "examples")
    again = predict(switch, tokenizer, examples, "generate", show=False, **LIMITS)
    pd.testing.assert_frame_equal(read_table(tmp_path / "p.parquet", "predictions"), again, check_dtype=False)


def test_long_prompts_lose_their_end_or_their_beginning(switch: Any, mixtral: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[2])["input_ids"]
    encoder = Wording(switch, tokenizer, 5, 4).prompts([TEXTS[2]])[0]
    assert encoder == (*ids[:4], 1)
    decoder = Wording(mixtral, tokenizer, 5, 4).continued([TEXTS[2]], [["good"]], ended=False)[0]
    assert decoder.source == tuple(ids[:-1][-5:])


def _label(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label=-1)


@pytest.mark.parametrize(
    ("protocol", "change", "words"),
    [
        ("guess", lambda frame: frame, "protocol 'guess' is unknown"),
        ("rank", lambda frame: frame.iloc[:0], "the split is empty"),
        ("rank", _label, "label -1"),
        ("rank", lambda frame: frame.assign(idx="same"), "'same' occurs twice"),
        ("rank", lambda frame: asked(["good"]), "nothing to rank"),
        ("rank_normalised", lambda frame: ranked(["good", ""]), "empty choice"),
    ],
)
def test_bad_input_is_named(mixtral: Any, tokenizer: Any, protocol: str, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predict(mixtral, tokenizer, change(ranked()), protocol, show=False, **LIMITS)


def test_a_tokenizer_without_an_end_token_is_refused(switch: Any, tokenizer: Any) -> None:
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        predict(switch, endless, ranked(), "rank", show=False, **LIMITS)


def test_tokens_and_special_tokens_without_an_embedding_are_told(
    switch: nn.Module, mixtral: nn.Module, tokenizer: Any
) -> None:
    examples = ranked()
    for made, low in ((switch, 20), (mixtral, 20)):
        small = copy.deepcopy(made)
        small.resize_token_embeddings(low)  # type: ignore[operator]
        for protocol in ("rank", "generate"):
            with pytest.raises(
                ValueError, match=r"^example '.*' has token \d+ \('.*'\), and the model has 20 embeddings"
            ):
                predict(small, tokenizer, examples, protocol, batch_size=2, **LIMITS)
    padded = copy.deepcopy(tokenizer)
    padded.add_tokens([f"<unused {number}>" for number in range(100)])
    padded.add_special_tokens({"pad_token": "<new pad>"})
    with pytest.raises(ValueError, match=f"the tokenizer has token {padded.pad_token_id}"):
        predict(switch, padded, examples, "rank", batch_size=2, **LIMITS)
    # A decoder-only model is never shown its padding, so that its own tokens do.
    one, two = (predict(mixtral, made, examples, "rank", batch_size=2, **LIMITS) for made in (tokenizer, padded))
    pd.testing.assert_frame_equal(one, two)
