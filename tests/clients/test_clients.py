"""What comes out, given to the programs that people run it with: the same tokens, the same probabilities.

On request, since each client is installed in an environment of its own (see ``installed.py``). A client is first given the
published model itself: what it cannot read there is its own failure, and said so. ``MCSMOE_CLIENTS_RECORD=1`` writes what
the run found, and nothing of earlier ones, into docs/clients.json, of which docs/clients.md is made.
"""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import greedy
import hub_layout
import installed
import pytest
import torch
from vllm_server import served

import mcsmoe
from mcsmoe.checkpoint.format import is_compact
from mcsmoe.cli import main as cli

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(
    not (installed.MAKE or os.environ.get("MCSMOE_CLIENTS_VENVS")),
    reason="clients are tried on request: MCSMOE_CLIENTS=1 makes their environments, MCSMOE_CLIENTS_VENVS names ready ones",
)
FAMILIES = tuple(os.environ.get("MCSMOE_CLIENTS_FAMILIES", " ".join(hub_layout.FAMILIES)).split())
FORMATS = ("float32", "bfloat16")
FORMS = ("published", "pruned", "refitted", "dense", "stock")
TOKENS, NEAR = 12, 1e-4
RECORD = HERE.parents[1] / "docs" / "clients.json"


@pytest.fixture(scope="module")
def folders(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Checkpoints by family, number format and form."""

    def make(place: Path) -> None:
        for family in FAMILIES:
            for number in FORMATS:
                _forms(place / family / number, family, number)
        wide = place / "wide" / "float32"
        hub_layout.write(wide / "published", "qwen3_moe", gain=1.0, **hub_layout.WIDE)
        fewer = ("--calibration", hub_layout.rows(wide / "rows.jsonl"), "--experts", 12, "--out", wide / "pruned")
        cli.main([str(word) for word in ("prune", wide / "published", *fewer)])

    return made_once("clients", make)


def _forms(place: Path, family: str, number: str) -> None:
    hub_layout.write(place / "published", family, number)
    given = ("--calibration", hub_layout.rows(place / "rows.jsonl"))
    for command in (
        ("prune", place / "published", *given, "--experts", 4, "--out", place / "pruned"),
        ("prune", place / "published", *given, "--experts", 4, "--refit", "--out", place / "refitted"),
        ("merge", place / "published", *given, "--method", "hc-smoe", "--experts", 4, "--out", place / "merged"),
        ("export", place / "merged", "--form", "dense", "--out", place / "dense"),
        ("export", place / "merged", "--form", "stock", *given, "--out", place / "stock"),
    ):
        cli.main([str(word) for word in command])
    if family == "qwen3_moe" and number == "float32":
        spread = ("--budget", "adaptive", "--experts", 4)
        uneven = ("merge", place / "published", *given, *spread, "--out", place / "uneven")
        fewer = ("prune", place / "published", *given, *spread, "--out", place / "pruned-unevenly")
        for command in (uneven, fewer):
            cli.main([str(word) for word in command])


@pytest.fixture(scope="module")
def truth(folders: Path) -> Callable[[str], dict[str, Any]]:
    """What a checkpoint gives by its name, in float32, read by the project with its own transformers."""
    known: dict[str, dict[str, Any]] = {}

    @torch.no_grad()
    def of(name: str) -> dict[str, Any]:
        if name not in known:
            model = mcsmoe.load(folders / name, dtype="float32")

            def logits(ids: list[int]) -> Any:
                return model(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()

            parts = [greedy.greedy(logits, ids, TOKENS) for ids in hub_layout.prompts()]
            known[name] = greedy.together(parts, name.split("/")[1])
        return known[name]

    return of


def order(folders: Path, names: list[str], file: Path, **more: Any) -> Path:
    """What a client's script is to run."""
    asked = {"folders": {name: str(folders / name) for name in names}, "prompts": hub_layout.prompts()}
    file.write_text(json.dumps(asked | {"tokens": TOKENS, "dtype": "float32"} | more))
    return file


def started(*command: object, cwd: Path = HERE, path: str | None = None) -> None:
    """Run a client's own program, offline; ``path`` is where it finds the project, if it is to."""
    more = {"HF_HUB_OFFLINE": "1"} | ({} if path is None else {"PYTHONPATH": path})
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=installed.clean() | more, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def by_script(script: str, environment: installed.Environment) -> Callable[[Path, Path], None]:
    def run(asked: Path, out: Path) -> None:
        started(environment.require(), HERE / script, asked, out)

    return run


def by_llama(asked: Path, out: Path) -> None:
    files = out.with_suffix("")
    converted(asked, files)
    played(asked, out, files)


def converted(asked: Path, files: Path) -> None:
    """GGUF files in float32, by llama.cpp's converter."""
    files.mkdir()
    started(installed.TRANSFORMERS.require(), HERE / "convert_gguf.py", installed.converter(), asked, files, "f32")


def played(asked: Path, out: Path, files: Path) -> None:
    """What llama.cpp makes of GGUF files."""
    node = installed.node()
    script = node / "run_llama.mjs"  # node looks for its packages beside the script
    script.write_text((HERE / "run_llama.mjs").read_text())
    started("node", script, asked, out, files, cwd=node)


CLIENTS: dict[str, Callable[[Path, Path], None]] = {
    "transformers 4.57.6": by_script("run_transformers.py", installed.TRANSFORMERS),
    "mlx-lm 0.32.0": by_script("run_mlx.py", installed.MLX),
    "llama.cpp 0.5.0": by_llama,
    "vLLM 0.32.0": by_script("run_vllm.py", installed.VLLM),
}
NAMES = [f"{family}/{number}/{form}" for family in FAMILIES for number in FORMATS for form in FORMS]


@pytest.fixture(scope="module")
def found(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Every result of a client, which runs once."""
    known: dict[str, dict[str, Any]] = {}

    def of(client: str) -> dict[str, Any]:
        if client not in known:
            place = tmp_path_factory.mktemp("client")
            CLIENTS[client](order(folders, NAMES, place / "order.json"), place / "found.json")
            known[client] = json.loads((place / "found.json").read_text())
        return known[client]

    return of


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, dict[str, str]]]:
    """What holds, by client and name; at the end it replaces the record, where that is asked for."""
    made: dict[str, dict[str, str]] = {}
    yield made
    if os.environ.get("MCSMOE_CLIENTS_RECORD"):
        RECORD.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")


def difference(result: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference of a log-probability; infinite where a token is another one."""
    if result["tokens"] != expected["tokens"]:
        return float("inf")
    pairs = zip(result["logprobs"], expected["logprobs"], strict=True)
    return max(abs(one - two) for row, other in pairs for one, two in zip(row, other, strict=True))


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_clients_give_the_tokens_and_probabilities(
    client: str,
    family: str,
    found: Callable[[str], dict[str, Any]],
    truth: Callable[[str], dict[str, Any]],
    record: dict[str, dict[str, str]],
) -> None:
    results, problems = found(client), {}
    theirs = {}
    for number in FORMATS:
        whole = _wrong(results[f"{family}/{number}/published"], truth(f"{family}/{number}/published"))
        for form in FORMS:
            name = f"{family}/{number}/{form}"
            wrong = _wrong(results[name], truth(name))
            record.setdefault(client, {})[name] = f"published model: {whole}" if whole and wrong else wrong or "same"
            if wrong and not whole:
                problems[name] = wrong
            elif wrong:
                theirs[name] = wrong
    assert not problems
    if theirs:
        pytest.skip(f"{client} fails on the published model itself: {next(iter(theirs.values()))}")


TOKENS_ALONE = "the same tokens, but log-probabilities"
SAID = 140  # letters of a client's own words that are recorded


def _wrong(result: dict[str, Any], expected: dict[str, Any]) -> str:
    """What a client does otherwise than expected; empty where nothing."""
    if "error" in result:
        return textwrap.shorten(result["error"], SAID, placeholder=" ...")
    if result["dtype"] not in (None, expected["dtype"]):
        return f"takes {result['dtype']} for {expected['dtype']}"
    apart = difference(result, expected)
    if apart == float("inf"):
        return "other tokens"
    return "" if apart < NEAR else f"{TOKENS_ALONE} differ by up to {apart:.1g}"


MERGED = ["merged", "uneven", "pruned-unevenly"]


def test_the_plugin_serves_merged_checkpoints_as_they_are_stored(
    folders: Path, truth: Callable[[str], dict[str, Any]], tmp_path: Path, record: dict[str, dict[str, str]]
) -> None:
    """Tokens of ``mcsmoe.load``, each group held once: the bytes of experts are those of the file."""
    from safetensors import safe_open

    installed.plugin()
    names = [f"{family}/float32/merged" for family in FAMILIES if family != "gpt_oss"]
    names += [f"qwen3_moe/float32/{form}" for form in MERGED[1:] if "qwen3_moe" in FAMILIES]
    assert all(is_compact(folders / name) for name in names)
    published = sorted({f"{name.rpartition('/')[0]}/published" for name in names})
    CLIENTS["vLLM 0.32.0"](order(folders, [*names, *published], tmp_path / "order.json"), tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())
    problems = {}
    for name in names:
        wrong = _wrong(results[name], truth(name))
        whole = f"{name.rpartition('/')[0]}/published"
        theirs = _wrong(results[whole], truth(whole))
        said = f"published model: {theirs}" if theirs and wrong else wrong or "same"
        record.setdefault("vLLM 0.32.0", {})[name] = said
        if wrong:
            problems |= {} if theirs else {name: wrong}
            continue
        with safe_open(folders / name / "model.safetensors", "pt") as file:
            experts = [key for key in file.keys() if ".experts." in key]  # noqa: SIM118
            stored = sum(file.get_tensor(key).nbytes for key in experts)
        assert results[name]["expert_bytes"] == stored
    assert not problems


@pytest.mark.parametrize("form", ["pruned", "merged"])
def test_the_server_starts_by_its_command_and_answers(
    form: str, folders: Path, truth: Callable[[str], dict[str, Any]], tmp_path: Path, record: dict[str, dict[str, str]]
) -> None:
    """``vllm serve FOLDER``, as docs/serving.md has it, asked over HTTP; in float32, since answers in half are rounded."""
    command = installed.vllm_command()
    installed.plugin()
    name = f"qwen3_moe/float32/{form}"
    expected = truth(name)
    words = (command, "serve", folders / name, "--served-model-name", form, "--dtype", "float32")
    with served(*words, log=tmp_path / "server.log") as asked:
        settings = {"model": form, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        settings |= {"logprobs": 0, "return_token_ids": True}
        answers = [asked(settings | {"prompt": ids})["choices"][0] for ids in hub_layout.prompts()]
    parts = [{"tokens": one["token_ids"], "logprobs": one["logprobs"]["token_logprobs"]} for one in answers]
    assert not _wrong(greedy.together(parts, None), expected)
    record.setdefault("vLLM 0.32.0", {})[f"`vllm serve` of a {form} Qwen3-MoE"] = (
        "the same tokens and log-probabilities"
    )


WIDE = ("wide/float32/published", "wide/float32/pruned")


def test_k_quants_cost_a_pruned_model_no_more_than_the_published_one(
    folders: Path, truth: Callable[[str], dict[str, Any]], tmp_path: Path, record: dict[str, dict[str, str]]
) -> None:
    """A quantiser rounds each row by itself: experts that were kept have the bytes that they have in the whole model.

    The distance of two models is the mean divergence of their distributions of the next token over held-out rows, and that of a
    model and its quantised self may not be larger for the pruned than for the published one (by more than two standard errors).
    """
    rows = hub_layout.rows(tmp_path / "held-out.jsonl", 48, seed=13).read_text().splitlines()
    asked = order(folders, list(WIDE), tmp_path / "order.json", rows=[json.loads(row)["input_ids"] for row in rows])
    plain, python, libraries = tmp_path / "plain", installed.TRANSFORMERS.require(), installed.libraries()
    converted(asked, plain)
    found, stored = {}, {}
    for kind in ("F32", "Q8_0", "Q4_K_M"):
        files = tmp_path / kind
        files.mkdir()
        (files / "errors.json").write_text((plain / "errors.json").read_text())
        for name in WIDE:
            file = name.replace("/", "-")
            started(python, HERE / "quantise_gguf.py", libraries, plain / file, files / file, kind)
            stored[kind, name] = json.loads((files / f"{file}.json").read_text())
        played(asked, tmp_path / f"{kind}.json", files)
        found[kind] = json.loads((tmp_path / f"{kind}.json").read_text())
    assert not any(_wrong(found["F32"][name], truth(name)) for name in WIDE)
    for kind, types in (("Q8_0", {"F32", "Q8_0"}), ("Q4_K_M", {"F32", "Q4_K", "Q6_K"})):
        whole, fewer = (stored[kind, name] for name in WIDE)
        plain_whole, plain_fewer = (stored["F32", name] for name in WIDE)
        for tensor, told in fewer.items():
            assert told["type"] == whole[tensor]["type"]
            assert told["type"] in types
            places = [plain_whole[tensor]["digests"].index(digest) for digest in plain_fewer[tensor]["digests"]]
            assert told["digests"] == [whole[tensor]["digests"][place] for place in places]
        (apart, error), (apart_fewer, error_fewer) = (_apart(found["F32"][name], found[kind][name]) for name in WIDE)
        assert apart_fewer - apart < 2 * (error**2 + error_fewer**2) ** 0.5
        said = f"rounding costs {apart_fewer:.2g} nats a token (the published model {apart:.2g}); kept experts have the same bytes"
        record.setdefault("llama.cpp 0.5.0", {})[f"{kind} of a pruned Qwen3-MoE"] = said
    moved, _ = _apart(found["F32"][WIDE[0]], found["F32"][WIDE[1]])
    assert moved > apart_fewer, "the specimen is one in which experts matter"


def _apart(model: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean divergence of the second's distributions from the first's, and its standard error over rows."""
    first, second = (torch.tensor(one["rows"], dtype=torch.float64) for one in (model, other))
    by_row = (first.exp() * (first - second)).sum(-1).mean(-1)
    return float(by_row.mean()), float(by_row.std() / len(by_row) ** 0.5)


def test_quantisers_take_stock_results_and_are_read_back(
    folders: Path, tmp_path: Path, record: dict[str, dict[str, str]]
) -> None:
    """llm-compressor quantises a pruned model; what it writes is read here, and is near what it was made from."""
    python = installed.COMPRESSOR.require()
    source = folders / "qwen3_moe" / "bfloat16" / "pruned"
    ids = torch.tensor(hub_layout.prompts())
    with torch.no_grad():
        expected = mcsmoe.load(source, dtype="float32")(input_ids=ids).logits
    for scheme in ("FP8_DYNAMIC", "W4A16"):
        started(python, HERE / "run_compressor.py", source, tmp_path / scheme, scheme)
        told = json.loads((tmp_path / scheme / "config.json").read_text())
        assert told["quantization_config"]["quant_method"] == "compressed-tensors"
        assert told["num_experts"] == 4
        cli.main(["export", str(tmp_path / scheme), "--form", "exact", "--out", str(tmp_path / f"{scheme}-again")])
        with torch.no_grad():
            found = mcsmoe.load(tmp_path / f"{scheme}-again", dtype="float32")(input_ids=ids).logits
        apart = float((found - expected).pow(2).mean().sqrt() / expected.std())
        assert apart < 0.5, scheme
        said = f"quantises, and its result is read back; logits differ by {apart:.2g} of their standard deviation"
        record.setdefault("llm-compressor 0.14.0", {})[f"{scheme} of a pruned Qwen3-MoE"] = said


@pytest.mark.parametrize(
    ("client", "script", "environment", "said"),
    [
        ("peft 0.21.2", "run_peft.py", installed.PEFT, "adapters train, are saved alone and read back, and merge in"),
        ("lm-eval 0.4.13", "run_lm_eval.py", installed.LM_EVAL, "scores of a model in memory and by the folder's name"),
    ],
)
def test_programs_that_hold_the_model_themselves(
    client: str,
    script: str,
    environment: installed.Environment,
    said: str,
    folders: Path,
    tmp_path: Path,
    record: dict[str, dict[str, str]],
) -> None:
    source = folders / "qwen3_moe" / "float32" / "merged"
    started(environment.require(), HERE / script, source, tmp_path / "out", path=str(HERE.parents[1]))
    record.setdefault(client, {})["a merged Qwen3-MoE"] = said
