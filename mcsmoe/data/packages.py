"""Text that every machine has: the source files of installed packages, code apart from the prose of their docstrings.

The same versions give the same text, in the same order, on every machine. Files, and with them all passages of a file, belong
to the training or the validation split by their names alone.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

CODE, DOCSTRINGS = "code", "docstrings"
"""The two domains of installed packages."""

CHARACTERS = 600
_LARGEST_FILE = 1_000_000  # bytes; larger ones are tables of data, not code
_VALIDATION_SHARE = 8  # one file in so many
_SHORTEST = 0.5  # of the length of a passage: what is left of a file and shorter is left out
_BLANK_LINES = re.compile(r"\n\s*\n\s*\n+")


@dataclass(frozen=True)
class Passage:
    """A piece of a document: what names it, its domain, and its text."""

    idx: str
    domain: str
    text: str


@cache
def source_files(package: str) -> tuple[Path, ...]:
    """Python files of an installed distribution, in an order that looks random and is always the same.

    Raises:
        ValueError: the package is not installed, or has no Python files; names it.
    """
    try:
        listed = metadata.files(package) or []
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ValueError(
            f"data.packages names {package!r}, which is not installed; install it or leave it out"
        ) from error
    names = sorted({str(file) for file in listed if file.suffix == ".py" and ".." not in file.parts})
    if not names:
        raise ValueError(f"data.packages names {package!r}, which has no Python files; name another package")
    base = Path(str(metadata.distribution(package).locate_file("")))
    return tuple(base / name for name in sorted(names, key=_number))


def versions(packages: Sequence[str]) -> dict[str, str]:
    """By package its version, which decides its text.

    Raises:
        ValueError: as ``source_files``.
    """
    for package in packages:
        source_files(package)
    return {package: metadata.version(package) for package in packages}


def split_of(name: str) -> str:
    """The split that a document of this name belongs to."""
    return "validation" if _number(f"split {name}") % _VALIDATION_SHARE == 0 else "train"


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


# -- code and docstrings -----------------------------------------------------------------------------------------
def code_and_docstrings(source: str) -> tuple[str, str]:
    """(code without its docstrings, the docstrings) of one file.

    Raises:
        SyntaxError: it is no Python of this version.
    """
    tree = ast.parse(source)
    lines = source.split("\n")
    texts: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
            continue
        if isinstance(first.value.value, str) and first.end_lineno is not None:
            texts.append(inspect.cleandoc(first.value.value))
            for number in range(first.lineno - 1, first.end_lineno):
                lines[number] = ""
    code = "\n".join(line.rstrip() for line in lines)
    return _BLANK_LINES.sub("\n\n", code).strip("\n"), "\n\n".join(text for text in texts if text)


def _read(file: Path) -> tuple[str, str] | None:
    if file.stat().st_size > _LARGEST_FILE:
        return None
    try:
        return code_and_docstrings(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return None  # a template, or a test of what is wrong


def pieces(text: str, characters: int) -> list[str]:
    """``text`` in pieces of at most about ``characters``, cut between lines where that is possible.

    What is left at the end is left out where it is shorter than half a piece and not all there is.
    """
    found: list[str] = []
    start = 0
    while start < len(text):
        end = min(len(text), start + characters)
        if end < len(text):
            cut = (
                text.rfind("\n", start + characters // 2, end) + 1 or text.rfind(" ", start + characters // 2, end) + 1
            )
            end = cut or end
        found.append(text[start:end])
        start = end
    kept = [piece for piece in found if piece.strip()]
    if len(kept) > 1 and len(kept[-1]) < _SHORTEST * characters:
        kept.pop()
    return kept


# -- documents ---------------------------------------------------------------------------------------------------
def passages(
    packages: Sequence[str],
    split: str,
    characters: int = CHARACTERS,
    rows: int | None = None,
    texts: Mapping[str, str] | None = None,
) -> list[Passage]:
    """Passages of every domain, as many of each: code, docstrings, and one for each of ``texts``, in turn.

    Of the validation split one passage of a file (or row) is used, so that passages are independent; of the training split
    all of them.

    Args:
        packages: names of installed distributions.
        split: ``train`` or ``validation``.
        characters: longest passage.
        rows: how many passages in all; None for as many as the domain with the fewest has.
        texts: by name of a further domain, a text or parquet file with its documents, one a line or row.

    Raises:
        ValueError: a package that is not installed, a file that cannot be read, or fewer passages than asked for.
    """
    domains = ([CODE, DOCSTRINGS] if packages else []) + list(texts or {})
    if not domains:
        raise ValueError("data.packages and data.texts are empty, and data.source is 'sources'; name one of them")
    each = None if rows is None else -(-rows // len(domains))
    found: dict[str, list[Passage]] = {}
    if packages:
        found |= _of_packages(packages, split, characters, each)
    for domain, file in (texts or {}).items():
        found[domain] = _of_file(domain, Path(file), split, characters, each)
    fewest = min(found, key=lambda domain: len(found[domain]))
    if not found[fewest] or (each is not None and len(found[fewest]) < each):
        raise ValueError(
            f"data.{split}_rows is {rows}, {each} of each of {len(domains)} domains, but there are {len(found[fewest])} "
            f"{split} passages of domain {fewest!r}; lower it, or name more packages"
        )
    count = len(found[fewest])
    made = [found[domain][place] for place in range(count) for domain in domains]
    return made if rows is None else made[:rows]


def _enough(found: Mapping[str, list[Passage]], each: int | None) -> bool:
    return each is not None and all(len(some) >= each for some in found.values())


def _of_packages(packages: Sequence[str], split: str, characters: int, each: int | None) -> dict[str, list[Passage]]:
    found: dict[str, list[Passage]] = {CODE: [], DOCSTRINGS: []}
    for package, file in _in_turn({package: source_files(package) for package in packages}):
        if _enough(found, each):
            break
        base = Path(str(metadata.distribution(package).locate_file("")))
        name = f"{package}:{file.relative_to(base).as_posix()}"
        if split_of(name) != split:
            continue
        both = _read(file)
        if both is None:
            continue
        for domain, text in zip((CODE, DOCSTRINGS), both, strict=True):
            if each is None or len(found[domain]) < each:
                found[domain] += _passages_of(name, domain, text, split, characters)
    return {domain: some[:each] for domain, some in found.items()}


def _in_turn(files: Mapping[str, Sequence[Path]]) -> Iterator[tuple[str, Path]]:
    """Files of all packages, mixed in proportion, so that the first few are like the whole."""
    placed = [
        ((place + 0.5) / len(some), package, file) for package, some in files.items() for place, file in enumerate(some)
    ]
    for _, package, file in sorted(placed):
        yield package, file


def _passages_of(name: str, domain: str, text: str, split: str, characters: int) -> list[Passage]:
    # A file with a few words is no document.
    cut = [piece for piece in pieces(text, characters) if len(piece) >= _SHORTEST * characters]
    made = [Passage(f"{name}#{domain}{number}", domain, piece) for number, piece in enumerate(cut)]
    if split == "train" or not made:
        return made
    return [made[_number(name) % len(made)]]


def _of_file(domain: str, file: Path, split: str, characters: int, each: int | None) -> list[Passage]:
    found: list[Passage] = []
    for number, text in enumerate(documents(file)):
        if each is not None and len(found) >= each:
            break
        name = f"{domain}:{number}"
        if split_of(f"{name} {text[:200]}") == split:
            found += _passages_of(name, domain, text, split, characters)
    return found[:each]


def documents(file: Path) -> Iterator[str]:
    """Texts of a file, one a line of ``.txt`` or a row of column ``text`` of ``.parquet``.

    Raises:
        ValueError: the file is not there, or is neither; names it.
    """
    from mcsmoe.data.lines import lines

    if not file.is_file():
        raise ValueError(f"data.texts names {file}, which does not exist; correct the path")
    if file.suffix == ".txt":
        for _, text in lines(file):
            yield text
        return
    if file.suffix != ".parquet":
        raise ValueError(f"data.texts names {file}; give a file that ends in .txt or .parquet")
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        if "text" not in opened.schema_arrow.names:
            raise ValueError(f"data.texts names {file}, which has no column 'text'; it has {opened.schema_arrow.names}")
        for batch in opened.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)
