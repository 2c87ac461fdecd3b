"""The comparison of methods over seeds: against McNemar's test, against every flip of signs, and on tables of a run."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import fake_results
import numpy as np
import pandas as pd
import pytest

from mcsmoe.artefacts.tables import write_table
from mcsmoe.evaluate.confidence import mcnemar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import claims  # noqa: E402


def test_one_seed_is_mcnemars_test() -> None:
    one, other = np.random.default_rng(0).integers(0, 2, (2, 1, 60)).astype(float)
    difference, p_value, by_seed = claims.compared(one, other)
    assert by_seed == [pytest.approx(one.mean() - other.mean())]
    assert difference == by_seed[0]
    assert p_value == mcnemar(other[0] > 0, one[0] > 0)


def test_several_seeds_are_compared_by_every_flip_of_signs() -> None:
    """All 2^R of them, with few enough rows."""
    one, other = np.random.default_rng(1).integers(0, 2, (2, 3, 11)).astype(float)
    rows = (one - other).mean(axis=0)
    signs = np.array(list(itertools.product([-1, 1], repeat=len(rows))))
    exact = (abs(signs @ rows) >= abs(rows.sum()) - 1e-9).mean()
    difference, p_value, _ = claims.compared(one, other)
    assert difference == pytest.approx(rows.mean())
    assert p_value == pytest.approx(exact, abs=0.02)
    assert claims.compared(one, one)[1] == 1


def test_the_tables_show_what_a_run_answered(tmp_path: Path) -> None:
    right = {
        "full": [1, 1, 1, 1],
        "msmoe/2e/merged": [1, 0, 0, 0],
        "msmoe/2e/recovered": [1, 1, 1, 0],
        "pruning/2e/merged": [0, 0, 0, 0],
        "pruning/2e/recovered": [1, 0, 0, 0],
        "msmoe/4e/recovered": [0, 0, 0, 0],
    }
    for seed, (checkpoint, answers) in itertools.product((0, 1), right.items()):
        table = pd.DataFrame({"idx": list("abcd"), "reference": "x", "prediction": "x", "group": "", "score": 0.0})
        table["correct"] = np.array(answers, dtype=bool)
        write_table(
            tmp_path / "COPA" / f"seed{seed}" / f"{checkpoint}_evaluation" / "predictions.parquet", table, "predictions"
        )
    summary = fake_results.summary(("COPA",), ("full", "pruning", "msmoe"), (2,), (0, 1))
    write_table(tmp_path / "summary.parquet", summary, "summary")
    command = [sys.executable, ROOT / "docs" / "claims.py", "--results", tmp_path, "--task", "COPA"]
    shown = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout
    assert "seeds: 0, 1" in shown
    assert shown.index("`full`") < shown.index("`pruning`") < shown.index("`msmoe`")
    assert "| `msmoe` | 0.250 (0.250, 0.250) | -0.750 within noise |" in shown
    assert "| 0.750 (0.750, 0.750) | -0.250 within noise |" in shown
    assert "| M-SMoE over pruning | +25.0 (+25.0, +25.0) |" in shown
    assert "| +50.0 (+50.0, +50.0) |" in shown
    gone = subprocess.run([*map(str, command[:-1]), "MRPC"], capture_output=True, text=True, check=False)
    assert gone.returncode == 1
    assert "--task is 'MRPC'" in gone.stderr
