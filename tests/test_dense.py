"""The dense model that a Mixture-of-Experts model is compared with: built or given, fine-tuned, scored and measured alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faults.project import TINY, Project
from safetensors.torch import load_file

from mcsmoe import methods
from mcsmoe.artefacts.tables import read_table
from mcsmoe.checkpoint.load import load_model
from mcsmoe.checkpoint.save import save_model
from mcsmoe.train.pretrain import build_dense, build_switch
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow.schema import fill, section

ARCHITECTURE = fill(TINY["model"]["architecture"], section("model")["architecture"])


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_token_passes_through_as_much_as_in_the_sparse_model() -> None:
    """The sparse model is larger by its routers and by all experts of a layer but one."""
    sparse, dense = (build(ARCHITECTURE, 300, seed=0) for build in (build_switch, build_dense))
    experts, width, hidden = (ARCHITECTURE[key] for key in ("num_experts", "d_model", "d_ff"))
    layers = ARCHITECTURE["num_sparse_encoder_layers"] + ARCHITECTURE["num_sparse_decoder_layers"]
    one = 2 * width * hidden
    assert parameters(sparse) - parameters(dense) == layers * ((experts - 1) * one + experts * width)


def test_the_scale_of_the_residual_stream_changes_no_output() -> None:
    inputs = {"input_ids": torch.arange(2, 22).view(2, 10), "labels": torch.arange(30, 36).view(2, 3)}
    exact = {**ARCHITECTURE, "layer_norm_epsilon": 1e-12}
    with torch.no_grad():
        plain, scaled = (
            build_dense(exact, 300, seed=0, residual_scale=scale).eval()(**inputs).logits for scale in (1.0, 0.1)
        )
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-4)


def test_only_a_model_without_experts_is_dense(tmp_path: Path) -> None:
    for name, build in (("sparse", build_switch), ("dense", build_dense)):
        save_model(build(ARCHITECTURE, 300, seed=0), tmp_path / name)
    with pytest.raises(ValueError, match="sparse: SwitchTransformersForConditionalGeneration has experts"):
        load_model(tmp_path / "sparse", dense=True)
    with pytest.raises(ValueError, match="dense: T5ForConditionalGeneration"):
        load_model(tmp_path / "dense")
    assert parameters(load_model(tmp_path / "dense", dense=True)) == parameters(build_dense(ARCHITECTURE, 300, 0))


def test_a_dense_model_must_be_named_where_none_can_be_built() -> None:
    given = {key: value for key, value in TINY.items() if key != "pretrain"} | {"variants": ["full", "dense"]}
    with pytest.raises(ValueError, match=r"model\.checkpoint is 'some/model'.*model\.dense_checkpoint"):
        configuration.complete(given | {"model": {"checkpoint": "some/model"}})
    configuration.complete(given | {"model": {"checkpoint": "some/model", "dense_checkpoint": "some/dense"}})


def test_a_dense_method_merges_and_compresses_nothing() -> None:
    given = TINY | {"methods": {"mine": {"base": "dense", "compress": True}}}
    with pytest.raises(ValueError, match=r"methods\.mine is dense"):
        configuration.complete(given)
    assert methods.stages(methods.BUILTIN["dense"]) == ["finetuned"]


@pytest.mark.workflow
def test_a_dense_model_goes_through_the_workflow(tmp_path: Path) -> None:
    # Nothing is killed here: no training keeps states to go on from.
    unkept = {stage: TINY[stage] | {"save_every": 0} for stage in ("pretrain", "finetune")}
    unkept["pretrain"] |= {"corpus": "synthetic"}  # as the embedded default, where the tiny workflow has its own rows
    config = TINY | unkept | {"variants": ["full", "dense"]}
    project = Project(tmp_path / "a clone", config)
    project.run()
    assert "Nothing to be done" in project.run()
    summary = read_table(project.results / "summary.parquet", "summary").set_index("variant")
    full, dense = summary.loc["full"], summary.loc["dense"]
    assert (dense["experts"], dense["stage"]) == (1, "finetuned")
    assert dense["parameters"] < full["parameters"]
    made = project.results / "COPA" / "seed0" / "dense" / "1e" / "finetuned"
    cost = read_table(made.with_name("finetuned_cost") / "cost.parquet", "cost").iloc[0]
    assert list(cost["experts_per_layer"]) == []
    base = project.results / "base" / "seed0" / "dense"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, made))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "dense" in (project.results / "report.html").read_text()

    # Given as a folder it is taken as it is: the same weights, so the same scores.
    given = TINY["model"] | {"dense_checkpoint": str(base)}
    again = Project(tmp_path / "another", config | {"model": given})
    scores = "COPA/seed0/dense/1e/finetuned_evaluation/metrics.parquet"
    again.run(f"results/{scores}")
    assert (again.results / scores).read_bytes() == (project.results / scores).read_bytes()
    assert not (again.results / "base" / "seed0" / "model").exists()
