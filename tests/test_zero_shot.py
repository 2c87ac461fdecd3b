"""A decoder-only model through the workflow with nothing trained: taken as it is, merged, and both scored."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import tiny_models
from faults.project import TINY, Project

from mcsmoe.artefacts.tables import read_table
from mcsmoe.checkpoint.save import save_model
from mcsmoe.data.synthetic import corpus
from mcsmoe.train.tokenizer import train_tokenizer

pytestmark = pytest.mark.workflow


def test_a_decoder_only_model_is_merged_and_scored_untrained(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(list(corpus(seed=0, rows=400)), vocab_size=300, sentinels=4, lowercase=True)
    folder = tmp_path / "a model"
    save_model(tiny_models.model("olmoe", vocab_size=len(tokenizer)), folder, tokenizer, {})
    left_out = ("pretrain", "finetune", "recover", "compress")
    project = Project(
        tmp_path / "a clone",
        {key: value for key, value in TINY.items() if key not in left_out}
        | {
            "zero_shot": True,
            "tasks": ["COPA", "MRPC"],
            "experts": [3],
            "variants": ["full", "msmoe", "pruning"],
            "model": {"checkpoint": str(folder)},
        },
    )
    project.run()
    assert "Nothing to be done" in project.run()

    summary = read_table(project.results / "summary.parquet", "summary")
    assert list(zip(summary["task"], summary["variant"], strict=True)) == [
        (task, variant) for task in ("COPA", "MRPC") for variant in ("full", "msmoe", "pruning")
    ]
    for task in ("COPA", "MRPC"):
        run = project.results / task / "seed0"
        assert (run / "full" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        groups = read_table(run / "msmoe" / "3e" / "groups.parquet", "groups")
        assert groups.groupby("layer")["dominant"].sum().mean() == 3
        routing = read_table(run / "routing.parquet", "routing")
        assert (routing.groupby("layer")["tokens"].sum() > 0).all()
        scored = pd.read_parquet(run / "msmoe" / "3e" / "merged_evaluation" / "predictions.parquet")
        assert len(scored) == TINY["data"]["validation_rows"]
    made = {path.name for path in (project.results / "benchmarks").iterdir()}
    assert "take_full" in made
    assert not made & {"finetune", "recover", "compress", "prune", "cache_teacher"}
