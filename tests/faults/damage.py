"""Flip bits in, truncate, empty and delete every file of every kind of artefact, and see what its reader says.

A fault is noticed if the reader refuses with a message that names the file and the remedy. It is harmless if the very
same content is read, as where it hit the name of the entry that holds a digest.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from .specimens import SPECIMENS, Specimen, content

EXAMPLE = "python -m tests.faults.damage --flips 100 --seed 0 --report damage"
REMEDIES = (
    "run again",
    "restore",
    "rebuild",
    "write it again",
    "starting afresh",
    "is ignored",
    "give a file",
    "correct the path",
)
CHECKED = {name: specimen for name, specimen in SPECIMENS.items() if name != "report"}  # nothing reads the report back


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    kind: str
    file: str
    fault: str
    outcome: str  # noticed, harmless, or what went wrong
    message: str = ""


def files_of(specimen: Specimen, place: Path) -> list[Path]:
    """The files a specimen consists of; a list of digests is one of them."""
    path = place / specimen.name
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def faults(size: int, flips: int, seed: int) -> Iterator[tuple[str, int]]:
    """(fault, place) for a file of so many bytes."""
    rng = np.random.default_rng(seed)
    for place in rng.choice(size, min(flips, size), replace=False).tolist():
        yield "flipped bit", place
    for left in sorted({size - 1, size // 2, 4, 0}):
        if left < size:
            yield "truncated", left
    yield "deleted", 0


def damage(file: Path, fault: str, place: int, seed: int) -> None:
    """Put one fault into ``file``."""
    if fault == "deleted":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:place])
    else:
        data = bytearray(file.read_bytes())
        data[place] ^= 1 << int(np.random.default_rng((seed, place)).integers(8))
        file.write_bytes(data)


def outcomes(kind: str, work: Path, flips: int, seed: int = 0) -> Iterator[Outcome]:
    """Every fault in every file of one kind of artefact, one at a time."""
    specimen = CHECKED[kind]
    whole, hurt = work / "whole", work / "hurt"
    specimen.write(whole / specimen.name, 0)
    expected = content(specimen, whole)
    for file in files_of(specimen, whole):
        name = file.relative_to(whole).as_posix()
        for fault, place in faults(file.stat().st_size, flips, seed):
            shutil.rmtree(hurt, ignore_errors=True)
            shutil.copytree(whole, hurt)
            damage(hurt / name, fault, place, seed)
            yield Outcome(kind, name, f"{fault} {place}", *_read(specimen, hurt, hurt / name, fault, expected))


def _read(specimen: Specimen, place: Path, file: Path, fault: str, expected: str) -> tuple[str, str]:
    try:
        found = content(specimen, place)
    except ValueError as error:
        words = str(error)
        if not any(name in words for name in {str(file), file.name}):
            return ("named by its folder" if str(file.parent) in words else "not named"), words
        return "noticed" if any(remedy in words for remedy in REMEDIES) else "noticed without a remedy", words
    except LookupError as error:
        return ("begins anew" if specimen.optional and fault == "deleted" else "wrong"), str(error)
    except Exception as error:
        return f"defect: {type(error).__name__}", str(error)
    if found != expected:
        return "wrong content believed", ""
    return ("not needed" if fault == "deleted" else "harmless"), ""


GOOD = ("noticed", "harmless", "begins anew", "not needed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.damage",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flips", type=int, default=100, help="bits flipped in each file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default: %(default)s)")
    parser.add_argument("--report", type=Path, default=Path("damage"), help="written: this name with .parquet and .md")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    found: list[Outcome] = []
    for kind in tqdm(CHECKED, desc="kinds"):
        with tempfile.TemporaryDirectory(prefix="mcsmoe-damage-") as work:
            found += outcomes(kind, Path(work), arguments.flips, arguments.seed)
    table = pd.DataFrame([vars(one) for one in found])
    table.to_parquet(arguments.report.with_suffix(".parquet"), index=False)
    arguments.report.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))
    sys.exit(int(any(one.outcome not in GOOD for one in found)))


def markdown(found: list[Outcome]) -> str:
    """Faults and outcomes by kind and file."""
    counts = collections.Counter((one.kind, one.file, one.fault.rpartition(" ")[0], one.outcome) for one in found)
    lines = ["| kind | file | fault | outcome | times |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {count} |" for key, count in counts.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
