"""Malformed configurations and command lines: each is taken, or refused in one line; MCSMOE_FUZZ=1: many more."""

from __future__ import annotations

import copy
import json
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ODD, outcome, rounds

from mcsmoe.cli import main as cli
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow import options
from mcsmoe.workflow.schema import schema

DEFAULT = yaml.safe_load((Path(__file__).resolve().parents[2] / "config.yaml").read_text())
HOSTILE = (
    "$(touch x)",
    "`touch x`",
    "a;touch x",
    "a b",
    "a'b",
    'a"b',
    "a\\b",
    "{task}",
    "{{}}",
    "-x",
    "--help",
    "a\nb",
)
HOSTILE += ("*", "~", "a|b", "a>b", "%s", "é", "a&", "#a", "!a", "")


def leaves(part: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every setting of the schema: its keys and its rule."""
    for key, inner in part.get("properties", {}).items():
        if "properties" in inner:
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


LEAVES = list(leaves(schema()))


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(DEFAULT)
    node = made
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value
    return made


@pytest.mark.parametrize("seed", rounds(120, 3000))
def test_a_configuration_with_an_odd_value_is_taken_or_refused_by_name(seed: int) -> None:
    rng = random.Random(seed)
    path, _ = LEAVES[seed % len(LEAVES)]
    value = rng.choice((*ODD, *HOSTILE, b"x", {1: 2}, 2.0, 10**400))
    made = outcome(lambda: configuration.complete(changed(path, value), check_data=False), path[-1])
    if made is not None:
        assert configuration.complete(made, check_data=False) == made


@pytest.mark.parametrize(
    "value", [*ODD, b"x", [DEFAULT], {1: 2}, {"tasks": ["COPA"], "": 1}], ids=lambda value: repr(value)[:30]
)
def test_what_is_no_configuration_is_refused(value: Any) -> None:
    assert outcome(lambda: configuration.complete(value, check_data=False), "") is None


def test_texts_reach_a_shell_as_the_words_they_are() -> None:
    texts = [path for path, rule in LEAVES if "string" in str(rule.get("type"))]
    assert ("device",) in texts
    for path in texts:
        for text in HOSTILE:
            made = outcome(
                lambda path=path, text=text: configuration.complete(changed(path, text), check_data=False), path[-1]
            )
            if made is None:
                continue
            node = made
            for key in path:
                node = node[key]
            words = shlex.split(options.as_flags({path[-1]: node}))
            assert words in ([options.flag(path[-1]), node], [f"{options.flag(path[-1])}={node}"])


ARGUMENTS = (
    "--experts",
    "--out",
    "--seed",
    "--samples",
    "--batch-size",
    "--keep",
    "--rank",
    "--threads",
    "--device",
    "--log",
)
ARGUMENTS += ("--calibration", "--statistics", "--exclude-layers", "--cache-memory", "--capacity", "--form", "--method")
VALUES = (
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "9" * 400,
    "",
    " ",
    "\x00",
    "..",
    "/",
    "/dev/null/x",
    "tpu",
    "2",
    "a" * 5000,
)


@pytest.mark.parametrize("seed", rounds(60, 1500))
def test_a_command_line_ends_in_one_message(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    command = rng.choice([*sorted(cli.commands()), "merg", ""])
    words = [command, rng.choice(("nowhere", "", "-", "\x00", "/dev/null", str(tmp_path)))]
    words += [word for name in rng.sample(ARGUMENTS, rng.randint(0, 4)) for word in (name, rng.choice(VALUES))]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code in (1, 2) or isinstance(ended.value.code, str)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "defect of the program" not in captured.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_kept_of_a_configuration_is_json() -> None:
    made = configuration.complete(DEFAULT)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
