"""``mcsmoe prune``: what is written is the model with fewer experts, and what is refused is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_line import refused, run
from torch import Tensor, nn

import mcsmoe
from mcsmoe.adapters.registry import adapter_for
from mcsmoe.artefacts.digests import SUMS
from mcsmoe.artefacts.tables import read_table


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(2, 96, (9 + row % 5,), generator=generator).tolist()} for row in range(40)]
    file = tmp_path_factory.mktemp("text") / "tokens.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def full(tmp_path: Path) -> Path:
    mcsmoe.save(tiny_models.model("qwen3_moe"), tmp_path / "full")
    return tmp_path / "full"


def logits(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    model: Any = mcsmoe.load(path)
    with torch.no_grad():
        found: Tensor = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return found


def by_hand(path: Path, kept: dict[str, list[int]]) -> nn.Module:
    """The model with rows of routers and experts left out, by plain indexing of its state."""
    import transformers

    whole: Any = mcsmoe.load(path)
    config = type(whole.config).from_dict(whole.config.to_dict())
    config.num_experts = len(next(iter(kept.values())))
    small = transformers.Qwen3MoeForCausalLM(config).eval()
    state = whole.state_dict()
    for layer, experts in kept.items():
        for name in list(state):
            if name.startswith(f"{layer}."):
                state[name] = state[name][experts]
    small.load_state_dict(state)
    return small


def test_deleted_experts_are_gone_from_a_stock_checkpoint(full: Path, text: Path, tmp_path: Path) -> None:
    run("prune", full, "--experts", 4, "--criterion", "gram", "--calibration", text, "--out", tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert mcsmoe.load(tmp_path / "pruned").config.num_experts == 4
    listed = json.loads((tmp_path / "pruned" / "experts.json").read_text())["layers"]
    assert {one["experts"] for one in listed.values()} == {6}
    kept = {layer: one["kept"] for layer, one in listed.items()}
    assert all(experts == sorted(experts) and len(experts) == 4 for experts in kept.values())
    inputs = tiny_models.batch()
    small: Any = by_hand(full, kept)
    with torch.no_grad():
        wanted = small(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.allclose(logits(tmp_path / "pruned", inputs), wanted, atol=1e-6)
    groups = read_table(tmp_path / "pruned" / "groups.parquet", "groups")
    for layer, rows in groups.groupby("layer"):
        assert rows[rows["weight"] == 1]["expert"].tolist() == kept[str(layer)]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dropped", ["delete", "redirect", "constant", "affine"])
@pytest.mark.parametrize("refit", [False, True])
def test_everything_composes(family: str, dropped: str, refit: bool, text: Path, tmp_path: Path) -> None:
    sets = {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 2} if family == "deepseek_v3" else {}
    model = tiny_models.model(family, **sets)
    mcsmoe.save(model, tmp_path / "full")
    experts = {layer: adapter_for(model).num_experts(model, layer) for layer in adapter_for(model).layers(model)}
    words = ["--dropped", dropped, "--rank", 4, "--calibration", text, *(["--refit"] if refit else [])]
    run("prune", tmp_path / "full", "--experts", 4, "--criterion", "mass", *words, "--out", tmp_path / "out")
    inputs = tiny_models.batch()
    found = logits(tmp_path / "out", inputs)
    assert bool(torch.isfinite(found).all())
    assert not torch.allclose(found, logits(tmp_path / "full", inputs), atol=1e-3)
    made = mcsmoe.load(tmp_path / "out")
    adapter = adapter_for(made)
    for layer in adapter.layers(made):
        assert adapter.read_experts(made, layer).num_experts == 4
        assert (adapter.read_novices(made, layer) is not None) == (dropped in ("constant", "affine"))
        assert adapter.num_experts(made, layer) == (4 if dropped == "delete" else experts[layer])


def test_keeping_all_changes_nothing(full: Path, text: Path, tmp_path: Path) -> None:
    run("prune", full, "--remove", 0, "--calibration", text, "--refit", "--out", tmp_path / "same")
    inputs = tiny_models.batch()
    assert torch.equal(logits(tmp_path / "same", inputs), logits(full, inputs))


def test_the_refit_brings_the_outputs_nearer(full: Path, text: Path, tmp_path: Path) -> None:
    rows = [json.loads(line)["input_ids"] for line in text.read_text().splitlines()]
    inputs = {"input_ids": torch.tensor([row[:9] for row in rows])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    wanted, errors = logits(full, inputs), []
    for name, more in (("plain", []), ("refit", ["--refit"])):
        run("prune", full, "--experts", 4, "--calibration", text, *more, "--out", tmp_path / name)
        errors.append(float((logits(tmp_path / name, inputs) - wanted).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_what_cannot_be_is_refused_before_any_work(
    full: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = ("--calibration", text, "--out", tmp_path / "out")
    assert "give either --experts" in refused(caplog, "prune", full, *out)
    assert "give either --experts" in refused(caplog, "prune", full, "--experts", 3, "--remove", 0.5, *out)
    assert "--remove is 1.0; give a share" in refused(caplog, "prune", full, "--remove", 1, *out)
    assert "--experts is 7; layer 'model.layers.0.mlp' has 6, give 1 to 6" in refused(
        caplog, "prune", full, "--experts", 7, *out
    )
    assert "--rank is 0; it must be a number above 0" in refused(
        caplog, "prune", full, "--experts", 3, "--rank", 0, *out
    )
    assert "--ridge is 0.0" in refused(caplog, "prune", full, "--experts", 3, "--refit", "--ridge", 0, *out)
    assert "give --calibration FILE" in refused(caplog, "prune", full, "--experts", 3, "--out", tmp_path / "out")
    assert "--refit solves on tokens" in refused(
        caplog, "prune", full, "--experts", 3, "--refit", "--statistics", text, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_protected_experts_stay_and_listed_ones_go(full: Path, text: Path, tmp_path: Path) -> None:
    first, second = "model.layers.0.mlp", "model.layers.2.mlp"
    (tmp_path / "protect.json").write_text(json.dumps({first: [1, 4]}))
    (tmp_path / "drop.json").write_text(json.dumps({first: [0], second: [2, 3]}))
    lists = ("--protect", tmp_path / "protect.json", "--drop", tmp_path / "drop.json")
    run("prune", full, "--experts", 3, *lists, "--calibration", text, "--out", tmp_path / "out")
    kept = {k: one["kept"] for k, one in json.loads((tmp_path / "out" / "experts.json").read_text())["layers"].items()}
    assert {1, 4} <= set(kept[first])
    assert 0 not in kept[first]
    assert not {2, 3} & set(kept[second])


def test_lists_that_cannot_be_are_refused(
    full: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = ("--experts", 3, "--calibration", text, "--out", tmp_path / "out")
    for content, message in (
        ({"elsewhere": [1]}, "names layer 'elsewhere'; the model has"),
        ({"model.layers.0.mlp": [6]}, "names expert 6 of layer 'model.layers.0.mlp'; its experts are 0 to 5"),
        ({"model.layers.0.mlp": [0, 1, 2, 3]}, "4 experts are protected, but only 3 are kept; protect fewer"),
        ([1], "must list numbers of experts by layer"),
    ):
        (tmp_path / "list.json").write_text(json.dumps(content))
        assert message in refused(caplog, "prune", full, "--protect", tmp_path / "list.json", *out)


def test_a_predicted_budget_spreads_the_experts(full: Path, text: Path, tmp_path: Path) -> None:
    out = ("--experts", 3, "--calibration", text, "--budget", "predicted", "--refit", "--fewest", 2)
    run("prune", full, *out, "--dropped", "redirect", "--out", tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "experts.json").read_text())["layers"]
    counts = [len(one["kept"]) for one in listed.values()]
    assert sum(counts) == 6
    assert min(counts) >= 2
    assert bool(torch.isfinite(logits(tmp_path / "out", tiny_models.batch())).all())


@pytest.mark.parametrize("uneven", [True, False])
def test_a_balance_loss_is_asked_for_only_where_it_can_be_computed(
    uneven: bool, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The library puts the router logits of all layers together, so layers that differ in experts have none."""
    mcsmoe.save(tiny_models.model("qwen3_moe", output_router_logits=True), tmp_path / "full")
    out = tmp_path / "out"
    budget = "predicted" if uneven else "uniform"
    run("prune", tmp_path / "full", "--experts", 4, "--budget", budget, "--calibration", text, "--out", out)
    listed = json.loads((out / "experts.json").read_text())["layers"]
    assert (len({len(one["kept"]) for one in listed.values()}) == 2) == uneven
    said = [one.getMessage() for one in caplog.records if "load-balancing loss" in one.getMessage()]
    assert len(said) == uneven
    assert not uneven or "output_router_logits is set to false" in said[0]
    assert json.loads((out / "config.json").read_text())["output_router_logits"] == (not uneven)
    forward_and_generate(mcsmoe.load(out), balanced=not uneven)
    if uneven:  # one that was written before, or by hand, is set right on loading
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
        (out / SUMS).unlink()
        forward_and_generate(mcsmoe.load(out), balanced=False)


