"""Groups recorded from the published implementation, from recorded usage and similarities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mcsmoe.grouping import plan
from mcsmoe.grouping.budget import adaptive
from mcsmoe.grouping.dominant import group_by_dominant
from mcsmoe.types import Grouping

pytestmark = pytest.mark.golden

FRAGILE = 1e-4  # below this gap between the best two leaders a recorded label is decided by rounding
Entry = dict[str, Any]


class Recorded:
    def __init__(self, folder: Path) -> None:
        self.entries: list[Entry] = json.loads((folder / "grouping.json").read_text())["entries"]
        self.usage = load_file(folder / "usage.safetensors")
        self.similarities = load_file(folder / "similarity.safetensors")
        self.layers = [
            name.removeprefix("full.") for name in self.usage if name.startswith("full.") and ".mb" not in name
        ]

    def of(self, *kinds: str) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry["kind"] in kinds)

    def inputs(self, entry: Entry) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        base = entry["base"] + (
            ".frozen" if f"full.{entry['base']}.frozen.{self.layers[0]}" in self.similarities else ""
        )
        similarity = {}
        for layer in self.layers:
            name = f"{base}.{layer}"
            similarity[layer] = self.similarities[name if name in self.similarities else f"{entry['batch']}.{name}"]
        return {layer: self.usage[f"{entry['batch']}.{layer}"] for layer in self.layers}, similarity


@pytest.fixture(scope="module")
def recorded(shared: Path) -> Recorded:
    return Recorded(shared / "golden")


def check(
    entry: Entry, made: dict[str, Grouping], skip: Callable[[str, int], bool] = lambda layer, expert: False
) -> int:
    """Every expert has the recorded leader; returns how many were compared."""
    compared = 0
    for layer, grouping in made.items():
        cores = entry["core_experts"][layer]
        assert grouping.dominant.tolist() == sorted(cores), (entry, layer)
        for expert, label in enumerate(entry["labels"][layer]):
            if not skip(layer, expert):
                assert int(grouping.dominant[grouping.expert_to_group[expert]]) == cores[label], (entry, layer, expert)
                compared += 1
    return compared


@pytest.mark.parametrize("average", [2, 3, 4])
def test_recorded_adaptive_groups(recorded: Recorded, average: int) -> None:
    bases = set()
    for entry in recorded.of("global"):
        if entry["average_num_groups"] == average and entry["min_core_similarity_gap"] > FRAGILE:
            check(entry, plan(*recorded.inputs(entry), average))
            bases.add(entry["base"])
    assert len(bases) >= 9


@pytest.mark.parametrize("average", [2, 3, 4])
def test_recorded_uniform_groups_but_for_the_experts_they_forget(recorded: Recorded, average: int) -> None:
    compared = forgotten = 0
    for entry in recorded.of("uniform"):
        reverse = entry["base"].endswith("reversed")  # uniform_reverse: cores are re-assigned
        if entry["average_num_groups"] != average or reverse or entry["min_core_similarity_gap"] <= FRAGILE:
            continue

        def skip(layer: str, expert: int, entry: Entry = entry) -> bool:
            return expert < average and expert not in entry["core_experts"][layer]

        compared += check(entry, plan(*recorded.inputs(entry), average, budget="uniform"), skip)
        # uniform_index: a forgotten expert keeps its own number as its label.
        for layer in recorded.layers:
            lost = [expert for expert in range(average) if skip(layer, expert)]
            assert [entry["labels"][layer][expert] for expert in lost] == lost
            forgotten += len(lost)
    assert compared > 300
    assert forgotten > 20


def test_recorded_spectral_groups(recorded: Recorded) -> None:
    found = 0
    for entry in recorded.of("spectral"):
        made = plan(*recorded.inputs(entry), entry["average_num_groups"], method="spectral", budget="uniform")
        for layer, grouping in made.items():
            ours, theirs = grouping.expert_to_group, torch.tensor(entry["labels"][layer])
            found += torch.equal(ours[:, None] == ours, theirs[:, None] == theirs)
    assert found == 24


def test_recorded_groups_of_chosen_layers(recorded: Recorded) -> None:
    compared = 0
    for entry in recorded.of("global:enc3_dec13", "global:enc_none_dec13"):
        left_out = [layer for layer, groups in entry["num_groups_per_layer"].items() if groups == 8]
        compared += check(entry, plan(*recorded.inputs(entry), entry["average_num_groups"], excluded=left_out))
    assert compared == 12 * 4 * 8


def test_recorded_capacities_hold_in_the_encoder(recorded: Recorded) -> None:
    compared = fitted = refused = 0
    for capacity in (3, 4, 5, 6):
        for entry in recorded.of(f"global:encoder_group_capacity{capacity}"):
            frequency, similarity = recorded.inputs(entry)
            dominant = adaptive(frequency, entry["average_num_groups"])
            for layer in recorded.layers:
                if "error" in entry and not layer.startswith("encoder"):
                    continue
                limit = capacity if layer.startswith("encoder") else None
                inputs = frequency[layer], similarity[layer], dominant[layer], limit
                if limit is not None and limit * len(dominant[layer]) < 8:
                    with pytest.raises(ValueError, match="capacity"):
                        group_by_dominant(*inputs, layer=layer)
                    refused += 1
                elif "error" in entry:
                    # encoder_exact_fit: what fits exactly is refused by the recording, not by us.
                    made = group_by_dominant(*inputs, layer=layer)
                    assert torch.bincount(made.expert_to_group).max() <= capacity
                    fitted += limit * len(dominant[layer]) == 8 if limit else 0
                else:
                    compared += check(entry, {layer: group_by_dominant(*inputs, layer=layer)})
    assert min(compared, fitted, refused) > 0
