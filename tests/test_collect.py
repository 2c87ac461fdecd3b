"""``mcsmoe collect``: domains, blends, kills, bytes read, and what other commands take from the folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from faults import loaded
from safetensors.torch import load_file
from torch import Tensor

from mcsmoe.calibration.files import load_statistics
from mcsmoe.calibration.folder import open_statistics, read_description, read_layer
from mcsmoe.calibration.layer_major import DomainBatch, LayerMajor, Options
from mcsmoe.calibration.states import States
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli import main as cli
from mcsmoe.cli._domains import domain_file
from mcsmoe.statistics.blend import blend
from mcsmoe.statistics.layer import LayerStatistics


def write_rows(file: Path, count: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    rows = [{"input_ids": torch.randint(2, 96, (4 + row % 7,), generator=generator).tolist()} for row in range(count)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def full(tmp_path: Path) -> Path:
    tiny_models.model("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path / "full")
    write_rows(tmp_path / "code.jsonl", 20, 1)
    write_rows(tmp_path / "prose.jsonl", 30, 2)
    return tmp_path / "full"


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def collect(full: Path, out: str, *more: object) -> Path:
    given = (f"code={full.parent / 'code.jsonl'}", f"prose={full.parent / 'prose.jsonl'}")
    run("collect", full, "--calibration", given[0], "--calibration", given[1], "--out", full.parent / out,
        "--batch-size", 4, "--reservoir", 3, *more)  # fmt: skip
    return full.parent / out


def assert_close(left: LayerStatistics, right: LayerStatistics, skip: tuple[str, ...] = ("position",)) -> None:
    mine, other = left.tensors(), right.tensors()
    assert set(mine) == set(other)
    for name in set(mine) - set(skip):
        torch.testing.assert_close(mine[name], other[name], rtol=1e-9, atol=1e-9, check_dtype=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- domains -----------------------------------------------------------------------------------------------------
def test_domains_are_apart_and_add_up(full: Path) -> None:
    both = collect(full, "both")
    described = read_description(both)
    assert {name: found["rows"] for name, found in described["domains"].items()} == {"code": 20, "prose": 30}
    assert list(described["layers"]) == Streamed(full).layers
    assert not list(full.parent.glob("*.partial"))
    for layer, file in described["layers"].items():
        domains = read_layer(both / file, layer)
        assert set(domains) == {"code", "prose"}
        for name, one in domains.items():
            assert int(one.valid_tokens) == described["domains"][name]["tokens"]
        whole = load_statistics(both).layers[layer]
        for field in ("computed_E", "gate_sum_E"):
            total = sum((getattr(one, field) for one in domains.values()), torch.zeros(6))
            torch.testing.assert_close(getattr(whole, field).double(), total.double())
        assert whole.outputs is not None
        assert float(whole.outputs.stream_square_sum) > 0
        assert whole.reservoir is not None
        assert (whole.reservoir.count_E <= 3).all()


def test_a_blend_has_the_shares_that_are_asked_for(full: Path) -> None:
    both = collect(full, "both")
    layer, file = next(iter(read_description(both)["layers"].items()))
    code, prose = (read_layer(both / file, layer)[name] for name in ("code", "prose"))
    mixed = open_statistics(both, {"code": 3.0, "prose": 1.0}).layers[layer]
    # A probability is a mean over tokens: in the blend it is the weighted mean of the domains' means.
    torch.testing.assert_close(mixed.probability_E, 0.75 * code.probability_E + 0.25 * prose.probability_E)
    torch.testing.assert_close(mixed.frequency_E, 0.75 * code.frequency_E + 0.25 * prose.frequency_E)
    assert float(mixed.valid_tokens) == pytest.approx(float(code.valid_tokens + prose.valid_tokens))
    # The shares they have already: the plain sum.
    own = {"code": float(code.valid_tokens), "prose": float(prose.valid_tokens)}
    assert_close(blend({"code": code, "prose": prose}, own), blend({"code": code, "prose": prose}))
    assert_close(blend({"code": code, "prose": prose}, {"code": 1, "prose": 0}), code, ("position", *SUMS))
    for weights, match in (({"code": 1}, "prose"), ({"code": -1, "prose": 2}, "code"), ({"code": 0, "prose": 0}, "0")):
        with pytest.raises(ValueError, match=match):
            blend({"code": code, "prose": prose}, weights)


SUMS = tuple(
    name
    for name in LayerStatistics.__dataclass_fields__
    if name not in ("reservoir", "outputs", "position", "input_gram_EDD")
) + tuple(f"outputs_{name}" for name in ("gram_EE", "norm_gram_EE", "output_sum_ED", "gated_output_sum_ED",
    "gate_square_sum_E", "norm_sum_E", "norm_square_sum_E", "gated_norm_sum_E", "gated_norm_square_sum_E",
    "layer_square_sum", "stream_square_sum")) + ("reservoir_key_ES",)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("code.jsonl", ("code", "code.jsonl", None)),
        ("a=dir/x.parquet:0.5", ("a", "dir/x.parquet", 0.5)),
        ("x.txt:2", ("x", "x.txt", 2.0)),
        ("b=c:d.txt", ("b", "c:d.txt", None)),
    ],
)
def test_a_domain_is_named_and_weighed_on_the_command_line(text: str, expected: tuple[Any, ...]) -> None:
    found = domain_file(text)
    assert (found.name, str(found.file), found.weight) == expected


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("code.jsonl", "code=prose.jsonl"), "two domains 'code'"),
        (("code.jsonl:0.5", "prose.jsonl"), "no weight for domain 'prose'"),
        (("code.jsonl:0",), "above 0"),
        (("nothing.jsonl",), "nothing.jsonl"),
    ],
)
def test_what_cannot_be_collected_is_refused_first(
    full: Path, given: tuple[str, ...], match: str, caplog: pytest.LogCaptureFixture
) -> None:
    words: list[object] = []
    for one in given:
        name, equals, file = one.rpartition("=")
        words += ["--calibration", f"{name}{equals}{full.parent / file}"]
    with pytest.raises(SystemExit) as stopped:
        run("collect", full, *words, "--out", full.parent / "out")
    assert stopped.value.code == 1
    assert match in caplog.text
    assert not list(full.parent.glob("out*"))


def test_texts_are_packed_to_rows_of_one_length(full: Path) -> None:
    folder = collect(full, "packed", "--pack", 16)
    plain = collect(full, "plain")
    for name, found in read_description(folder)["domains"].items():
        given = read_description(plain)["domains"][name]["tokens"]
        assert found["tokens"] == 16 * found["rows"]
        assert given - 16 < found["tokens"] <= given


def test_domains_are_weighed_in_a_merge_as_in_their_statistics(full: Path) -> None:
    given = [f"code={full.parent / 'code.jsonl'}:0.2", f"prose={full.parent / 'prose.jsonl'}:0.8"]
    words = ["--calibration", given[0], "--calibration", given[1], "--samples", 40]
    run("collect", full, *words, "--out", full.parent / "statistics")
    how = ["--experts", 3, "--no-sequential"]
    run("merge", full, *words, *how, "--out", full.parent / "text")
    run("merge", full, "--statistics", full.parent / "statistics", *how, "--out", full.parent / "folder")
    one, two = (load_file(full.parent / name / "model.safetensors") for name in ("text", "folder"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- kills -------------------------------------------------------------------------------------------------------
def killed(full: Path, words: list[str], after: float) -> int:
    """Start a command and kill it after some seconds; its exit status (negative: killed)."""
    process = subprocess.Popen([sys.executable, "-m", "mcsmoe", *words], stderr=subprocess.DEVNULL)
    try:
        return process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def stopped_at(full: Path, out: Path, blocks: int, **options: Any) -> None:
    """What a process that dies after that many blocks leaves behind."""
    code = f"""
