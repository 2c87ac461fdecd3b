"""The paper's protocol in the data: HotpotQA's gold paragraphs only, and selection on the split that is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

SCRIPTS = Path(__file__).resolve().parents[1] / "workflow_scripts"


def script(name: str, *words: str | Path) -> None:
    subprocess.run([sys.executable, SCRIPTS / f"{name}.py", *map(str, words)], check=True, capture_output=True)


def prepared(folder: Path, protocol: str) -> dict[str, pd.DataFrame]:
    out = folder / protocol
    raw = ["--train-file", folder / "train.parquet", "--validation-file", folder / "validation.parquet"]
    names = ("train", "selection", "validation")
    written = [word for name in names for word in (f"--{name}", out / f"{name}.parquet")]
    script("prepare_data", "--task", "HotpotQA", *raw, *written, "--selection-rows", "10", "--protocol", protocol)
    return {name: pd.read_parquet(out / f"{name}.parquet") for name in names}


def test_paper_compat_reads_gold_paragraphs_and_selects_on_the_reported_split(tmp_path: Path) -> None:
    files = ["--train", tmp_path / "train.parquet", "--validation", tmp_path / "validation.parquet"]
    script("generate_data", "--task", "HotpotQA", *files, "--train-rows", "40", "--validation-rows", "12")
    ours, compat = prepared(tmp_path, "auto"), prepared(tmp_path, "paper_compat")

    assert compat["selection"].equals(compat["validation"])
    assert len(compat["train"]) == 40
    assert set(ours["selection"]["idx"]) & set(ours["validation"]["idx"]) == set()
    assert len(ours["train"]) == 30

    raw = pd.read_parquet(tmp_path / "validation.parquet").set_index("id")
    for ours_row, compat_row in zip(ours["validation"].itertuples(), compat["validation"].itertuples(), strict=True):
        titles = set(raw.loc[str(ours_row.idx), "supporting_facts"]["title"])
        others = set(raw.loc[str(ours_row.idx), "context"]["title"]) - titles
        assert all(f"{title}:" in str(compat_row.input) for title in titles)
        assert others
        assert not any(f"{title}:" in str(compat_row.input) for title in others)
        assert all(f"{title}:" in str(ours_row.input) for title in titles | others)
