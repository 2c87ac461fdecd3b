"""Claims on language models: one document counts once however many seeds, p-values are corrected, seeds must say the same."""

from __future__ import annotations

import sys
from pathlib import Path

import fake_results
import numpy as np
import pandas as pd
import pytest

from mcsmoe.artefacts.tables import write_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import language


def documents(folder: Path, nats_N: np.ndarray) -> Path:
    """A finished evaluation beside its cost, of texts of 50 tokens in two domains."""
    count = len(nats_N)
    table = pd.DataFrame(
        {
            "idx": [str(n) for n in range(count)],
            "group": ["code" if n % 2 else "prose" for n in range(count)],
            "tokens": 50,
            "nats": 50 * nats_N,
        }
    )
    empty = ("reference_nats", "divergence", "agreement", "looping", "distinct_4grams")
    write_table(folder / "predictions.parquet", table.assign(**dict.fromkeys(empty, np.nan)), "documents")
    return folder


def test_seeds_are_averaged_and_their_documents_counted_once(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    base_SN = 3 + draw.random((3, 40))
    gain_SN = 0.1 + 0.05 * draw.standard_normal((3, 40))
    one = {seed: documents(tmp_path / f"one{seed}", base_SN[seed] - gain_SN[seed]) for seed in range(3)}
    other = {seed: documents(tmp_path / f"other{seed}", base_SN[seed]) for seed in range(3)}
    made, by_seed = language.compared(one, other)
    assert by_seed == pytest.approx(gain_SN.mean(axis=1).tolist())
    assert -made.difference == pytest.approx(gain_SN.mean())
    assert made.n == 40
    # Of documents, and not of documents times seeds.
    assert made.high - made.low == pytest.approx(2 * 1.96 * gain_SN.mean(axis=0).std() / 40**0.5, rel=0.1)
    made, by_seed = language.compared(one, other, "code")
    assert by_seed == pytest.approx(gain_SN[:, 1::2].mean(axis=1).tolist())
    made, by_seed = language.compared({1: one[1]}, other)
    assert len(by_seed) == 1


def test_the_correction_is_holms() -> None:
    """The closed form: the k-th smallest of m is held against .05 / (m - k)."""
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert language.corrected(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert language.corrected([0.5, 0.9]) == [1.0, 1.0]
    assert language.corrected([]) == []


@pytest.mark.parametrize(
    ("gain", "noise", "expected"),
    [
        ([0.1, 0.1, 0.1], 0.01, "confirmed"),
        ([-0.1, -0.1, -0.1], 0.01, "refuted"),
        ([0.3, 0.1, -0.05], 0.01, "not decided"),
        ([0.3, 0.1, 0.0], 0.0, "not decided"),  # both chose the same on one model, which says neither
        ([-0.3, -0.1, 0.0], 0.0, "not decided"),
    ],
)
def test_a_claim_stands_where_every_seed_says_the_same(
    gain: list[float], noise: float, expected: str, tmp_path: Path
) -> None:
    draw = np.random.default_rng(1)
    one = {s: documents(tmp_path / f"1{s}", 3 - gain[s] + noise * draw.standard_normal(30)) for s in range(3)}
    other = {s: documents(tmp_path / f"2{s}", np.full(30, 3.0)) for s in range(3)}
    claim = language.Claim("REAM over REAP", 4, *language.compared(one, other))
    assert language.verdict(claim, claim.made.p_value) == expected
    assert language.verdict(claim, 0.2) == "not decided"
    assert f"**{expected}**" in list(language.claims([claim]))[2]


def test_fewer_bits_are_those_that_take_no_more_bytes(tmp_path: Path) -> None:
    sizes = {"full": 2000, "gram-refit": 1000, "8-bit": 1001, "4-bit": 600, "2-bit": 300}
    place = tmp_path / "Language" / "seed0"
    for method, taken in sizes.items():
        kept = "16e" if method.endswith("bit") else "8e"
        folder = place / "full_evaluation" if method == "full" else place / method / kept / "merged_evaluation"
        documents(folder, np.full(30, 3.0 + taken / 1e4))
        write_table(
            folder / "metrics.parquet",
            fake_results.metrics(fake_results.summary(("Language",), ("full",), (8,), (0,))),
            "metrics",
        )
        cost = fake_results.cost(fake_results.summary(("Language",), ("full",), (8,), (0,))).assign(packed_bytes=taken)
        write_table(language.costs(folder), cost, "cost")
    documents(place / "unfinished" / "8e" / "merged_evaluation", np.full(30, 3.0))
    folders = language.found(tmp_path, "Language", 8)
    assert set(folders) == set(sizes)
    (claim,) = language.claims_of(folders, 8)
    assert claim.name == "`gram-refit` over `4-bit` (0.00 MB, 0.00 MB)"
    assert claim.by_seed == pytest.approx([-0.04])