import os, sys
from mcsmoe.calibration import collect as module
before = module._Run.commit
def commit(self, block):
    before(self, block)
    if len(self.order) == {blocks}:
        os.kill(os.getpid(), 9)
module._Run.commit = commit
from mcsmoe.cli.main import main
main(sys.argv[1:])
"""
    words = collect_words(full, out)
    script = full.parent / "stopped.py"
    script.write_text(code)
    done = subprocess.run([*loaded.LAUNCH, script, *words], stderr=subprocess.DEVNULL)
    assert done.returncode == 128 + signal.SIGKILL  # as a shell tells it


def collect_words(full: Path, out: Path) -> list[str]:
    given = [f"code={full.parent / 'code.jsonl'}", f"prose={full.parent / 'prose.jsonl'}"]
    words = ["collect", full, "--calibration", given[0], "--calibration", given[1], "--out", out, "--batch-size", 4]
    return [str(word) for word in [*words, "--reservoir", 3]]


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(full: Path, blocks: int) -> None:
    whole = collect(full, "whole")
    out = full.parent / "killed"
    stopped_at(full, out, blocks)
    assert not out.exists()
    progress = json.loads((full.parent / "killed.partial" / "progress.json").read_text())
    assert len(progress["order"]) == blocks
    collect(full, "killed")
    assert files_of(out) == files_of(whole)


def test_a_stopped_run_of_other_settings_is_not_mixed_in(full: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = full.parent / "killed"
    stopped_at(full, out, 1)
    with pytest.raises(SystemExit):
        collect(full, "killed", "--max-tokens", 3)
    assert "had another domains" in caplog.text
    collect(full, "killed", "--max-tokens", 3, "--overwrite")
    assert files_of(out) == files_of(collect(full, "other", "--max-tokens", 3))


@pytest.mark.skipif("MCSMOE_KILLS" not in os.environ, reason="set MCSMOE_KILLS to the number of kills (20: 3 minutes)")
def test_kills_at_random_moments_change_no_bit(full: Path) -> None:
    whole = files_of(collect(full, "whole"))
    draw, out = random.Random(0), full.parent / "killed"
    started = time.monotonic()
    assert killed(full, collect_words(full, full.parent / "timed"), 600) == 0
    seconds = time.monotonic() - started
    for _ in range(int(os.environ["MCSMOE_KILLS"])):
        killed(full, collect_words(full, out), draw.uniform(0.3, 1.0) * seconds)
        if out.exists():
            assert files_of(out) == whole
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
    killed(full, collect_words(full, out), 600)
    assert files_of(out) == whole


# -- costs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batches", [1, 7])
def test_every_weight_is_read_once_whatever_the_batches(full: Path, tmp_path: Path, batches: int) -> None:
    given = [DomainBatch("all", tiny_models.batch(rows=2, seed=seed)) for seed in range(batches)]
    source = Streamed(full)
    stored = sum(info.nbytes for info in source.tensors.infos.values())
    major = LayerMajor(source, given, States(tmp_path / "work", 2**30), Options(reservoir=2))
    with major.open():
        for _ in major.blocks():
            pass
    assert 0.5 * stored < major.bytes_read <= 1.05 * stored


def test_a_limit_on_states_is_kept(full: Path, tmp_path: Path) -> None:
    inputs = [tiny_models.batch(rows=2, seed=seed) for seed in range(6)]
    found: list[dict[str, Tensor]] = []
    for memory in (2**30, 3000, 0):
        states = States(tmp_path / f"work-{memory}", memory)
        major = LayerMajor(Streamed(full), [DomainBatch("all", one) for one in inputs], states, Options(reservoir=2))
        with major.open():
            for block in major.blocks():
                assert states.held <= memory
                last = block.layers
        found.append(next(iter(last.values()))["all"].tensors())
        states.close()
        assert not list((tmp_path / f"work-{memory}").glob("*"))
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


# -- what comes after --------------------------------------------------------------------------------------------
def test_merge_and_compress_take_the_folder(full: Path) -> None:
    statistics = collect(full, "statistics")
    for similarity in ("router-logits", "expert-output"):
        out = full.parent / similarity
        run("merge", full, "--statistics", statistics, "--experts", 3, "--similarity", similarity, "--out", out)
        assert (out / "groups.parquet").is_file()
    run("compress", full, "--statistics", statistics, "--rank", 4, "--out", full.parent / "compressed")
