"""Write the generated pages of docs/ from what the program itself goes by: ``make docs``.

The configuration comes from its schema, the tables from theirs, the files from the outputs of the rules, the clients from
the record of their tests. With
``--check`` nothing is written, and a page that is not up to date is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import clients  # noqa: E402

from mcsmoe.artefacts.layout import Places  # noqa: E402
from mcsmoe.artefacts.tables import MEASURED, SCHEMAS  # noqa: E402
from mcsmoe.workflow.schema import SCHEMA_FILE  # noqa: E402

_FROM = "<!-- Written by `make docs` from {}. Do not edit this page. -->"
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(head)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


# -- configuration -----------------------------------------------------------------------------------------------
def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _type(part: Mapping[str, Any]) -> str:
    """Type and range of a key in words."""
    if "enum" in part:
        return "one of " + ", ".join(f"`{value}`" for value in part["enum"])
    kinds = [part["type"]] if isinstance(part["type"], str) else list(part["type"])
    words = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping"}
    made = []
    for kind in kinds:
        if kind == "array":
            inner = _type(part["items"])
            made.append(f"list, each {inner}" + (", none twice" if part.get("uniqueItems") else ""))
        else:
            made.append(words.get(kind, kind))
    text = " or ".join(made)
    bounds = [f"{word} {part[bound]}" for bound, word in _BOUNDS.items() if bound in part]
    if part.get("minItems") or part.get("minLength"):
        bounds.append("not empty")
    return ", ".join([text, *bounds])


def _keys(properties: Mapping[str, Any], required: Iterable[str] = (), defaults: bool = True) -> list[str]:
    rows = []
    for key, part in properties.items():
        if "properties" in part or "$ref" in part or "allOf" in part:
            continue  # a section of its own
        row = [f"`{key}`", _type(part)]
        if defaults:
            row.append(_value(part["default"]) if "default" in part else "required" if key in required else "")
        rows.append([*row, part.get("description", "")])
    return _table(["key", "type and range", *(["default"] if defaults else []), "meaning"], rows) if rows else []


def _references(part: Mapping[str, Any]) -> list[str]:
    found = [part["$ref"]] if "$ref" in part else []
    return [one.rpartition("/")[2] for one in found + [other["$ref"] for other in part.get("allOf", [])]]


def _section(name: str, part: Mapping[str, Any], level: int) -> list[str]:
    lines = ["", "#" * level + f" `{name}`", ""]
    if part.get("description"):
        lines += [part["description"][0].upper() + part["description"][1:] + ".", ""]
    shared = _references(part)
    if shared:
        own = "; and these, in the place of shared ones of the same name:" if part.get("properties") else "."
        lines += ["All keys of " + " and ".join(f"[{one}](#{one}-keys)" for one in shared) + own, ""]
    lines += _keys(part.get("properties", {})) if part.get("properties") else []
    while lines[-1] == "":
        lines.pop()
    for key, inner in part.get("properties", {}).items():
        if "properties" in inner:
            lines += _section(f"{name}.{key}", inner, level + 1)
    return lines


def configuration() -> str:
    """docs/configuration.md."""
    schema = yaml.safe_load(SCHEMA_FILE.read_text())
    parts, shared = schema["properties"], schema["$defs"]
    lines = [
        "# Configuration",
        "",
        _FROM.format("mcsmoe/workflow/config.schema.yaml"),
        "",
        "A configuration is a YAML file given to Snakemake by `--configfile`; without one it is `config.yaml`. It stands "
        "alone: keys it leaves out have the defaults below, not those of `config.yaml`. An unknown key, a value out of "
        "range, a file or folder that is not there is refused before any work, by one message with the field, the value "
        "and the remedy. `${NAME}` and `${NAME:-default}` in paths are environment variables. YAML reads `1e-4` as text: "
        "write `1.0e-4`.",
        "",
        "Ready configurations: [configurations.md](configurations.md). Methods by name: [methods.md](methods.md).",
        "",
        "## Top level",
        "",
        *_keys({key: part for key, part in parts.items() if key not in ("methods", "per_task")}, schema["required"]),
        "",
        "The other keys are the sections below.",
    ]
    for name, part in parts.items():
        if "properties" in part or _references(part):
            lines += _section(name, part, 2)
    lines += ["", "## `methods`", "", parts["methods"]["description"].capitalize() + ":", "", "```yaml"]
    lines += ["methods:", "  mine: {base: msmoe, similarity: weight, capacity: 4}", "```", ""]
    lines += ["A key that is left out is that of `base`.", ""]
    lines += _keys(shared["method"]["properties"], defaults=False)
    lines += ["", "## `per_task`", "", parts["per_task"]["description"].capitalize() + ":", "", "```yaml"]
    lines += ["per_task:", "  COPA: {recover: {learning_rate: 1.0e-4}}", "```", ""]
    lines += _keys(parts["per_task"]["additionalProperties"]["properties"], defaults=False)
    for name, part in shared.items():
        if name != "method":
            users = [f"`{key}`" for key, one in parts.items() if name in _references(one)]
            lines += ["", f"## {name} keys", "", f"In {', '.join(users)}.", "", *_keys(part["properties"])]
    return "\n".join(lines) + "\n"


# -- artefacts ---------------------------------------------------------------------------------------------------
def _rules(file: Path) -> Iterator[tuple[str, str, list[tuple[str, bool]]]]:
    """Of each rule in a file: its name, what it is for, and its outputs (path with its wildcards, whether it is a folder)."""
    _, *parts = re.split(r"^(?:use rule \w+ as|rule) (\w+)(?: with)?:\n", file.read_text(), flags=re.MULTILINE)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        purpose = re.match(r"    # (.*)$", text, re.MULTILINE)
        block = re.search(r"^    output:\n((?:        .*\n)+)", text, re.MULTILINE)
        if purpose is None or block is None:
            raise ValueError(
                f"{file}: rule {name} must begin with a comment that says what it is for, and have outputs"
            )
        # The rules say where their outputs lie in the words of mcsmoe/artefacts/layout.py.
        found = []
        for place in eval(f"dict({block[1]})", {"__builtins__": {"dict": dict}}, _words()).values():
            path, folder = place if isinstance(place, tuple) else (place, False)
            found.append((re.sub(r"\{(.*?)\}", r"<\1>", path.replace("{how}", "")), folder))
        yield name, purpose[1], found


def _words() -> dict[str, Any]:
    """What an output of a rule is written in, with the wildcards in braces."""
    places = Places("results")
    return {
        "PLACES": places,
        "RUN": places.run("{task}", "{seed}"),
        "BASE": places.base("{seed}"),
        "own": lambda checkpoint: f"{{variant}}/{{experts}}e/{checkpoint}",
        "directory": lambda path: (path, True),
    }


def _order() -> list[str]:
    """Rules in the order of the Snakefile."""
    return re.findall(r'"rules/(\w+)\.smk"', (ROOT / "Snakefile").read_text())[1:]


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_kind(kind.value_type)}"
    return {"double": "float64"}.get(str(kind), str(kind))


def _written() -> list[list[str]]:
    rows = []
    named = (rule for file in _order() for rule in _rules(ROOT / "rules" / f"{file}.smk"))
    for rule, purpose, outputs in named:
        for number, (path, folder) in enumerate(outputs):
            stem = Path(path).stem
            table = "examples" if Path(path).parent.name == "examples" else stem
            link = f"[table](#{table})" if path.endswith(".parquet") and table in SCHEMAS else ""
            rows.append([f"`{path}{'/' if folder else ''}`", f"`{rule}`", link, purpose if number == 0 else ""])
    return rows


def artefacts() -> str:
    """docs/artefacts.md."""
    lines = [
        "# Artefacts",
        "",
        _FROM.format("mcsmoe/artefacts/tables.py, rules/ and docs/artefacts.in.md"),
        "",
        "Steps share nothing but files. Every file is written beside its place and moved there when complete, so that a "
        "file that is there is whole.",
        "",
        "## What the rules write",
        "",
        "`results` is the key `results` of the configuration. `<experts>e` is the number of experts kept per merged "
        "layer, on average; `<checkpoint>` is `full`, or `<variant>/<experts>e/` and `merged`, `pruned`, `recovered` or "
        "`compressed`; of the method `dense`, `finetuned`. Aligned otherwise than by weights, `permuted` and `permutation` have a suffix: `-weight-input` or "
        "`-activation`. Each job also leaves its log in `results/logs/<rule>/` and its time and memory in "
        "`results/benchmarks/<rule>/`. `results/.state/` holds what a killed training resumes from, and is gone when "
        "the training ends.",
        "",
        *_table(["path", "rule", "", "what the rule does"], _written()),
        "",
        (ROOT / "docs" / "artefacts.in.md").read_text().strip(),
        "",
        "## Tables",
        "",
        "Parquet, compressed with zstd. Columns and types are checked when a table is written and when it is read; "
        "`mcsmoe.artefacts.tables.read_table(path, name)` reads one. Everything is the same when a run is repeated with as many "
        f"threads, except the columns that a clock or a scale fills: {', '.join(f'`{name}`' for name in MEASURED)}.",
    ]
    for name, schema in SCHEMAS.items():
        rows = [[f"`{field.name}`", _kind(field.type), field.metadata[b"description"].decode()] for field in schema]
        lines += ["", f"### {name}", "", *_table(["column", "type", "meaning"], rows)]
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration, "artefacts.md": artefacts, "clients.md": clients.page}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / "docs" / name, page()
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        sys.exit(f"docs: {', '.join(stale)} out of date; run make docs")


if __name__ == "__main__":
    main()
