"""Criterion, budget and mixture of domains chosen by what calibration says."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import tiny_models
import torch
from command_line import refused, run
from torch import Tensor

import mcsmoe
from mcsmoe.criteria.quadratic import Limits, cost
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.outputs import OutputSums
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.transform.domains import max_min, slim
from mcsmoe.transform.in_sequence import Nats
from mcsmoe.types import RoutedBatch

E, K, D = 8, 2, 5


def statistics(seed: int, favourites: list[int], tokens: int = 300) -> LayerStatistics:
    """Of a domain whose tokens choose some experts more often, with outputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, E, generator=generator)
    logits_TE[:, favourites] += 1.5
    weights_TK, chosen_TK = logits_TE.softmax(-1).topk(K)
    outputs_TKD = torch.randn(tokens, K, D, generator=generator) + torch.randn(E, D, generator=generator)[chosen_TK]
    batch = RoutedBatch(
        torch.randn(tokens, D, generator=generator),
        logits_TE,
        chosen_TK,
        chosen_TK,
        weights_TK,
        torch.ones(tokens).bool(),
    )
    found = RoutingStatistics(4)
    found.update({"x": batch})
    sums = OutputSums.measured(outputs_TKD, chosen_TK, weights_TK, E)
    found.layers["x"].outputs = sums
    return found.layers["x"]


def error_of(one: LayerStatistics, dropped: tuple[int, ...]) -> float:
    assert one.outputs is not None
    dropped_E = torch.zeros(E, dtype=torch.bool)
    dropped_E[list(dropped)] = True
    return cost(one.outputs.gram_EE, dropped_E) / float(one.outputs.layer_square_sum)


@pytest.mark.parametrize("seed", range(5))
def test_max_min_is_near_the_best_of_all_subsets(seed: int) -> None:
    found = {"a": statistics(seed, [0, 1, 2, 3]), "b": statistics(seed + 50, [4, 5, 6, 7], 900)}
    layers = {"x": {name: slim(one) for name, one in found.items()}}
    mixture = max_min(layers, {"x": 4}, "gram", {})
    given = max_min(layers, {"x": 4}, "gram", {}, steps=1)
    best = min(max(error_of(one, dropped) for one in found.values()) for dropped in combinations(range(E), 4))
    assert mixture.worst == max(mixture.errors.values())
    assert best - 1e-9 <= mixture.worst <= given.worst
    assert mixture.worst <= 1.1 * best
    assert sum(mixture.weights.values()) == pytest.approx(1)
    assert given.weights == pytest.approx({"a": 0.25, "b": 0.75})


def test_max_min_keeps_to_limits() -> None:
    layers = {"x": {"a": statistics(1, [0, 1]), "b": statistics(2, [2, 3])}}
    limits = Limits.none(E)
    limits.protected_E[6:] = True
    for criterion in ("gram", "reap", "mass"):
        assert (
            max_min(layers, {"x": 4}, criterion, {"x": limits}).worst > max_min(layers, {"x": 4}, criterion, {}).worst
        )


def test_differences_are_paired() -> None:
    tokens_R = torch.tensor([10, 20, 30])
    first = Nats(torch.tensor([20.0, 60.0, 30.0], dtype=torch.float64), tokens_R)
    shifted = Nats(first.nats_R + 0.5 * tokens_R, tokens_R)
    assert first.mean() == pytest.approx(110 / 60)
    assert shifted.difference(first) == pytest.approx((0.5, 0))
    uneven = Nats(first.nats_R + torch.tensor([3.0, -3.0, 6.0]), tokens_R)
    mean, half = uneven.difference(first)
    spread = sum((d - 0.1 * t) ** 2 for d, t in zip([3, -3, 6], [10, 20, 30], strict=True)) * 3 / 2
    assert (mean, half) == pytest.approx((0.1, 1.96 * spread**0.5 / 60))


