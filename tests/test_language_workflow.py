"""A decoder-only model from scratch through the workflow, on the sources of an installed package: pruned, refitted, rounded, recovered."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.project import Project

from mcsmoe.artefacts.tables import read_table

pytestmark = pytest.mark.workflow

CONFIG = {
    "results": "results",
    "tasks": ["Language"],
    "experts": [3],
    "finetuned": False,
    "variants": ["full", "healed", "even", "2-bit"],
    "methods": {
        "healed": {"base": "gram", "refit": True, "recover": True, "mixture": {"code": 1, "docstrings": 1}},
        "even": {"base": "gram", "mixture": "max-min"},
    },
    "device": "cpu",
    "data": {
        "source": "sources",
        "packages": ["networkx"],
        "characters": 200,
        "train_rows": 120,
        "validation_rows": 12,
        "selection_rows": 8,
        "max_input": 32,
        "max_label": 32,
    },
    "model": {
        "architecture": {
            "family": "olmoe",
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 12,
            "num_heads": 2,
            "num_layers": 2,
            "num_experts": 4,
            "experts_per_token": 2,
        },
        "tokenizer": {"vocab_size": 300},
    },
    "pretrain": {"corpus": "tasks", "steps": 8, "batch_size": 8, "window": 32, "save_every": 0, "balance_weight": 0.05},
    "calibration": {"samples": 16, "batch_size": 8, "reservoir": 8},
    "recover": {"steps": 4, "batch_size": 8, "save_every": 0},
    "evaluate": {"batch_size": 12, "bootstrap": 100, "continuations": 2},
    "cost": {"batch_size": 2, "input_tokens": 8, "label_tokens": 2, "repeats": 1},
}


def test_every_stage_runs_and_everything_is_compared_by_document(tmp_path: Path) -> None:
    project = Project(tmp_path / "a clone", CONFIG)
    project.run()
    run = project.results / "Language" / "seed0"
    summary = read_table(project.results / "summary.parquet", "summary").set_index("variant")
    assert summary["metric"].unique().tolist() == ["nats"]
    assert summary["stage"].tolist() == ["full", "recovered", "merged", "merged"]
    assert summary["packed_bytes"]["2-bit"] < summary["packed_bytes"]["healed"] < summary["packed_bytes"]["full"]
    assert summary["parameters"]["2-bit"] == summary["parameters"]["full"]
    groups = read_table(run / "healed" / "3e" / "groups.parquet", "groups")
    assert groups.groupby("layer")["dominant"].sum().tolist() == [3, 3]
    log = next((project.results / "logs" / "reduce").rglob("*even*.log")).read_text()
    shares = [float(line.split("weight ")[1].split()[0]) for line in log.splitlines() if "domain " in line]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(1, abs=2e-3)
    documents = read_table(run / "healed" / "3e" / "recovered_evaluation" / "predictions.parquet", "documents")
    assert set(documents["group"]) == {"code", "docstrings"}
    full = read_table(run / "full_evaluation" / "predictions.parquet", "documents")
    assert documents["reference_nats"].tolist() == pytest.approx(full["nats"].tolist(), rel=1e-6)
    metrics = read_table(run / "full_evaluation" / "metrics.parquet", "metrics").set_index("metric")["value"]
    assert metrics["nats_lost"] == 0
    assert metrics["agreement"] == 1
    assert {"nats/code", "nats_lost/worst", "perplexity", "distinct_4grams"} <= set(metrics.index)
    layers = [name for name in metrics.index if name.startswith("layer_error/")]
    assert len(layers) == 2
    assert (metrics[layers] == 0).all()
    even = read_table(run / "even" / "3e" / "merged_evaluation" / "metrics.parquet", "metrics").set_index("metric")[
        "value"
    ]
    expected = {name.partition("/")[2]: even[name] for name in even.index if name.startswith("expected_error/")}
    assert len(expected) == 2
    assert all(0 < error < 1 and even[f"layer_error/{layer}"] > 0 for layer, error in expected.items())
    page = (project.results / "report.html").read_text()
    assert "error by layer, expected and measured" in page
    assert "Lost by domain" in page
    assert "error by layer, 3 experts on average" in page
    assert "Nothing to be done" in project.run()