def forward_and_generate(model: Any, balanced: bool) -> None:
    ids = tiny_models.batch()["input_ids"]
    made = model(input_ids=ids, labels=ids)
    assert bool(torch.isfinite(made.loss))
    assert (made.aux_loss is not None) == balanced
    made = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert made.shape[1] == 7


@pytest.mark.parametrize("budget", ["predicted", "adaptive"])
def test_a_spread_budget_leaves_every_router_enough_to_choose_from(
    budget: str, full: Path, text: Path, tmp_path: Path
) -> None:
    """A token of this model takes 3 experts; without this bound the predicted budget asks for 5 of one layer and 1."""
    words = ("--experts", 3, "--calibration", text, "--budget", budget)
    run("prune", full, *words, "--out", tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "experts.json").read_text())["layers"]
    assert [len(one["kept"]) for one in listed.values()] == [3, 3]


@pytest.mark.parametrize("method", ["msmoe-refit", "ream", "mergemoe", "reap-refit", "gram-refit"])
def test_published_merges_in_sequence(method: str, full: Path, text: Path, tmp_path: Path) -> None:
    words = ("--method", method, "--experts", 3, "--budget", "uniform", "--calibration", text)
    run("merge", full, *words, "--out", tmp_path / "out")
    made = mcsmoe.load(tmp_path / "out")
    adapter = adapter_for(made)
    drops = method.startswith(("rea", "gram"))
    for layer in adapter.layers(made):
        assert adapter.read_experts(made, layer).num_experts == 3
        assert adapter.num_experts(made, layer) == (3 if drops else 6)
    assert bool(torch.isfinite(logits(tmp_path / "out", tiny_models.batch())).all())
    groups = read_table(tmp_path / "out" / "groups.parquet", "groups")
    assert groups.groupby(["layer", "group"])["weight"].sum().round(9).eq(1).all()
