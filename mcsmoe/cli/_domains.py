"""Calibration files with domains and weights, as options name them: ``[DOMAIN=]FILE[:WEIGHT]``."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mcsmoe.methods import MAX_MIN

if TYPE_CHECKING:
    from mcsmoe.calibration.collect import Domain
    from mcsmoe.checkpoint.streaming import Streamed

_FORM = re.compile(
    r"^(?:(?P<name>[A-Za-z0-9_.-]+)=)?(?P<file>.+?)(?::(?P<weight>[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?))?$"
)


@dataclass(frozen=True)
class DomainFile:
    """One file of calibration rows, what its domain is called, and its share of the tokens."""

    name: str
    file: Path
    weight: float | None


def domain_file(text: str) -> DomainFile:
    """``[DOMAIN=]FILE[:WEIGHT]``; a domain without a name is called after its file."""
    plain = Path(text)
    found = _FORM.match(text)
    if plain.is_file() or found is None:
        return DomainFile(_name_of(plain), plain, None)
    file = Path(found["file"])
    weight = None if found["weight"] is None else float(found["weight"])
    return DomainFile(found["name"] or _name_of(file), file, weight)


def _name_of(file: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", file.stem) or "text"


def shares(files: list[DomainFile], samples: int) -> list[int]:
    """Rows to draw of each file: ``samples`` in all, by weight.

    Raises:
        ValueError: two domains of one name, a weight for some only, or one that is not above 0; names the domain.
    """
    names = [one.name for one in files]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise ValueError(f"--calibration names two domains {twice!r}; call them apart, as in one={files[0].file}")
    missing = [one.name for one in files if one.weight is None]
    if missing and len(missing) < len(files):
        raise ValueError(f"--calibration has no weight for domain {missing[0]!r}; give one to every domain or to none")
    for one in files:
        if one.weight is not None and one.weight <= 0:
            raise ValueError(f"--calibration gives domain {one.name!r} the weight {one.weight}; it must be above 0")
    total = sum(one.weight or 1.0 for one in files)
    return [max(1, round(samples * (one.weight or 1.0) / total)) for one in files]


def given_weights(text: str | None, names: list[str]) -> dict[str, float] | None:
    """Shares of the tokens by domain, from ``A=.5,B=.5``; None where there is no such text, or it is ``max-min``.

    Raises:
        ValueError: another form, domains that are not those of ``names``, a negative weight, or nothing but zeros.
    """
    if text is None or text == MAX_MIN:
        if text == MAX_MIN and len(names) < 2:
            raise ValueError(f"--domains is {MAX_MIN}, but there is one domain alone, {names[0]!r}; give two or more")
        return None
    made: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            made[name.strip()] = float(weight)
        except ValueError as error:
            raise ValueError(
                f"--domains has {part!r}, which is no DOMAIN=WEIGHT; give one for each of {names}, or {MAX_MIN}"
            ) from error
    for name in sorted(set(made) ^ set(names)):
        raise ValueError(
            f"--domains has {'no weight for' if name in names else 'a weight for'} {name!r}; the domains are {names}"
        )
    for name, value in made.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--domains gives {name!r} the weight {value}; give 0 or more")
    if not sum(made.values()):
        raise ValueError("--domains gives every domain the weight 0; give one of them more")
    return made


def domains(source: Streamed, arguments: argparse.Namespace) -> list[Domain]:
    """The rows of all files that ``--calibration`` names, in batches of one domain each."""
    from mcsmoe.calibration.collect import Domain
    from mcsmoe.calibration.folder import tokens_of
    from mcsmoe.cli._calibration import batches
    from mcsmoe.console import log

    made, seq2seq = [], bool(source.model.config.is_encoder_decoder)
    given = arguments.calibration
    files = given if isinstance(given, list) else [DomainFile(_name_of(given), given, None)]
    for one, count in zip(files, shares(files, arguments.samples), strict=True):
        own = argparse.Namespace(**(vars(arguments) | {"calibration": one.file, "samples": count}))
        domain = Domain(one.name, batches(source, own), one.weight)
        made.append(domain)
        rows = sum(batch["input_ids"].shape[0] for batch in domain.batches)
        tokens = sum(tokens_of(batch, seq2seq) for batch in domain.batches)
        log.info("%s: %d tokens in %d rows", one.name, tokens, rows)
    return made
