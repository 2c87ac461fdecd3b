"""Tasks of language: texts cut, tokenised, predicted and scored by document and domain."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import fake_results
import numpy as np
import pandas as pd
import pytest
import tiny_models
import tiny_switch
import torch
from torch.nn import functional

from mcsmoe.artefacts.tables import SCHEMAS, read_table, write_table
from mcsmoe.artefacts.values import _UNBOUNDED
from mcsmoe.data import packages, sources
from mcsmoe.data.collate import collate, tokenize
from mcsmoe.data.task import halves
from mcsmoe.data.tasks import LANGUAGE_METRICS, load_task
from mcsmoe.evaluate import documents, domains, metrics
from mcsmoe.evaluate.confidence import paired, verdict
from mcsmoe.train.tokenizer import train_tokenizer
from mcsmoe.types import IGNORED

TEXTS = [f"the {one} of the {two} is on the {three}" for one in "abcd" for two in "efg" for three in "hij"]
ROWS = pd.DataFrame(
    {
        "idx": [str(n) for n in range(len(TEXTS))],
        "domain": ["one" if n % 3 else "two" for n in range(len(TEXTS))],
        "text": TEXTS,
    }
)
EXAMPLES = load_task("Language").examples(ROWS, "validation")
LIMITS = {"max_input": 12, "max_label": 8}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 80, 4, lowercase=True)


@pytest.fixture(scope="module", params=["switch", "olmoe"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    if request.param == "switch":
        return tiny_switch.model(vocab_size=len(tokenizer)).eval()
    return tiny_models.model("olmoe", vocab_size=len(tokenizer)).eval()


# -- text ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [*TEXTS[:3], "a b", "ab", "one\n    two(three, four)\n", "  x  y "])
def test_halves_are_the_text_and_part_at_white_space(text: str) -> None:
    first, second = halves(text)
    assert first + second == text
    assert first
    assert second[0].isspace() or not any(letter.isspace() for letter in text.strip())


def test_code_and_docstrings_are_told_apart() -> None:
    source = '"""Module."""\nX = """no docstring"""\n\n\ndef f(a):\n    """Does\n\n    things."""\n    return a\n'
    code, text = packages.code_and_docstrings(source)
    assert text == "Module.\n\nDoes\n\nthings."
    assert "return a" in code
    assert "no docstring" in code
    assert "Does" not in code
    compile(code.replace("def f(a):\n", "def f(a):\n    0\n"), "code", "exec")


@pytest.mark.parametrize("characters", [20, 50, 10_000])
def test_pieces_are_the_text_but_for_its_end(characters: int) -> None:
    text = "\n".join(TEXTS)
    found = packages.pieces(text, characters)
    assert text.startswith("".join(found))
    assert max(map(len, found)) <= characters
    assert len(text) - len("".join(found)) < characters


def test_sources_are_the_same_on_every_machine_and_in_no_two_splits() -> None:
    source = {"packages": ["jinja2"], "characters": 300, "train_rows": 40, "validation_rows": 4}
    task = load_task("Language")
    train, again, held = (
        sources.load_split({"kind": "sources", **source}, task, split, seed)
        for split, seed in (("train", 0), ("train", 1), ("validation", 0))
    )
    pd.testing.assert_frame_equal(train, again)  # no seed decides
    assert (len(train), len(held)) == (40, 4)
    assert train["domain"].value_counts().to_dict() == {"code": 20, "docstrings": 20}
    files = [set(frame["idx"].str.partition("#")[0]) for frame in (train, held)]
    assert not files[0] & files[1]
    assert not held["idx"].str.partition("#")[0].duplicated().any() or held["domain"].nunique() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packages": ["no-such-package"]}, "'no-such-package', which is not installed"),
        ({"packages": [], "texts": {}}, "data.packages and data.texts are empty"),
        ({"texts": {"code": "a.txt"}}, "names domain 'code', which is that of packages"),
        ({"texts": {"prose": "absent.txt"}}, "absent.txt, which does not exist"),
        ({"train_rows": 10**9}, "lower it, or name more packages"),
    ],
)
def test_bad_sources_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources.load_split({"kind": "sources", "packages": ["jinja2"], **change}, load_task("Language"), "train", 0)


def test_domains_are_no_groups_that_stay_together() -> None:
    train, selection = sources.split_selection(EXAMPLES, 9, together=False)
    assert len(selection) == 9
    assert set(train["group"]) == {"one", "two"}


# -- tokens --------------------------------------------------------------------------------------------------------
def test_a_decoder_only_model_is_asked_for_the_next_token_everywhere(tokenizer: Any) -> None:
    found = tokenize(EXAMPLES, tokenizer, **LIMITS, causal=True)
    batch = collate(found, [0, 1, 2])
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape
    for row, text in enumerate(TEXTS[:3]):
        whole = tokenizer(text)["input_ids"][:-1][: sum(LIMITS.values())]
        assert ids[row, : len(whole)].tolist() == whole
        assert labels[row, : len(whole)].tolist() == [*whole[1:], IGNORED]
    assert found.label_counts.tolist()[:3] == [int((labels[row] != IGNORED).sum()) for row in range(3)]


def test_of_an_answer_only_its_tokens_are_asked_for(tokenizer: Any) -> None:
    rows = pd.DataFrame({"idx": ["0"], "input": ["the a of the"], "target": ["e"], "references": [["e"]]})
    found = collate(tokenize(rows, tokenizer, **LIMITS, causal=True), [0])
    answer = tokenizer("e")["input_ids"]
    asked = found["labels"][0][found["labels"][0] != IGNORED].tolist()
    assert asked == answer
    assert found["input_ids"][0, -len(answer) :].tolist()[1:] == answer[:-1]


# -- scores --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def brute(model: Any, tokenizer: Any, first: str, second: str) -> tuple[float, int]:
    """Nats of one document alone, token by token."""
    end = tokenizer.eos_token_id
    if model.config.is_encoder_decoder:
        inputs = [*tokenizer(first)["input_ids"][:-1][-(LIMITS["max_input"] - 1) :], end]
        target = tokenizer(second)["input_ids"][:-1][: LIMITS["max_label"]]
        decoder = torch.tensor([[0, *target[:-1]]])
        logits = model(input_ids=torch.tensor([inputs]), decoder_input_ids=decoder).logits[0]
    else:
        whole = tokenizer(first + second)["input_ids"][:-1][: sum(LIMITS.values())]
        logits, target = model(input_ids=torch.tensor([whole])).logits[0, :-1], whole[1:]
    return float(functional.cross_entropy(logits, torch.tensor(target), reduction="sum")), len(target)


def test_documents_are_scored_as_one_by_one(model: Any, tokenizer: Any) -> None:
    given = {"examples": EXAMPLES[:7], "batch_size": 3, **LIMITS, "show": False}
    found = documents.predict_texts(model, tokenizer, reference=model, continuations=4, **given)
    assert list(found.columns) == SCHEMAS["documents"].names
    for row, example in enumerate(EXAMPLES[:7].itertuples()):
        nats, tokens = brute(model, tokenizer, example.input, example.target)
        assert found["tokens"][row] == tokens
        assert found["nats"][row] == pytest.approx(nats, rel=1e-4)
    assert found["divergence"].max() < 1e-5
    assert found["agreement"].tolist() == found["tokens"].tolist()
    assert found["looping"].notna().sum() == 4
    value = documents.text_selector(model, tokenizer, EXAMPLES[:7], 3, **LIMITS)(model)
    assert value == pytest.approx(-found["nats"].sum() / found["tokens"].sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "looping", "share"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], False, 1.0),
        ([9, 1, 2, 1, 2, 1, 2, 1, 2], True, 3 / 6),
        ([5] * 4, True, 1.0),
        ([5] * 3, False, math.nan),
        ([1, 2] * 3 + [1], False, 2 / 4),
        (list(range(65)) * 4, False, 65 / 257),
        (list(range(64)) * 4, True, 64 / 253),
    ],
)
def test_loops_and_distinct_grams(ids: list[int], looping: bool, share: float) -> None:
    assert documents.loops(ids) is looping
    assert documents.distinct(ids) == pytest.approx(share, nan_ok=True)


def made_up(shift: float = 0.0, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 40, 60)
    nats = tokens * rng.uniform(3, 5, 60)
    group = np.where(np.arange(60) % 2, "code", "prose")
    lost = shift * tokens * np.where(group == "code", 2.0, 1.0)
    unknown = np.full(60, np.nan)
    return pd.DataFrame(
        {
            "idx": [str(n) for n in range(60)],
            "group": group,
            "tokens": tokens,
            "nats": nats + lost,
            "reference_nats": nats,
            "divergence": np.abs(lost),
            "agreement": tokens * 0.5,
            "looping": np.where(np.arange(60) < 10, 1.0, unknown),
            "distinct_4grams": np.where(np.arange(60) < 10, 0.25, unknown),
        }
    )


def test_metrics_are_sums_over_tokens_and_pairs_are_compared(tmp_path: Path) -> None:
    full, worse = made_up(), made_up(0.1)
    assert metrics.units("nats", worse).value() == pytest.approx(worse["nats"].sum() / worse["tokens"].sum())
    assert metrics.units("perplexity", full).value() == pytest.approx(
        math.exp(full["nats"].sum() / full["tokens"].sum())
    )
    assert metrics.units("looping", full).value() == 1.0
    assert metrics.units("distinct_4grams", full).value() == 0.25
    found = paired(full, worse, "nats", resamples=500)
    assert found.difference == pytest.approx(metrics.units("nats_lost", worse).value())
    assert found.low < found.difference < found.high
    assert found.verdict == "worse"
    assert paired(worse, full, "nats", resamples=500).verdict == "better"
    assert verdict(-0.1, 0.01, less_is_better=True) == "better"
    write_table(tmp_path / "documents.parquet", worse, "documents")
    assert len(read_table(tmp_path / "documents.parquet", "documents")) == 60


def test_domains_and_the_worst_of_them() -> None:
    found = dict(domains.scores(("nats", "nats_lost", "agreement"), made_up(0.1), 200, 0))
    assert set(found) == {
        *("nats", "nats_lost", "agreement", "nats/code", "nats/prose"),
        *("nats_lost/code", "nats_lost/prose", "nats_lost/worst"),
    }
    assert found["nats_lost/worst"] == found["nats_lost/code"]
    assert found["nats_lost/code"].value == pytest.approx(0.2)
    assert found["nats_lost/prose"].value == pytest.approx(0.1)


def test_names_of_metrics_agree() -> None:
    assert set(LANGUAGE_METRICS) <= set(metrics.METRICS)
    assert set(_UNBOUNDED) <= set(LANGUAGE_METRICS)
    assert set(_UNBOUNDED) < metrics.LESS_IS_BETTER <= set(LANGUAGE_METRICS)


def test_the_page_of_results_is_printed_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shifts = {
        "full": 0.0,
        "gram/8e/merged": 0.1,
        "gram-refit/8e/merged": 0.05,
        "4-bit/16e/merged": 0.01,
        "gram/4e/merged": 0.5,
    }
    for checkpoint, shift in shifts.items():
        table, folder = made_up(shift), tmp_path / "Language" / "seed0" / f"{checkpoint}_evaluation"
        write_table(folder / "predictions.parquet", table, "documents")
        labels = {
            "task": "Language",
            "variant": checkpoint.partition("/")[0],
            "experts": 8,
            "seed": 0,
            "stage": "merged",
        }
        more = {"split": "validation", "protocol": "language"}
        found = domains.scores(("nats", "nats_lost", "divergence", "agreement"), table, 200, 0)
        rows = [
            {**labels, **more, "metric": name, "value": one.value, "ci_low": one.low, "ci_high": one.high, "n": one.n}
            for name, one in found
        ]
        write_table(folder / "metrics.parquet", pd.DataFrame(rows), "metrics")
        costs = fake_results.cost(fake_results.summary(("Language",), ("full",), (8,), (0,)))
        taken = {"full": 2000, "4-bit": 500}.get(labels["variant"], 1000)
        write_table(
            tmp_path / "Language" / "seed0" / f"{checkpoint}_cost" / "cost.parquet",
            costs.assign(packed_bytes=taken),
            "cost",
        )
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
    import language

    language.main(tmp_path, "Language", [8])
    printed = capsys.readouterr().out
    order = [line.split("`")[1] for line in printed.splitlines() if line.startswith("| `")]
    assert order[:7] == [
        "4-bit",
        "gram-refit",
        "gram",
        "full",
        "4-bit",
        "gram-refit",
        "gram",
    ]  # the overview, then 8 experts
    assert "| +0.2000 ± 0.0000 |" in printed  # twice as much on code, and the same in every document
    assert "| refit of `gram` | +0.07" in printed
    assert printed.count("**confirmed**") == 1
    assert "| `gram-refit` over `4-bit` (0.00 MB, 0.00 MB) | -0.0" in printed
    with pytest.raises(ValueError, match="no evaluation of the full model"):
        language.main(tmp_path / "none", "Language", [8])
