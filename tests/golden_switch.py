"""The recorded model with what merging needs of each layer, and how recordings are compared. Not a test module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_switch import logits
from torch import Tensor, nn

from mcsmoe.adapters.base import Adapter
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.merge.base import MergeInputs
from mcsmoe.types import ExpertWeights, Grouping, Role

EPSILON = 1e-7  # added by the published code to every denominator
MERGE_TOLERANCE = 1e-6
LOGIT_TOLERANCE = 2e-5
ROLES = {"wi": Role.INPUT, "wo": Role.OUTPUT}


class Golden:
    """The recorded model, and of each layer what merging needs."""

    def __init__(self, folder: Path) -> None:
        from transformers import SwitchTransformersForConditionalGeneration

        self.folder = folder
        self.model: nn.Module = SwitchTransformersForConditionalGeneration.from_pretrained(folder / "model").eval()
        self.adapter: Adapter = adapter_for(self.model)
        self.layers = self.adapter.layers(self.model)
        self.batches = load_file(folder / "batches.safetensors")
        self.index = json.loads((folder / "merge" / "index.json").read_text())["variants"]
        self.usage = load_file(folder / "usage.safetensors")
        self.logits = load_file(folder / "merge" / "logits.safetensors")
        self.weights = {layer: self.adapter.read_experts(self.model, layer) for layer in self.layers}
        self.activation = {layer: self.adapter.activation(self.model, layer) for layer in self.layers}
        self.tokens, self.gates = self.collect("full")

    def inputs(self, kind: str, rows: int = 64) -> dict[str, Tensor]:
        return {name: self.batches[f"{kind}.{name}"][:rows] for name in ("input_ids", "attention_mask", "labels")}

    def collect(self, kind: str) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        tokens, gates = {}, {}
        with self.adapter.capture(self.model) as captured:
            logits(self.model, self.inputs(kind))
        for layer, routed in captured.batches.items():
            chosen = routed.chosen_TK[:, 0]
            tokens[layer] = [routed.inputs_TD[chosen == expert] for expert in range(8)]
            gates[layer] = [routed.weights_TK[chosen == expert, 0] for expert in range(8)]
        return tokens, gates

    def grouping(self, variant: str, layer: str) -> Grouping:
        """Groups of a variant; a group that holds no core expert is led by its lowest member."""
        entry = self.index[variant]
        alias, cores = entry["alias"][layer], entry.get("core_experts", {}).get(layer, [])
        leaders = sorted(set(alias))
        table = torch.tensor([leaders.index(expert) for expert in alias])
        leads = [
            next((core for core in cores if int(table[core]) == group), leaders[group]) for group in range(len(leaders))
        ]
        return Grouping(table, torch.tensor(leads))

    def recorded(self, variant: str, layer: str) -> ExpertWeights:
        stored = load_file(self.folder / "merge" / f"{variant}.safetensors")
        leaders = sorted({expert for expert in self.index[variant]["alias"][layer] if expert is not None})
        return stack(stored, layer, leaders)

    def merge_inputs(self, variant: str, layer: str, **changes: Any) -> MergeInputs:
        values: dict[str, Any] = {
            "layer": layer,
            "weights": self.weights[layer],
            "grouping": self.grouping(variant, layer),
            "frequency_E": self.usage[f"{'pad' if 'padbatch' in variant else 'full'}.{layer}"],
            "tokens": self.tokens[layer],
            "gates": self.gates[layer],
            "activation": self.activation[layer],
        }
        return MergeInputs(**(values | changes))

    def check_logits(self, variant: str, merged: dict[str, tuple[ExpertWeights, Tensor]]) -> None:
        """Install the merged layers, compare the logits of 16 rows of both batches, and put the experts back."""
        try:
            for layer, (weights, table) in merged.items():
                self.adapter.write_experts(self.model, layer, weights, table)
            for kind in ("full", "pad"):
                found = logits(self.model, self.inputs(kind, 16))
                assert (found - self.logits[f"{variant}.{kind}"]).abs().max() < LOGIT_TOLERANCE
        finally:
            for layer in self.layers:
                self.adapter.write_experts(self.model, layer, self.weights[layer], torch.arange(8))


def stack(stored: dict[str, Tensor], layer: str, experts: list[int]) -> ExpertWeights:
    return ExpertWeights(
        {name: torch.stack([stored[f"{layer}.experts.expert_{e}.{name}.weight"] for e in experts]) for name in ROLES},
        dict(ROLES),
    )


def difference(first: ExpertWeights, second: ExpertWeights) -> float:
    return max(float((first.tensors[name] - second.tensors[name]).abs().max()) for name in first.tensors)
