"""The paper's figures: as printed, plausible for their sample sizes, and compared only with what is comparable."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import fake_results
import pandas as pd
import pytest
from test_report import Page

from mcsmoe.report import page as report
from mcsmoe.report import paper, published, successors
from mcsmoe.report.page import ReportInputs
from mcsmoe.report.words import number, signed
from mcsmoe.workflow import config as configuration

SHARED = Path(os.environ.get("MCSMOE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PAPER_MODEL: dict[str, Any] = {"checkpoint": "google/switch-base-32"}


# -- the data ----------------------------------------------------------------------------------------------------
def test_every_score_has_a_sample_size_and_is_printed_once() -> None:
    scores = published.scores()
    assert scores["n"].notna().all()
    assert scores["value"].between(0, 1).all()
    raw = pd.read_csv(published.FOLDER / "scores.csv", dtype={"table": str})
    # Tables repeat rows; wherever they do, they agree, so that dropping the repeated ones loses nothing.
    assert (raw.groupby(["setting", "method", "task", "metric"])["percent"].nunique() == 1).all()
    assert len(scores) < len(raw)
    assert len(scores) == len(scores[["setting", "method", "task", "metric"]].drop_duplicates())


def test_sample_sizes_are_those_of_the_printed_accuracies() -> None:
    """An accuracy is k / n: cut or rounded to two decimals, all but the two known cells are."""
    scores = published.scores()
    small = scores[(scores["metric"] == "accuracy") & (scores["n"] < 5000)]
    off = []
    for row in small.itertuples():
        nearest = round(row.value * row.n) / row.n
        if abs(nearest - row.value) >= 1e-4:
            off.append((row.method, row.task))
    assert sorted(off) == [("git-rebasin", "WinoGrande"), ("task-specific", "MRPC")]
    # Were a sample size wrong, most cells would not fit: with 1 % more examples two thirds of them do not.
    wrong = [round(row.value * (row.n + row.n // 100 + 1)) / (row.n + row.n // 100 + 1) for row in small.itertuples()]
    fit = [abs(one - value) < 1e-4 for one, value in zip(wrong, small["value"], strict=True)]
    assert sum(fit) < len(fit) / 2


def test_standard_errors_are_binomial_and_of_proportions_only() -> None:
    scores = published.scores().set_index(["setting", "method", "task", "metric"])["standard_error"]
    for task, points in (("COPA", 4.7), ("MRPC", 1.5), ("WinoGrande", 1.4), ("SST-2", 0.7)):
        assert 100 * scores["fine-tuned", "full", task, "accuracy"] == pytest.approx(points, abs=0.06)
    assert math.isnan(scores["fine-tuned", "full", "SQuAD", "token_f1"])
    assert math.isnan(published.standard_error("accuracy", 0.5, 0))


def test_sizes_and_latencies_are_there() -> None:
    sizes = published.sizes().set_index(["setting", "method"])["parameters_m"]
    assert sizes["fine-tuned", "full"] == 1978.5
    assert sizes["fine-tuned", "mcsmoe"] < sizes["fine-tuned", "msmoe"] < sizes["fine-tuned", "full"]
    latency = published.latency()
    assert set(latency["batch_size"]) == {32, 256, 512}
    assert (latency["seconds"] > 0).all()


@pytest.mark.skipif(not (SHARED / "paper").is_dir(), reason="MCSMOE_SHARED names no folder with the paper's tables")
def test_every_printed_number_is_carried() -> None:
    """Column by column against independently typed tables: the same multiset of numbers for each task and metric."""
    ours = pd.read_csv(published.FOLDER / "scores.csv", dtype={"table": str})
    columns = {
        "sst2_accuracy": ("SST-2", "accuracy"),
        "mrpc_accuracy": ("MRPC", "accuracy"),
        "multirc_f1": ("MultiRC", "f1a"),
        "copa_accuracy": ("COPA", "accuracy"),
        "winogrande_accuracy": ("WinoGrande", "accuracy"),
        "squad_em": ("SQuAD", "exact_match"),
        "squad_f1": ("SQuAD", "token_f1"),
        "wikiqa_accuracy": ("WikiQA", "accuracy"),
        "hotpotqa_em": ("HotpotQA", "exact_match"),
        "hotpotqa_f1": ("HotpotQA", "hotpot_f1"),
        "openbookqa_accuracy": ("OpenBookQA", "accuracy"),
    }
    read = 0
    for file, tables in (("table2", ["2"]), ("ablations", list("345678")), ("zero_shot_fairseq_moe_15b", ["A9"])):
        theirs = pd.read_csv(SHARED / "paper" / f"{file}.csv")
        part = ours[ours["table"].isin(tables)]
        for column in [name for name in theirs if name in columns]:
            task, metric = columns[column]
            mine = part[(part["task"] == task) & (part["metric"] == metric)]["percent"]
            assert sorted(mine) == sorted(theirs[column].dropna()), (file, column)
            read += len(mine)
        if file != "ablations":
            sizes = published.sizes()
            sizes = sizes[sizes["table"].isin(tables)]
            assert sizes["parameters_m"].tolist() == theirs["parameters_m"].tolist()
            assert sizes["tflops"].tolist() == theirs["tflops"].tolist()
    assert read == len(ours)
    table2 = pd.read_csv(SHARED / "paper" / "table2.csv").set_index("method")
    scores = published.scores().set_index(["setting", "method", "task", "metric"])["value"]
    for name in table2.index:
        for column, (task, metric) in columns.items():
            if column in table2:
                assert 100 * scores["fine-tuned", name.replace("_", "-"), task, metric] == pytest.approx(
                    table2.loc[name, column]
                )


def test_means_of_later_papers_are_those_of_their_columns() -> None:
    """What speaks for figures that were copied: eight tasks have the mean that is printed beside them."""
    known = published.successors()
    assert known["value"].between(0, 1).all()
    assert not known.duplicated(["model", "source", "removed_percent", "calibration", "method", "benchmark"]).any()
    part = known[known["source"] == "REAP, table A6"]
    off = {}
    for (method, removed), rows in part.groupby(["method", "removed_percent"]):
        scores = rows.set_index("benchmark")["value"]
        assert len(scores) == 9
        error = abs(scores.drop("mean_of_eight").mean() - scores["mean_of_eight"])
        if error > 2e-4:
            off[method, removed] = round(error, 4)
    assert off == {("frequency-pruning", 50): 0.0007}
    ream = known[
        (known["source"] == "REAM, author's page") & (known["method"] == "ream") & (known["calibration"] != "c4")
    ]
    scores = ream[ream["model"].str.contains("30B")].set_index("benchmark")["value"]
    generative = ["ifeval", "aime25", "gsm8k", "gpqa_diamond", "humaneval", "live_code_bench"]
    assert scores[generative].mean() == pytest.approx(scores["mean_of_six_generative"], abs=5e-4)
    assert scores.drop([*generative, "mean_of_eight", "mean_of_six_generative"]).mean() == pytest.approx(
        scores["mean_of_eight"], abs=5e-4
    )


def test_a_run_of_the_same_model_stands_beside_later_papers() -> None:
    config = configuration.complete(
        {"tasks": ["OpenBookQA"], "data": {"source": "hub"}, "zero_shot": True, "variants": ["full", "reap-pruning", "msmoe"],
         "experts": [4], "model": {"checkpoint": "Qwen/Qwen3-30B-A3B"}},
        check_data=False,
    )  # fmt: skip
    rows = fake_results.summary(tasks=("OpenBookQA",))
    rows = rows[rows["variant"].isin(["full", "msmoe"]) & rows["experts"].isin([8, 4])]
    metrics = fake_results.metrics(rows)
    found = successors.beside("OpenBookQA", rows, metrics, config)
    assert found is not None
    lines = {(one["variant"], one["experts"]): one for one in found}
    # Half of 8 experts are left out: the paper's 50 %.
    assert lines["full", 8]["paper"] == "0.454"
    assert lines["msmoe", 4]["paper"] == "0.278"
    here = metrics[(metrics["variant"] == "msmoe") & (metrics["experts"] == 4) & (metrics["metric"] == "accuracy")]
    assert lines["msmoe", 4]["difference"] == signed(float(here["value"].mean()) - 0.278)
    for other in ({**config, "model": {"checkpoint": "other"}}, {**config, "data": {"source": "synthetic"}}, {}):
        assert successors.beside("OpenBookQA", rows, metrics, other) is None
    assert successors.beside("COPA", rows, metrics, config) is None


# -- what is compared --------------------------------------------------------------------------------------------
def run_of(**changes: Any) -> dict[str, Any]:
    """A whole configuration of COPA and MRPC from local files."""
    given = {"tasks": ["COPA", "MRPC"], "data": {"source": "hub"}, "experts": [4, 2], **changes}
    return configuration.complete(given, check_data=False)


def shown(task: str, config: dict[str, Any], **options: Any) -> dict[str, Any] | None:
    rows = fake_results.summary(tasks=(task,), **options)
    return paper.beside(task, rows, fake_results.metrics(rows), config)


def test_a_small_model_is_compared_for_orientation_only() -> None:
    found = shown("COPA", run_of())
    assert found is not None
    assert found["orientation"]
    assert "built and pre-trained here" in found["differs"][0]
    assert any("4 and 2 experts" in phrase for phrase in found["differs"])
    assert any("finetune.batch_size is 32, not 8" in phrase for phrase in found["differs"])
    names = [(row["variant"], row["experts"]) for row in found["rows"]]
    assert names == [("full", 8)] + [(v, e) for v in ("msmoe", "mcsmoe", "averaging", "pruning") for e in (4, 2)]


def test_differences_and_errors_are_right() -> None:
    rows = fake_results.summary(tasks=("COPA",))
    found = paper.beside("COPA", rows, fake_results.metrics(rows), run_of())
    assert found is not None
    value = float(rows[(rows["variant"] == "msmoe") & (rows["experts"] == 4)]["value"].iloc[0])
    (line,) = [row for row in found["rows"] if (row["variant"], row["experts"]) == ("msmoe", 4)]
    here, theirs = math.sqrt(value * (1 - value) / 500), math.sqrt(0.68 * 0.32 / 100)
    assert (line["here"], line["paper"]) == (number(value), "0.680")
    assert (line["here_error"], line["paper_error"]) == (number(here), number(theirs))
    assert line["difference"] == signed(value - 0.68)
    assert line["difference_error"] == number(math.sqrt(here**2 + theirs**2))
    assert line["table"] == "2"


def test_the_papers_model_is_compared_at_the_papers_number_of_experts() -> None:
    config = run_of(
        model=PAPER_MODEL, experts=[8, 4], merge={"exclude_layers": list(published.LEFT_OUT["fine-tuned"])},
        evaluate={"protocol": "paper_compat"},
    )  # fmt: skip
    found = shown("COPA", config, ratios=(8, 4))
    assert found is not None
    assert not found["orientation"]
    assert [row["experts"] for row in found["rows"]] == [8] * 5
    assert not any("model" in phrase or "layers" in phrase or "token" in phrase for phrase in found["differs"])
    copied = run_of(
        model={"checkpoint": "google/switch-base-32"} | {"checkpoint": "copies/switch-base-32"}, experts=[8]
    )
    assert paper.model_name(copied) == "google/switch-base-32"


def test_the_ready_configuration_differs_in_the_reading_of_answers_alone() -> None:
    import yaml

    folder = Path(__file__).resolve().parents[1] / "config"
    for name, said in (("paper", 1), ("paper_compat", 0)):
        config = configuration.complete(yaml.safe_load((folder / f"{name}.yaml").read_text()), check_data=False)
        for task in config["tasks"]:
            assert len(list(paper.differences(task, config, published.FINE_TUNED))) == said, (name, task)


def test_generated_examples_are_not_compared() -> None:
    found = shown("COPA", run_of(data={"source": "synthetic"}, tasks=["COPA"]))
    assert found is not None
    assert set(found) == {"reason"}
    assert "generated" in found["reason"]


def test_tasks_without_published_scores_have_nothing_beside_them() -> None:
    assert shown("sst2", run_of()) is None
    assert shown("OpenBookQA", run_of(tasks=["OpenBookQA"])) is None, "only zero-shot scores are published"
    assert paper.beside("COPA", pd.DataFrame(), pd.DataFrame(), {"tasks": ["COPA"]}) is None


def test_methods_are_matched_by_what_they_do_not_by_their_names() -> None:
    own = {
        "msmoe": {"base": "msmoe", "grouping": "spectral"},
        "mine": {"base": "msmoe", "similarity": "weight"},
        "evenly": {"base": "averaging"},
        "taught": {"base": "msmoe", "distillation_weight": 0.0},
    }
    found = paper.matches(run_of(methods=own))
    assert found["evenly"] == "averaging"
    assert "msmoe" not in found, "another method under the published name"
    assert "mcsmoe" not in found, "its parent is another one"
    assert "mine" not in found, "its base is another one"
    del own["msmoe"]
    found = paper.matches(run_of(methods=own))
    assert (found["mine"], found["taught"], found["mcsmoe"]) == ("similarity-weight", "no-distillation", "mcsmoe")
    assert found["full"] == "full"


def test_zero_shot_runs_are_compared_with_zero_shot_scores() -> None:
    config = run_of(zero_shot=True, variants=["full", "msmoe", "pruning"], model={"checkpoint": "some/moe"})
    found = shown("MRPC", config, variants=("full", "msmoe", "pruning"))
    assert found is not None
    assert found["orientation"]
    assert {row["table"] for row in found["rows"]} == {"A9"}
    assert found["rows"][0]["paper"] == "0.605"


# -- the page ----------------------------------------------------------------------------------------------------
def page(config: dict[str, Any], **options: Any) -> str:
    rows = fake_results.summary(**options)
    made = ReportInputs(rows, fake_results.metrics(rows), fake_results.cost(rows), config=config)
    return report.render(made)


def test_the_report_shows_both_and_says_what_differs() -> None:
    text = page(run_of(), tasks=("COPA",), seeds=(0, 1))
    assert "For orientation only: this is not the paper's model." in text
    rows = [[cell.strip() for cell in row] for row in Page(text).rows]
    (head,) = [cells for cells in rows if "here" in cells and "paper" in cells]
    beside = rows[rows.index(head) + 1 :][:9]
    assert all(len(cells) == len(head) == 11 for cells in beside)
    assert beside[1][:4] == ["msmoe", "4", "2", "accuracy"]
    assert beside[1][6] == "0.680"
    assert "over 500 examples here and\n100 in the paper" in text


def test_the_report_says_why_nothing_is_compared() -> None:
    text = page(run_of(data={"source": "synthetic"}, tasks=["COPA"]), tasks=("COPA",))
    assert "the examples of this run are generated" in text
    assert "For orientation" not in text


def test_experts_of_a_model_from_the_hub_are_counted_not_shown_as_none() -> None:
    rows = fake_results.summary(tasks=("MRPC",), variants=("full", "msmoe"))
    cost = fake_results.cost(rows)
    for table in (rows, cost):
        table.loc[table["variant"] == "full", "experts"] = 0
    text = report.render(ReportInputs(rows, fake_results.metrics(rows), cost))
    cells = [[cell.strip() for cell in row][:2] for row in Page(text).rows]
    assert ["full", "8"] in cells
    assert ["full", "0"] not in cells
