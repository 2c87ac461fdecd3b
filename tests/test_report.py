"""The report: one file with nothing to load, every number in it, and words that follow from the tests."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_results
import pandas as pd
import pytest

from mcsmoe.report import page as report
from mcsmoe.report import words
from mcsmoe.report.page import ReportInputs


def inputs(**options: Any) -> ReportInputs:
    summary = fake_results.summary(**options)
    groups = []
    for row in summary[summary["variant"].isin(["msmoe", "averaging"])].to_dict("records"):
        labels = {name: row[name] for name in ("task", "variant", "experts", "seed")}
        groups.append((labels, fake_results.groups(row["experts"], 3)))
    runs = summary[["task", "seed"]].drop_duplicates().to_dict("records")
    return ReportInputs(
        summary,
        fake_results.metrics(summary),
        fake_results.cost(summary),
        training=fake_results.curves(summary, 30),
        routing=[({"task": run["task"], "seed": run["seed"]}, fake_results.routing(run["seed"])) for run in runs],
        groups=groups,
        config={"tasks": ["sst2"], "note": "<script>alert(1)</script> & more"},
        versions={"torch": "2.13.0"},
        benchmarks=fake_results.benchmarks(),
    )


class Page(HTMLParser):
    """What a browser would load, the ids, the cells of each table row, and whether tags are balanced."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attributes}
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.loads.append(tag)
        for name in ("src", "srcset", "data", "poster", "action", "background"):
            if named.get(name, "data:").split(":")[0] != "data":
                self.loads.append(named[name])
        if "href" in named and not named["href"].startswith("data:"):
            self.links.append(named["href"])
        if "id" in named:
            self.ids.append(named["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(inputs())


def test_nothing_is_loaded(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page)
    parsed = Page(page)
    assert parsed.loads == []
    assert all(link.startswith("#") for link in parsed.links)
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.open == [], "every tag is closed"


def test_every_variant_is_in_its_tables_with_its_numbers(page: str) -> None:
    rows = [[cell.strip() for cell in row] for row in Page(page).rows]
    for row in fake_results.summary().to_dict("records"):
        full = row["variant"] == "full"
        wanted = [row["variant"], str(row["experts"]), f"{row['value']:.3f}"]
        wanted += [f"{row['ci_low']:.3f} to {row['ci_high']:.3f}", "500"]
        wanted += ["–" if full else f"{row['difference']:+.3f}".replace("-", "−")]
        found = [cells for cells in rows if cells[: len(wanted)] == wanted]
        assert found, wanted
        cells = found[0]
        assert cells[7] == row["verdict"]
        assert float(cells[8]) == pytest.approx(row["parameters"] / 1e6, rel=5e-3)
        assert float(cells[9]) == pytest.approx(row["bytes_on_disk"] / 1e6, rel=5e-3)
        assert float(cells[10]) == pytest.approx(row["flops"] / 1e9, rel=5e-3)
        assert float(cells[11]) == pytest.approx(row["latency_ms"], rel=5e-3)
        assert float(cells[12]) == pytest.approx(row["peak_memory_bytes"] / 1e6, rel=5e-3)
    second = [cells for cells in rows if "f1" in cells]
    assert len(second) == len(fake_results.summary()), "metrics other than the main one are shown, too"


def test_settings_and_versions_are_shown_and_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "2.13.0" in page
    assert "8 examples of 128 input and 8 label tokens, float32 on the CPU with 1 thread" in page


def test_figures_are_there_and_shared_groupings_are_drawn_once(page: str) -> None:
    per_task = 2 + 1 + 2 + 3  # trade-off and costs; usage; groups at 4 and 2; finetune, recover, compress
    assert page.count('<svg role="img"') == 2 * per_task + 2  # pre-training and where the time goes, once
    assert page.count("msmoe and averaging: experts of one number are merged") == 4


def test_time_table_adds_up(page: str) -> None:
    rows = [[cell.strip() for cell in row] for row in Page(page).rows]
    (recover,) = [cells for cells in rows if cells[0] == "recover"]
    total = fake_results.benchmarks()["seconds"].sum()
    assert recover == ["recover", "4", "69.9", f"{100 * 69.9 / total:.0f} %", "18.4", "584"]


def test_words_say_what_was_kept_and_what_was_lost() -> None:
    rows = fake_results.summary(tasks=("sst2",))
    said = " ".join(words.words_for_task(rows))
    full = rows.iloc[0]
    assert f"scores {full['value']:.3f} accuracy [{full['ci_low']:.3f}, {full['ci_high']:.3f}] on 500 examples" in said
    assert "smallest checkpoint that is not measurably worse is mcsmoe with 2 experts" in said
    assert "at 3.24 MB, 26 % of the full size" in said
    worse = re.search(r"Worse: ([^.]*\.\d+[^:]*?)\.(?: |$)", said)
    assert worse is not None
    assert "pruning with 2 experts" in worse[1]
    assert "msmoe" not in worse[1]
    assert "not that there is none" in said


def test_a_long_list_of_one_size_names_the_size_once() -> None:
    variants = ("full", "msmoe", "mcsmoe", "one", "two", "three", "pruning")
    said = " ".join(words.words_for_task(fake_results.summary(tasks=("sst2",), variants=variants, ratios=(4,))))
    assert "Within noise, with 4 experts: msmoe (−0.004), mcsmoe (−0.012), one (−0.020), two" in said
    assert "Worse: pruning with 4 experts (−0.090)." in said


def test_words_do_not_praise_what_is_worse() -> None:
    rows = fake_results.summary(tasks=("sst2",))
    rows["verdict"] = rows["verdict"].replace("within noise", "worse")
    said = " ".join(words.words_for_task(rows))
    assert "smallest checkpoint" not in said
    assert "No variant was found to be as good" in said


def test_one_seed_that_is_worse_is_told() -> None:
    rows = fake_results.summary(tasks=("sst2",), variants=("full", "msmoe"), ratios=(4,), seeds=(0, 1))
    rows.loc[rows.index[-1], "verdict"] = "worse"
    said = " ".join(words.words_for_task(rows))
    assert "Worse with some seeds: msmoe with 4 experts" in said
    assert "over 2 seeds" in said


def test_without_a_full_model_nothing_is_compared() -> None:
    rows = fake_results.summary(tasks=("sst2",), variants=("msmoe",))
    rows[["difference", "p_value"]] = float("nan")
    rows["verdict"], rows["test"] = "no full model to compare", "none"
    assert words.words_for_task(rows) == ["There is no full model to compare with: the scores stand alone."]
    text = report.render(ReportInputs(rows, fake_results.metrics(rows), fake_results.cost(rows)))
    assert "nan" not in Page(text).rows[1]


def test_several_seeds_have_their_means() -> None:
    made = inputs(tasks=("sst2",), seeds=(0, 1))
    rows = [[cell.strip() for cell in row] for row in Page(report.render(made)).rows]
    part = made.summary[(made.summary["variant"] == "msmoe") & (made.summary["experts"] == 4)]["value"]
    wanted = ["msmoe", "4", "2", f"{part.mean():.3f}", f"{part.min():.3f} to {part.max():.3f}", "−0.004"]
    assert wanted in rows


def test_the_same_inputs_give_the_same_file(tmp_path: Path) -> None:
    made = inputs(tasks=("copa",))
    path = tmp_path / "a folder" / "report.html"
    report.write(path, made)
    first = path.read_bytes()
    report.write(path, made)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_summary_without_rows_is_refused() -> None:
    made = inputs(tasks=("copa",))
    empty = dataclasses.replace(made, summary=made.summary.iloc[:0])
    with pytest.raises(ValueError, match="summary has no rows"):
        report.render(empty)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(12_400_000, 1e6, "12.4"), (810_000, 1e6, "0.810"), (1_978_500_000, 1e6, "1,978"), (0, 1e6, "0"), (999, 1, "999")],
)
def test_scaled_keeps_three_digits(value: float, unit: float, shown: str) -> None:
    assert words.scaled(value, unit) == shown


def test_p_values_are_never_zero() -> None:
    assert [words.p_text(p) for p in (0.0, 0.021, 0.4, float("nan"))] == ["< 0.001", "0.021", "0.40", "–"]


def test_tables_fit_their_schemas(tmp_path: Path) -> None:
    from mcsmoe.artefacts.tables import read_table, write_table

    summary = fake_results.summary()
    tables = {"summary": summary, "metrics": fake_results.metrics(summary), "cost": fake_results.cost(summary)}
    tables |= {"routing": fake_results.routing(0), "groups": fake_results.groups(4, 0)}
    tables |= {"training": fake_results.training_curve(5, 1.0, 0), "similarity": fake_results.similarity(0)}
    for name, table in tables.items():
        write_table(tmp_path / f"{name}.parquet", table, name)
        again = read_table(tmp_path / f"{name}.parquet", name)
        numbers = list(table.select_dtypes("number").columns)
        pd.testing.assert_frame_equal(again[numbers], table[numbers].reset_index(drop=True), check_dtype=False)