# -- commands ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choose")
    # Its configuration asks for router logits, which a pass block by block has none of at the end.
    mcsmoe.save(tiny_models.model("qwen3_moe", output_router_logits=True), folder / "full")
    generator = torch.Generator().manual_seed(5)
    for name, low, high, count in (("a", 2, 50, 30), ("b", 40, 96, 10)):
        rows = [
            {"input_ids": torch.randint(low, high, (9 + row % 5,), generator=generator).tolist()}
            for row in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def state(folder: Path) -> dict[str, Tensor]:
    return dict(mcsmoe.load(folder).state_dict())


def test_what_loses_least_on_held_out_rows_is_taken(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["prune", place / "full", "--experts", 4, "--calibration", place / "a.jsonl", "--refit"]
    run(*words, "--criterion", "auto", "--budget", "auto", "--fewest", 3, "--out", tmp_path / "auto")
    table = json.loads((tmp_path / "auto" / "candidates.json").read_text())["candidates"]
    assert [row["criterion"] for row in table[:3]] == ["gram", "mass", "reap"]
    assert [row["budget"] for row in table] == ["uniform"] * 3 + ["predicted"]
    (chosen,) = [row for row in table if row["chosen"]]
    assert chosen["lost"] == min(row["lost"] for row in table)
    for row in table:
        assert row["more_than_chosen"] == pytest.approx(row["lost"] - chosen["lost"])
    assert "is taken; criterion" in caplog.text
    # It is the result of the same command without auto.
    plain = ("--criterion", chosen["criterion"], "--budget", chosen["budget"], "--fewest", 3)
    run(*words, *plain, "--out", tmp_path / "plain")
    wanted = state(tmp_path / "plain")
    for name, tensor in state(tmp_path / "auto").items():
        assert torch.equal(tensor, wanted[name]), name
    for file in ("groups.parquet", "experts.json"):
        assert (tmp_path / "auto" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_domains_are_weighed(place: Path, tmp_path: Path) -> None:
    both = ["--calibration", f"a={place / 'a.jsonl'}", "--calibration", f"b={place / 'b.jsonl'}"]
    run("collect", place / "full", *both, "--out", tmp_path / "statistics")
    given = ["prune", place / "full", "--experts", 3, "--statistics", tmp_path / "statistics"]
    kept = {}
    for weights in ("a=1,b=0", "a=0,b=2", "max-min"):
        run(*given, "--domains", weights, "--out", tmp_path / weights)
        listed = json.loads((tmp_path / weights / "experts.json").read_text())["layers"]
        kept[weights] = [one["kept"] for one in listed.values()]
    assert kept["a=1,b=0"] != kept["a=0,b=2"]
    page = json.loads((tmp_path / "max-min" / "domains.json").read_text())
    assert max(page["errors"].values()) <= max(page["given"]["errors"].values())
    run("prune", place / "full", "--experts", 3, *both, "--domains", "max-min", "--refit", "--out", tmp_path / "both")
    assert json.loads((tmp_path / "both" / "domains.json").read_text())["weights"].keys() == {"a", "b"}


def test_a_merge_weighs_domains_too(place: Path, tmp_path: Path) -> None:
    both = ["--calibration", f"a={place / 'a.jsonl'}", "--calibration", f"b={place / 'b.jsonl'}"]
    run("collect", place / "full", *both, "--out", tmp_path / "statistics")
    given = ["merge", place / "full", "--experts", 3, "--method", "frequency", "--budget", "uniform"]
    for domain, weights in (("a", "a=1,b=0"), ("b", "a=0,b=3")):
        run(*given, "--statistics", tmp_path / "statistics", "--domains", weights, "--out", tmp_path / weights)
        # Independent truth: the text of that domain alone.
        run(*given, "--calibration", place / f"{domain}.jsonl", "--out", tmp_path / domain)
        wanted = state(tmp_path / domain)
        for name, tensor in state(tmp_path / weights).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(one, state(tmp_path / "b")[name]) for name, one in state(tmp_path / "a").items())
    for method in ("frequency", "ream"):
        out = tmp_path / f"worst-{method}"
        run("merge", place / "full", "--experts", 3, "--method", method, *both, "--domains", "max-min", "--out", out)
        page = json.loads((out / "domains.json").read_text())
        assert max(page["errors"].values()) <= max(page["given"]["errors"].values())


def test_a_merge_of_one_mixture_has_no_domains(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, out = tmp_path / "saved.safetensors", tmp_path / "out"
    given = ["merge", place / "full", "--experts", 3, "--method", "frequency"]
    run(*given, "--calibration", place / "a.jsonl", "--save-statistics", file, "--out", tmp_path / "first")
    said = refused(caplog, *given, "--statistics", file, "--domains", "a=1", "--out", out)
    assert "of which" in said
    assert "says nothing" in said
    said = refused(caplog, *given, "--calibration", place / "a.jsonl", "--domains", "b=1", "--out", out)
    assert "--domains has no weight for 'a'" in said
    assert not (tmp_path / ".out.statistics").exists()


def test_what_cannot_be_chosen_is_refused(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run("collect", place / "full", "--calibration", place / "a.jsonl", "--out", tmp_path / "statistics")
    given = ["prune", place / "full", "--experts", 3, "--out", tmp_path / "out"]
    alone = ["--statistics", tmp_path / "statistics"]
    text = ["--calibration", place / "a.jsonl"]
    for words, message in (
        ([*alone, "--criterion", "auto"], "give --calibration FILE, not --statistics alone"),
        ([*text, "--samples", 12, "--budget", "auto"], "of which there are 1; give 20 rows or more (--samples)"),
        ([*alone, "--domains", "max-min"], "there is one domain alone, 'a'; give two or more"),
        ([*alone, "--domains", "a=.5,b=.5"], "--domains has a weight for 'b'; the domains are ['a']"),
        ([*alone, "--domains", "half"], "--domains has 'half', which is no DOMAIN=WEIGHT"),
        ([*alone, "--domains", "a=-1"], "--domains gives 'a' the weight -1.0; give 0 or more"),
        ([*alone, "--domains", "a=0"], "--domains gives every domain the weight 0"),
    ):
        assert message in refused(caplog, *given, *words)
    assert not (tmp_path / "out").exists()
