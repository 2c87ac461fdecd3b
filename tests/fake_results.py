"""Tables like those of a finished workflow, made up but of the right shape, for the tests of what shows them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pandas as pd

from mcsmoe.artefacts.tables import SCHEMAS

LAYERS = tuple(
    f"{half}.block.{block}.layer.{2 if half == 'decoder' else 1}.mlp"
    for half in ("encoder", "decoder")
    for block in (1, 3)
)
EXPERTS = 8
_SCORES = {"full": 0.0, "msmoe": -0.004, "mcsmoe": -0.012, "averaging": -0.055, "pruning": -0.09, "dropping": -0.12}


def training_curve(steps: int, start: float, seed: int, *, kept: bool = False, teacher: bool = False) -> pd.DataFrame:
    """A loss that falls, with noise."""
    rng = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    task = start * np.exp(-3 * step / steps) + 0.05 + 0.08 * start * rng.random(steps)
    distillation = 0.4 * np.exp(-2 * step / steps) if teacher else np.full(steps, np.nan)
    return pd.DataFrame(
        {
            "step": step,
            "epoch": step / 100,
            "loss": task + 0.2 * np.nan_to_num(distillation),
            "task_loss": task,
            "distillation_loss": distillation,
            "balance_loss": np.full(steps, np.nan),
            "learning_rate": 1e-3 * (1 - step / steps),
            "kept_fraction": 0.1 + 0.9 * (1 - step / steps) ** 3 if kept else np.full(steps, np.nan),
            "seconds": np.full(steps, 0.05),
            "tokens": np.full(steps, 700),
        }
    )


def routing(seed: int, experts: int = EXPERTS, layers: tuple[str, ...] = LAYERS) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(experts, 4.0), len(layers))
    return pd.DataFrame(
        {
            "layer": np.repeat(layers, experts),
            "expert": np.tile(np.arange(experts, dtype=np.int32), len(layers)),
            "tokens": (share.ravel() * 9000).astype(np.int64),
            "frequency": share.ravel(),
            "router_probability": share.ravel(),
            "dropped": np.zeros(experts * len(layers), dtype=np.int64),
        }
    )


def groups(kept: int, seed: int, experts: int = EXPERTS, layers: tuple[str, ...] = LAYERS) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for index, layer in enumerate(layers):
        count = max(1, min(experts, kept + (1 if index % 2 else -1)))
        leaders = sorted(rng.choice(experts, count, replace=False).tolist())
        belongs = [leaders.index(e) if e in leaders else int(rng.integers(count)) for e in range(experts)]
        rows += [
            {"layer": layer, "expert": e, "group": g, "dominant": e in leaders, "weight": 1 / belongs.count(g)}
            for e, g in enumerate(belongs)
        ]
    return pd.DataFrame(rows)


def similarity(seed: int, experts: int = EXPERTS, layers: tuple[str, ...] = LAYERS) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for layer in layers:
        table = rng.random((experts, experts))
        table = (table + table.T) / 2
        np.fill_diagonal(table, 1.0)
        i, j = np.indices(table.shape).reshape(2, -1)
        part = {"layer": layer, "base": "router-logits", "expert_i": i, "expert_j": j, "similarity": table.ravel()}
        rows.append(pd.DataFrame(part))
    return pd.concat(rows, ignore_index=True)


def _size(variant: str, experts: int) -> float:
    return (0.3 + 0.7 * experts / EXPERTS) * (0.55 if variant == "mcsmoe" else 1.0)


def summary(
    tasks: tuple[str, ...] = ("sst2", "copa"),
    variants: tuple[str, ...] = ("full", "msmoe", "mcsmoe", "averaging", "pruning"),
    ratios: tuple[int, ...] = (4, 2),
    seeds: tuple[int, ...] = (0,),
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for task in tasks:
        rng = np.random.default_rng(zlib.crc32(task.encode()))
        for variant in variants:
            for experts in (EXPERTS,) if variant == "full" else ratios:
                for seed in seeds:
                    lost = _SCORES.get(variant, -0.02) * (1 if experts > 2 else 1.9)
                    value = round(float(0.936 + lost + 0.004 * rng.standard_normal()), 4)
                    size = _size(variant, experts)
                    full = variant == "full"
                    p = float("nan") if full else float(np.clip(np.exp(lost * 70), 1e-5, 1))
                    verdict = "reference" if full else ("within noise" if p > 0.05 else "worse")
                    stage = {"full": "full", "mcsmoe": "compressed"}.get(variant, "recovered")
                    rows.append(
                        {
                            "task": task, "variant": variant, "experts": experts, "seed": seed, "stage": stage,
                            "protocol": "rank", "metric": "accuracy", "value": value, "ci_low": value - 0.021,
                            "ci_high": min(1.0, value + 0.019), "n": 500, "difference": 0.0 if full else lost,
                            "p_value": p, "test": "" if full else "McNemar, exact", "verdict": verdict,
                            "parameters": int(3.1e6 * size), "bytes_on_disk": int(12.4e6 * size), "packed_bytes": int(6.2e6 * size),
                            "flops": int(2.3e9 * (0.8 if variant == "mcsmoe" else 1)),
                            "latency_ms": 14.0 + 6 * size, "peak_memory_bytes": int(4.1e8 + 5e7 * size),
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)[SCHEMAS["summary"].names]


def metrics(table: pd.DataFrame) -> pd.DataFrame:
    """Two metrics per row of ``summary``, the main one first."""
    shared = table[
        ["task", "variant", "experts", "seed", "stage", "protocol", "metric", "value", "ci_low", "ci_high", "n"]
    ]
    shared = shared.assign(split="validation")
    second = shared.assign(metric="f1", value=shared["value"] - 0.01)
    return pd.concat([shared, second], ignore_index=True)[SCHEMAS["metrics"].names]


def cost(table: pd.DataFrame) -> pd.DataFrame:
    shared = [
        "task",
        "variant",
        "experts",
        "seed",
        "stage",
        "parameters",
        "bytes_on_disk",
        "packed_bytes",
        "peak_memory_bytes",
        "flops",
    ]
    made = table[[*shared, "latency_ms"]].copy()
    made["nonzero_parameters"] = made["parameters"]
    made["latency_spread_ms"] = 0.6
    made["throughput"] = 8000 / made["latency_ms"]
    made["parameter_bytes"] = made["resident_memory_bytes"] = 4 * made["parameters"]
    made["flops_per_second"] = made["flops"] / made["latency_ms"] * 1000
    made["generate_latency_ms"] = 3 * made["latency_ms"]
    made["generate_latency_spread_ms"] = 1.2
    made["generate_tokens_per_second"] = 64000 / made["generate_latency_ms"]
    made = made.assign(batch_size=8, input_tokens=128, label_tokens=8, threads=1, device="cpu", dtype="float32")
    made["experts_per_layer"] = [[int(experts)] * len(LAYERS) for experts in made["experts"]]
    return made[SCHEMAS["cost"].names]


def benchmarks() -> pd.DataFrame:
    seconds = {
        "prepare": [95.0],
        "finetune": [61.0, 44.0],
        "recover": [18.0, 17.5, 16.0, 18.4],
        "compress": [31.0, 29.0],
    }
    seconds |= {"evaluate": [4.0] * 9, "profile_cost": [6.0] * 9, "merge": [3.1] * 4, "permute": [4.4, 4.1]}
    rows = [(rule, f"job {i}", s, 400.0 + 10 * s) for rule, times in seconds.items() for i, s in enumerate(times)]
    return pd.DataFrame(rows, columns=["rule", "wildcards", "seconds", "max_rss"])


def curves(table: pd.DataFrame, steps: int = 200) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Training curves of the stages that each row of ``summary`` went through."""
    made: list[tuple[dict[str, Any], pd.DataFrame]] = []
    for number, row in enumerate(table.itertuples()):
        labels = {"task": row.task, "variant": row.variant, "experts": row.experts, "seed": row.seed}
        if row.variant == "full":
            made.append(({**labels, "stage": "pretrain"}, training_curve(steps, 6.0, 1)))
            made.append(({**labels, "stage": "finetune"}, training_curve(steps, 2.5, number)))
        elif row.variant == "mcsmoe":
            made.append(({**labels, "stage": "compress"}, training_curve(steps, 1.2, number, kept=True, teacher=True)))
        else:
            made.append(({**labels, "stage": "recover"}, training_curve(steps, 1.5, number, teacher=True)))
    return made
