"""Layers for multi-token prediction: as many experts as the others have, the right ones, and nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint_faithful import PREDICTION, config_of, with_prediction
from torch import Tensor

from mcsmoe.artefacts.tensors import TensorInfo
from mcsmoe.checkpoint.prediction import fewer_experts
from mcsmoe.cli import main as cli


def tensors(stacked: bool, experts: int = 4) -> dict[str, Tensor]:
    """A block whose expert e has weights e + 1 times those of expert 0, apart from expert 0, which is the largest."""
    scales_E = torch.tensor([9.0, *range(2, experts + 1)])
    up_EFD, down_EDF = scales_E[:, None, None] * torch.ones(3, 2), scales_E[:, None, None] * torch.ones(2, 3)
    made = {
        "mtp.layers.0.mlp.gate.weight": torch.arange(experts)[:, None] * torch.ones(2),
        "mtp.layers.0.mlp.shared_expert.up_proj.weight": torch.ones(experts, 2),
        "mtp.norm.weight": torch.ones(experts),
    }
    if stacked:
        return made | {"mtp.layers.0.mlp.experts.up_proj": up_EFD, "mtp.layers.0.mlp.experts.down_proj": down_EDF}
    for expert in range(experts):
        made[f"mtp.layers.0.mlp.experts.{expert}.up_proj.weight"] = up_EFD[expert]
        made[f"mtp.layers.0.mlp.experts.{expert}.down_proj.weight"] = down_EDF[expert]
    return made


def fewer(found: Mapping[str, Tensor], after: int, sets: int = 1) -> dict[str, Tensor] | None:
    infos = {name: TensorInfo.of(tensor) for name, tensor in found.items()}
    kept = fewer_experts(infos, 4, after, sets, found.__getitem__)
    if kept is None:
        return None
    made = {name: kept.read(name, found.__getitem__) for name in kept.infos}
    assert {name: TensorInfo.of(tensor) for name, tensor in made.items()} == kept.infos
    return made


@pytest.mark.parametrize(("sets", "chosen"), [(1, [0, 3]), (2, [0, 3]), (4, None)])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_experts_with_the_largest_weights_stay(stacked: bool, sets: int, chosen: list[int] | None) -> None:
    if chosen is None:
        chosen, after = [0, 1, 2, 3], 4
    else:
        after = 2
    found = tensors(stacked)
    made = fewer(found, after, sets)
    assert made is not None
    assert made["mtp.layers.0.mlp.gate.weight"][:, 0].tolist() == chosen
    for name in ("mtp.layers.0.mlp.shared_expert.up_proj.weight", "mtp.norm.weight"):
        assert torch.equal(made[name], found[name]), "of as many rows as there are experts, but not the router's"
    if stacked:
        assert torch.equal(made["mtp.layers.0.mlp.experts.up_proj"], found["mtp.layers.0.mlp.experts.up_proj"][chosen])
        return
    for place, expert in enumerate(chosen):
        for matrix in ("up_proj", "down_proj"):
            one, two = (f"mtp.layers.0.mlp.experts.{number}.{matrix}.weight" for number in (place, expert))
            assert torch.equal(made[one], found[two])
    assert len([name for name in made if ".experts." in name]) == 2 * after


def test_a_block_that_does_not_hold_all_experts_is_not_guessed_at() -> None:
    found = tensors(stacked=False)
    del found["mtp.layers.0.mlp.experts.2.up_proj.weight"], found["mtp.layers.0.mlp.experts.2.down_proj.weight"]
    assert fewer(found, 2) is None
    strange = tensors(stacked=True) | {"mtp.layers.0.mlp.gate.weight": torch.ones(5, 2)}
    assert fewer(strange, 2) is None


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_a_pruned_model_predicts_ahead_or_says_that_it_does_not(mtp: str, tmp_path: Path) -> None:
    with_prediction(tmp_path / "model")
    ids = torch.randint(2, 96, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"input_ids": {row}}}\n' for row in ids))
    words = ("prune", tmp_path / "model", "--calibration", tmp_path / "rows.jsonl", "--experts", 4, "--mtp", mtp)
    cli.main([str(word) for word in (*words, "--out", tmp_path / "out")])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    ahead = {name: tensor for name, tensor in after.items() if name.startswith(PREDICTION)}
    config = config_of(tmp_path / "out")
    assert config["n_routed_experts"] == 4
    assert config["num_nextn_predict_layers"] == (1 if mtp == "keep" else 0)
    if mtp == "drop":
        assert not ahead
        return
    # The layer ahead is a copy of the last one: the same tensors, in the same shapes, as that one has now.
    last = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in after.items() if "layers.2." in name}
    assert {name: tensor.shape for name, tensor in last.items()} == {
        name: tensor.shape for name, tensor in ahead.items() if "eh_proj" not in name
    }
    gate = f"{PREDICTION}.mlp.gate.weight"
    chosen = [next(e for e in range(8) if torch.equal(before[gate][e], row)) for row in ahead[gate]]
    for place, expert in enumerate(chosen):
        matrix = f"{PREDICTION}.mlp.experts.{{}}.down_proj.weight"
        assert torch.equal(ahead[matrix.format(place)], before[matrix.format(expert)])
