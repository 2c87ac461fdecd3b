"""Recorded decompositions, schedules, losses and trainings of the published implementation, rebuilt from our parts.

Where ours differs on purpose the published order of operations is put together here: importance that lags a step and is
taken with the weights after the optimiser's step, the row at the threshold kept, padding in the distillation term,
layer norms decayed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_switch
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mcsmoe.adapters.switch import SwitchAdapter
from mcsmoe.compress.lowrank import decompose, factored_parameters, stable_rank
from mcsmoe.compress.residual import KeptSchedule, ResidualPruner
from mcsmoe.modules import residuals
from mcsmoe.train.losses import cross_entropy_sum, distillation_sum
from mcsmoe.train.objectives import freeze_routers
from mcsmoe.types import ExpertWeights, Role

pytestmark = pytest.mark.golden

ROLES = {"wi": Role.INPUT, "wo": Role.OUTPUT}
STUDENT = "freq_normal_aligned_avg3"
LOSS = 5e-6  # the recording itself moves by 1e-6 under noise of rounding size
LOGITS = 1e-4  # and its final logits by 5e-5


class Golden:
    """The recorded teacher, student and batches."""

    def __init__(self, folder: Path) -> None:
        from transformers import SwitchTransformersForConditionalGeneration

        self.folder = folder
        self.adapter = SwitchAdapter()
        self.batches = load_file(folder / "batches.safetensors")
        self.alias = json.loads((folder / "merge" / "index.json").read_text())["variants"][STUDENT]["alias"]
        self.teacher: nn.Module = SwitchTransformersForConditionalGeneration.from_pretrained(folder / "model").eval()
        self.layers = self.adapter.layers(self.teacher)
        self._write(self.teacher, "permutation/aligned_weight_wo1", {layer: list(range(8)) for layer in self.layers})

    def _write(self, model: nn.Module, file: str, alias: dict[str, list[int]]) -> None:
        stored = load_file(self.folder / f"{file}.safetensors")
        for layer in self.layers:
            leaders = sorted(set(alias[layer]))
            tensors = {
                name: torch.stack([stored[f"{layer}.experts.expert_{expert}.{name}.weight"] for expert in leaders])
                for name in ROLES
            }
            table = torch.tensor([leaders.index(expert) for expert in alias[layer]])
            merged = len(leaders) < len(alias[layer])
            self.adapter.write_experts(model, layer, ExpertWeights(tensors, dict(ROLES)), table if merged else None)

    def student(self) -> nn.Module:
        made = copy.deepcopy(self.teacher)
        self._write(made, f"merge/{STUDENT}", self.alias)
        return made

    def compressed(self, rank: int, layers: list[str] | None = None) -> nn.Module:
        made = self.student()
        for layer in self.layers if layers is None else layers:
            weights, table = self.adapter.read_experts(made, layer), self.adapter.expert_to_group(made, layer)
            factors = {name: decompose(weights.tensors[name], rank, f"{layer}: {name}") for name in ROLES}
            self.adapter.write_compressed(made, layer, factors, {}, table)
        return made

    def inputs(self, kind: str, rows: list[int] | slice = slice(None)) -> dict[str, Tensor]:
        return {name: self.batches[f"{kind}.{name}"][rows] for name in ("input_ids", "attention_mask", "labels")}

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def stacked_rows(self, stored: dict[str, Tensor], name: str) -> Tensor:
        """A recorded value per row, stacked over groups, for one of our residuals (named layer.experts....<wi|wo>...)."""
        layer, rest = name.split(".experts.")
        matrix = rest.split(".")[-2]
        return torch.stack(
            [stored[f"{layer}.experts.expert_{e}.{matrix}.sparse.weight"] for e in sorted(set(self.alias[layer]))]
        )


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    torch.set_num_threads(1)
    return Golden(shared / "golden")


def published_terms(
    golden: Golden, student: nn.Module, inputs: dict[str, Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """(task, distillation): a mean over labels, and 0.2 times a sum over all positions, padding too, over rows."""
    with torch.no_grad():
        teacher_BTV = golden.teacher(**inputs).logits
    student_BTV = student(**inputs).logits
    labels = inputs["labels"]
    task = cross_entropy_sum(student_BTV, labels) / (labels != -100).sum()
    divergence = distillation_sum(student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1), temperature)
    return task, 0.2 * divergence / len(labels)


# -- decomposition -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_decomposition(golden: Golden, name: str, rank: int) -> None:
    stored = golden.tensors("losparse/decomposition")
    made = decompose(stored[f"{name}.W"][None], rank)
    # The product is determined up to rounding over the gap behind the last singular value kept.
    tolerance = max(2e-5, 1e-6 / golden.json("losparse/losparse")[f"{name}.rank{rank}"]["sigma_gap"])
    assert (made.u_GoR @ made.v_GRi - stored[f"{name}.rank{rank}.LR"]).abs().max() < tolerance
    assert (made.residual_Goi - stored[f"{name}.rank{rank}.residual"]).abs().max() < tolerance
    error = golden.json("losparse/losparse")[f"{name}.rank{rank}"]["frobenius_error"]
    assert float(made.residual_Goi.norm()) == pytest.approx(error, rel=1e-6)


def test_substituted_logits_losses_and_parameter_counts(golden: Golden) -> None:
    recorded, logits = golden.json("losparse/losparse"), golden.tensors("losparse/substituted_logits")
    encoder3 = [layer for layer in golden.layers if "encoder.block.3" in layer or layer.startswith("decoder")]
    for case, layers in (("rank4", None), ("rank4_enc3", encoder3), ("rank4_lowrank_only", None)):
        model = golden.compressed(4, layers)
        if case == "rank4_lowrank_only":
            for residual in residuals(model).values():
                residual.data.zero_()
        found = tiny_switch.logits(model, golden.inputs("full", slice(16)))
        assert (found - logits[f"{case}.logits"]).abs().max() < 5e-5
        inputs = golden.inputs("full")
        with torch.no_grad():
            loss = model(**inputs, output_router_logits=True).loss  # includes the router losses, as recorded
        assert float(loss) == pytest.approx(recorded[f"substitute.{case}"]["loss.full"], abs=LOSS)
        if layers is None:
            kept = 0.0 if "only" in case else 1.0
            merged = sum(len(set(alias)) for alias in golden.alias.values())
            rest = sum(p.numel() for p in model.parameters()) - sum(
                p.numel() for n, p in model.named_parameters() if ".projections." in n
            )
            factored = factored_parameters(64, 32, 4, kept) + factored_parameters(32, 64, 4, kept)
            assert rest + merged * factored == recorded[f"substitute.{case}"]["num_parameters"]


def test_stable_rank(golden: Golden) -> None:
    recorded = golden.json("stable_rank")
    compared = 0
    for case, model in (("original", None), (STUDENT, golden.student())):
        for layer in golden.layers:
            if model is None:
                stored = golden.tensors("model/model")
                weights = {
                    n: torch.stack([stored[f"{layer}.experts.expert_{e}.{n}.weight"] for e in range(8)]) for n in ROLES
                }
                experts = list(range(8))
            else:
                weights = golden.adapter.read_experts(model, layer).tensors
                experts = sorted(set(golden.alias[layer]))
            for name in ROLES:
                for expert, value in zip(experts, stable_rank(weights[name]).tolist(), strict=True):
                    key = f"{layer}.experts.expert_{expert}.{name}.weight"
                    assert value == pytest.approx(recorded[case][key], rel=1e-5)
                    compared += 1
    assert compared == 2 * 4 * 8 + 2 * 12


# -- schedule ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", range(4))
def test_schedule(golden: Golden, case: int) -> None:
    recorded = golden.json("losparse/schedule")[case]
    config, steps, expected = recorded["config"], recorded["total_step"], recorded["threshold"]
    warmup = config["initial_warmup"] * config["warmup_steps"]
    cooldown = config["final_warmup"] * config["warmup_steps"]
    schedule = KeptSchedule(config["final_threshold"], steps, warmup, cooldown)
    kept = [schedule.kept(step) for step in range(len(expected))]
    if warmup + cooldown < steps:
        assert schedule.phases == (warmup, cooldown)
        assert kept == pytest.approx(expected, abs=1e-12)
    else:
        # schedule_jump: no step is left for the cubic, and the recording falls from 1 to the end in one step.
        assert set(expected) == {1.0, config["final_threshold"]}
        assert len(set(kept)) > steps // 2 - 2
        assert [1.0 if step <= warmup else config["final_threshold"] for step in range(steps)] == expected


# -- losses ------------------------------------------------------------------------------------------------------
def test_distillation_losses(golden: Golden) -> None:
    student = golden.student()
    for entry in golden.json("kd")["entries"]:
        if entry["hd_lambda"]:
            continue
        inputs = golden.inputs(entry["batch"])
        with torch.no_grad():
            task, divergence = published_terms(golden, student, inputs, entry["kd_temperature"])
        assert float(task) == pytest.approx(entry["task_loss"], abs=2e-6)
        assert float(divergence) == pytest.approx(entry["kd_loss"], abs=2e-6)
        assert float(task + divergence) == pytest.approx(entry["loss"], abs=LOSS)
        labelled = inputs["labels"] != -100
        if not labelled.all():
            # Ours leaves the padding out, and so is smaller.
            ours_NV, theirs_NV = (tiny_switch.logits(m, inputs)[labelled] for m in (student, golden.teacher))
            ours = 0.2 * distillation_sum(ours_NV, theirs_NV, entry["kd_temperature"]) / len(labelled)
            assert float(ours) < 0.95 * entry["kd_loss"]


# -- 20 steps ----------------------------------------------------------------------------------------------------
def train(
    golden: Golden, student: nn.Module, log: list[dict[str, Any]], after: Callable[[int], None] = lambda step: None
) -> list[float]:
    """The published steps on ``student``; ``after`` runs between the optimiser's step and the clearing of gradients."""
    freeze_routers(student, golden.adapter)
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    # Meant to spare biases and layer norms, the published list spares names with "bias" or "LayerNorm" in them.
    groups = [
        {"params": [p for name, p in named if "bias" not in name], "weight_decay": 0.01},
        {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    losses = []
    for entry in log:
        step = entry["step"]
        for group in optimizer.param_groups:
            group["lr"] = entry["lr"]
        task, divergence = published_terms(golden, student, golden.inputs("full", entry["rows"]), 2.0)
        loss = task + divergence
        loss.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def task_loss(golden: Golden, student: nn.Module) -> float:
    inputs = golden.inputs("full")
    return float(cross_entropy_sum(tiny_switch.logits(student, inputs), inputs["labels"]) / inputs["labels"].numel())


def test_recovery_20_steps(golden: Golden) -> None:
    recorded = golden.json("train/kd_recovery20")
    student = golden.student()
    losses = train(golden, student, recorded["log"])
    assert losses == pytest.approx([entry["loss"] for entry in recorded["log"]], abs=LOSS)
    found = tiny_switch.logits(student, golden.inputs("full", slice(16)))
    assert (found - golden.tensors("train/kd_recovery20")["final.logits"]).abs().max() < LOGITS
    assert task_loss(golden, student) == pytest.approx(recorded["final_loss_full_batch"], abs=LOSS)


class PublishedSchedule:
    """Our schedule, but the row that holds the k-th smallest entry is kept, k = int(n (1 - P))."""

    def __init__(self, schedule: KeptSchedule, entries: int) -> None:
        self.schedule, self.entries = schedule, entries

    def kept(self, step: int) -> float:
        fraction = self.schedule.kept(step)
        return fraction if fraction == 1.0 else (self.entries - int(self.entries * (1 - fraction)) + 1) / self.entries

    def finished(self, step: int) -> bool:
        return self.schedule.finished(step)


def test_compression_20_steps(golden: Golden) -> None:
    recorded, stored = golden.json("train/losparse20"), golden.tensors("train/losparse20")
    student = golden.compressed(recorded["rank"])
    sparse = residuals(student)
    schedule = PublishedSchedule(KeptSchedule(0.25, 20, 2, 8), sum(r.numel() for r in sparse.values()))
    pruner = ResidualPruner(sparse, schedule)  # type: ignore[arg-type]
    log = recorded["log"]

    def after(step: int) -> None:
        # Importance is taken after the optimiser's step, and counts only from the next step on.
        known = pruner.state_dict()
        pruner.observe()
        seen = pruner.state_dict()
        pruner.load_state_dict(known)
        pruner.apply(step)
        pruner.load_state_dict(seen)
        entry = log[step]
        assert schedule.schedule.kept(step) == pytest.approx(entry["threshold"])
        assert sum(int((r != 0).sum()) for r in sparse.values()) == entry["sparse_nonzero"]
        assert sum(sum(rows) for rows in pruner.kept_rows().values()) == entry["rows_nonzero"]
        if step in (5, 19):
            for name, residual in sparse.items():
                prefix = f"step{step}"
                masks, lagging, taken = (
                    golden.stacked_rows(
                        {k.removeprefix(f"{prefix}.{part}."): t for k, t in stored.items() if f"{prefix}.{part}." in k},
                        name,
                    )
                    for part in ("row_mask", "exp_avg_ipt", "importance")
                )
                assert torch.equal((residual != 0).any(dim=2), masks.bool())
                assert torch.allclose(known[name], lagging.mean(dim=2), rtol=1e-3, atol=1e-9)
                new = (seen[name] - 0.85 * known[name]) / 0.15
                assert torch.allclose(new, taken.mean(dim=2), rtol=2e-3, atol=1e-8)

    losses = train(golden, student, log, after)
    assert losses == pytest.approx([entry["loss"] for entry in log], abs=LOSS)
    for name, residual in sparse.items():
        last = golden.stacked_rows(
            {k.removeprefix("final."): t for k, t in stored.items() if k.startswith("final.")}, name
        )
        assert (residual - last).abs().max() < 1e-4
    found = tiny_switch.logits(student, golden.inputs("full", slice(16)))
    assert (found - stored["final.logits"]).abs().max() < LOGITS
    assert task_loss(golden, student) == pytest.approx(recorded["final_loss_full_batch"], abs=LOSS)


def test_ours_masks_a_step_earlier_and_loses_no_more(golden: Golden) -> None:
    # The order of operations of the training loop, on the recorded student: not the recorded rows, and no worse a loss.
    recorded = golden.json("train/losparse20")
    student = golden.compressed(recorded["rank"])
    pruner = ResidualPruner(residuals(student), KeptSchedule(0.25, 20, 2, 8))
    freeze_routers(student, golden.adapter)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-3, (0.9, 0.98), 1e-6)
    kept = 1.0
    for entry in recorded["log"]:
        optimizer.param_groups[0]["lr"] = entry["lr"]
        loss = sum(published_terms(golden, student, golden.inputs("full", entry["rows"]), 2.0))
        loss.backward()  # type: ignore[union-attr]
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        kept = pruner.apply(entry["step"])
    assert 0.25 <= kept < 0.25 + 64 / 49152
    assert task_loss(golden, student) < recorded["final_loss_full_batch"] + 0.005
