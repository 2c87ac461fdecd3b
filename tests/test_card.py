"""Model cards, what engines make of a number of experts, and what travels with a model unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml

from mcsmoe.artefacts.digests import read_sums
from mcsmoe.checkpoint.card import PARENT_CARD, Parent, check_card, write_losses
from mcsmoe.checkpoint.engines import notes
from mcsmoe.checkpoint.streaming import Streamed
from mcsmoe.cli import main as cli

CARD = "---\nlicense: apache-2.0\ntags: [chat]\n---\n# As published\n"
FILES = {
    "README.md": CARD,
    "LICENSE": "Terms.\n",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "modeling_own.py": "raise SystemExit('is never run')\n",
    "tokenizer.model": "\0bytes",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub has it, pruned; and that pruned result in another form."""
    folder = tmp_path_factory.mktemp("cards")
    tiny_models.model("mixtral").save_pretrained(folder / "full")
    for name, text in FILES.items():
        file = folder / "full" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 96, (12,), generator=random).tolist() for _ in range(12)]
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"input_ids": row, "kind": ["prose", "code"][number % 2]}) + "\n"
            for number, row in enumerate(rows)
        )
    )
    run("prune", folder / "full", "--calibration", folder / "rows.jsonl", "--experts", 3, "--out", folder / "pruned")
    run("merge", folder / "full", "--calibration", folder / "rows.jsonl", "--experts", 2, "--out", folder / "merged")
    run("export", folder / "merged", "--form", "dense", "--out", folder / "dense")
    return folder


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def front(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text().split("---\n")[1]))


@pytest.mark.parametrize("name", ["pruned", "merged", "dense"])
def test_a_result_has_a_card_and_the_published_one_beside_it(name: str, place: Path) -> None:
    text = (place / name / "README.md").read_text()
    assert (place / name / PARENT_CARD).read_text() == CARD
    said = front(place / name / "README.md")
    assert said["license"] == "apache-2.0"
    assert said["tags"] == ["chat", "mcsmoe", "mixture-of-experts"]
    assert said["library_name"] == ("mcsmoe" if name == "merged" else "transformers")
    for part in ("What was done", "Size", "Losses by domain", "Limits", "How to run it"):
        assert f"\n## {part}\n" in text
    assert f"--out {place / name}" in text, "the command"
    assert f"made from: `{'merged' if name == 'dense' else 'full'}`" in text


@pytest.mark.parametrize("name", ["pruned", "merged", "dense"])
def test_what_belongs_to_the_model_stays_as_it_was(name: str, place: Path) -> None:
    for file, text in FILES.items():
        if file != "README.md":
            assert (place / name / file).read_text() == text


def test_sizes_are_those_of_the_files(place: Path) -> None:
    text = (place / "pruned" / "README.md").read_text()
    before, after = (sum(t.numel() for t in tensors(place / name).values()) for name in ("full", "pruned"))
    assert f"| parameters | {before:,} | {after:,} |" in text
    assert "| experts in a layer | 6 in 3 layers | 3 in 3 layers |" in text


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_losses_are_written_into_the_card_and_replaced(place: Path) -> None:
    asked = ("--text", place / "rows.jsonl", "--domain-column", "kind", "--reference", place / "full", "--card")
    run("evaluate", place / "pruned", *asked)
    once = (place / "pruned" / "README.md").read_text()
    assert "- prose: " in once
    assert "- code: " in once
    assert "beside `full`" in once
    assert "Not measured yet" not in once
    run("evaluate", place / "pruned", *asked)
    assert (place / "pruned" / "README.md").read_text() == once


def test_a_card_may_be_changed_and_no_list_of_digests_names_it(place: Path, tmp_path: Path) -> None:
    assert "README.md" not in read_sums(place / "merged")
    run("export", place / "merged", "--form", "exact", "--out", tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("Mine now.\n")
    Streamed(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"README\.md: is no card with the marks"):
        check_card(tmp_path / "mine")
    with pytest.raises(ValueError, match="leave --card out"):
        write_losses(tmp_path / "mine", ["prose: 3 nats"])
    assert (tmp_path / "mine" / "README.md").read_text() == "Mine now.\n"


def test_a_snapshot_of_the_hub_has_the_name_of_its_model(place: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--maker--model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((place / "full" / name).read_bytes())
    assert Parent.of(snapshot).name == "maker/model"


@pytest.mark.parametrize(
    ("config", "experts", "said"),
    [
        ({}, [64], []),
        ({}, [96], ["slower kernel"]),
        ({}, [192], []),
        ({"scoring_func": "sqrtsoftplus"}, [144], ["refused when it starts; 128 or 192 are not"]),
        ({"text_config": {"scoring_func": "sqrtsoftplus"}}, [192], []),
        ({"scoring_func": "sigmoid"}, [96], []),
        ({"topk_group": 4}, [90], ["a multiple of 4"]),
        ({}, [64, 32], ["one number for all layers"]),
        ({"hidden_size": 2048, "moe_intermediate_size": 1408}, [64], ["rows of 1408 weights"]),
        ({"hidden_size": 2048, "moe_intermediate_size": 768}, [64], []),
    ],
)
def test_what_engines_take(config: dict[str, Any], experts: list[int], said: list[str]) -> None:
    found = notes(config, experts, experts)
    assert len(found) == len(said), found
    for note, part in zip(found, said, strict=True):
        assert part in note


def test_a_number_out_of_the_way_is_told_before_the_work(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="mcsmoe"):
        run("prune", place / "full", "--calibration", place / "rows.jsonl", "--experts", 5, "--out", tmp_path / "five")
    told = [record.getMessage() for record in caplog.records]
    assert "chosen among by a slower kernel" in told[0]
    assert "4 or 8 are not" in told[0]
