"""Where rows and text come from: the generator, local files, or the hub, all in the hub's schema.

A source of rows is ``{"kind": "synthetic"}``, ``{"kind": "files", "folder": path}`` (``folder/<task>/<split>.parquet``,
``.jsonl`` or ``.csv``), ``{"kind": "files", "files": {split: path}}`` (or ``{task: {split: path}}``), or
``{"kind": "hub"}`` (``mirror``: a folder that holds copies of the repositories; ``offline``: use the cache alone), or, for
tasks of language, ``{"kind": "sources", "packages": [...], "texts": {domain: file}, "characters": longest}``: the source
files of installed packages. All take ``train_rows`` and ``validation_rows``: how many rows to generate, or the most to use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.data.files import check_file, read_rows, suffixes
from mcsmoe.data.lines import lines
from mcsmoe.data.packages import CHARACTERS, CODE, DOCSTRINGS, Passage, documents, passages, versions

if TYPE_CHECKING:
    import pandas as pd

    from mcsmoe.data.tasks import Task

KINDS = ("synthetic", "files", "hub", "sources")
SPLITS = ("train", "validation")
Source = Mapping[str, Any]
_HEADING = re.compile(r"^\s*=\s.*\s=\s*$")  # wikitext's titles: " = Title = "
_TEXT = (".txt", ".parquet")


# -- rows --------------------------------------------------------------------------------------------------------
def find_files(folder: str | Path, task: Task) -> dict[str, Path]:
    """The file of each split below ``folder``.

    Raises:
        ValueError: the folder, the task's folder in it or a split's file is not there, or a split has two.
    """
    base = Path(folder) / task.name
    if not base.is_dir():
        raise ValueError(
            f"data.folder is {str(folder)!r}, which has no folder {task.name!r}; "
            f"put train and validation files ({', '.join(suffixes())}) there"
        )
    return {split: _split_file(base, split) for split in SPLITS}


def _split_file(base: Path, split: str) -> Path:
    found = [base / f"{split}{suffix}" for suffix in suffixes() if (base / f"{split}{suffix}").is_file()]
    if not found:
        what = "training split" if split == "train" else f"{split} split"
        raise ValueError(
            f"{base} has no {what}; put a file {split}{suffixes()[0]} (or {', '.join(suffixes()[1:])}) there"
        )
    if len(found) > 1:
        raise ValueError(f"{base} has two files for split {split!r}: {found[0].name} and {found[1].name}; remove one")
    return found[0]


def _files(source: Source, task: Task) -> dict[str, Path]:
    if source.get("files"):
        given = source["files"].get(task.name, source["files"])
        missing = [split for split in SPLITS if not given.get(split)]
        if missing:
            what = "training split" if missing[0] == "train" else f"{missing[0]} split"
            raise ValueError(f"task {task.name} has no {what} among the files given; name a file for it")
        return {split: Path(given[split]) for split in SPLITS}
    if not source.get("folder"):
        raise ValueError("data.folder is not set, but data.source is 'files'; name the folder that holds the tasks")
    return find_files(source["folder"], task)


def check(source: Source, task: Task) -> None:
    """Look at a source before any work, reading no more than headers and never the network.

    Raises:
        ValueError: an unknown kind; a missing or unreadable file; a split that is missing or empty; a missing column or
            one of another type; a task that the generator or the hub does not have. Names the file and the remedy.
    """
    kind = source.get("kind")
    if kind == "synthetic":
        from mcsmoe.data import synthetic

        synthetic.require(task.name)
    elif kind == "files":
        for path in _files(source, task).values():
            check_file(path, task)
    elif kind == "hub":
        if task.hub is None:
            raise ValueError(f"data.source is 'hub', but {task.file} names no data set there; add hub, or use files")
    elif kind == "sources":
        _check_sources(source, task)
    else:
        raise ValueError(f"data.source is {kind!r}; use one of {', '.join(KINDS)}")


def _check_sources(source: Source, task: Task) -> None:
    wanted = {"idx", "domain", "text"}
    if not task.is_language or not set(task.columns) <= wanted:
        raise ValueError(
            f"data.source is 'sources', which has text and no rows of task {task.name}; use Language, or another source"
        )
    if not source.get("packages") and not source.get("texts"):
        raise ValueError("data.packages and data.texts are empty, but data.source is 'sources'; name one of them")
    versions(source.get("packages", ()))
    for domain, file in source.get("texts", {}).items():
        if domain in (CODE, DOCSTRINGS):
            raise ValueError(f"data.texts names domain {domain!r}, which is that of packages; call it otherwise")
        next(documents(Path(file)), None)


def load_split(source: Source, task: Task, split: str, seed: int) -> pd.DataFrame:
    """Raw rows of a split, in the hub's schema.

    Args:
        seed: of the generator; for other sources, of the choice of rows where there are more than asked for.

    Raises:
        ValueError: as ``check``, or a value that does not fit its column; names file and column.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    rows = source.get(f"{split}_rows")
    kind = source.get("kind")
    if kind == "synthetic":
        from mcsmoe.data import synthetic

        return synthetic.generate(task.name, split, rows, seed)
    if kind == "files":
        frame = read_rows(_files(source, task)[split], task)
    elif kind == "hub":
        from mcsmoe.data.hub import load

        check(source, task)
        frame = load(task, split, source.get("mirror"), bool(source.get("offline")))
    elif kind == "sources":
        import pandas as pd

        check(source, task)
        return pd.DataFrame(_passages(source, split, rows))
    else:
        raise ValueError(f"data.source is {kind!r}; use one of {', '.join(KINDS)}")
    return frame if rows is None or rows >= len(frame) else _limit(frame, task, int(rows), seed)


def _passages(source: Source, split: str, rows: int | None) -> list[Passage]:
    return passages(
        source.get("packages", ()),
        split,
        source.get("characters", CHARACTERS),
        rows,
        source.get("texts", {}),
    )


def _limit(frame: pd.DataFrame, task: Task, rows: int, seed: int) -> pd.DataFrame:
    """At most ``rows`` rows at random, in their order; where the task has groups, whole ones (one at least)."""
    import numpy as np

    groups = np.asarray(task.groups(frame))
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    total = np.cumsum(sizes[order])
    kept = np.zeros(len(names), dtype=bool)
    kept[order[: max(1, int((total <= rows).sum()))]] = True
    return frame[kept[inverse]].reset_index(drop=True)


def split_selection(
    examples: pd.DataFrame,
    rows: int | None = None,
    seed: int = 0,
    *,
    fraction: float | None = None,
    together: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Set a slice of the training examples aside to select checkpoints on; the examples of a group stay together.

    Args:
        rows: size of the slice; it is exceeded by less than one group. Or give ``fraction`` of the examples.
        together: whether the column ``group`` names what must not be parted; not where it names domains.

    Returns:
        (training examples, selection examples), each in the order they came.

    Raises:
        ValueError: nothing would be left to train on, or nothing to select on.
    """
    import numpy as np

    if (rows is None) == (fraction is None):
        raise ValueError("give either the rows or the fraction of the selection slice")
    wanted = int(rows) if rows is not None else round(len(examples) * float(fraction or 0))
    keys = [group * together or f"\0{number}" for number, group in enumerate(examples["group"].tolist())]
    names, inverse, sizes = np.unique(np.asarray(keys), return_inverse=True, return_counts=True)
    order = np.random.default_rng((seed, 1)).permutation(len(names))
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(names), dtype=bool)
    chosen[order[before < wanted]] = True
    picked = chosen[inverse]
    if wanted < 1 or picked.all():
        raise ValueError(
            f"data.selection_rows is {wanted}, with {len(examples)} training rows in {len(names)} groups; "
            "it must leave rows on both sides"
        )
    return examples[~picked].reset_index(drop=True), examples[picked].reset_index(drop=True)


def write_rows(path: str | Path, frame: pd.DataFrame, task: Task) -> None:
    """Write raw rows as parquet in the hub's own schema, atomically.

    Raises:
        ValueError: a column is missing or does not convert; names it.
    """
    import pyarrow as pa

    from mcsmoe.artefacts.tables import write_parquet
    from mcsmoe.data.columns import arrow_schema

    schema = arrow_schema(task.columns)
    try:
        table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    except (KeyError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: rows of {task.name} do not have the hub's columns ({error})") from error
    write_parquet(path, table)


# -- pre-training text -------------------------------------------------------------------------------------------
def check_corpus(source: Source) -> None:
    """Look at the files of a corpus, reading no more than their headers.

    Raises:
        ValueError: an unknown kind, no files, or a file that is missing, unreadable or without the column.
    """
    kind = source.get("kind")
    if kind == "synthetic":
        return
    if kind != "files":
        raise ValueError(f"pretrain.corpus is {kind!r}; use one of synthetic, files, tasks")
    if not source.get("files"):
        raise ValueError("pretrain.files is empty, but pretrain.corpus is 'files'; list the files to read")
    for file in source["files"]:
        _check_text(Path(file), source.get("column", "text"))


def _check_text(path: Path, column: str) -> None:
    if path.suffix not in _TEXT:
        raise ValueError(f"pretrain.files: {path} is neither of {', '.join(_TEXT)}; convert it")
    if not path.is_file():
        raise ValueError(f"pretrain.files: {path} does not exist; correct the path")
    if path.suffix == ".parquet":
        from mcsmoe.data.columns import fits
        from mcsmoe.data.files import parquet_header

        schema, rows = parquet_header(path)
        if column not in schema.names:
            raise ValueError(
                f"pretrain.column is {column!r}, which {path} does not have; it has {', '.join(schema.names)}"
            )
        if not fits(schema.field(column).type, "string"):
            raise ValueError(
                f"pretrain.column is {column!r}, of type {schema.field(column).type} in {path}; name a text"
            )
        if not rows:
            raise ValueError(f"pretrain.files: {path} has no rows; give text")
    elif not path.stat().st_size:
        raise ValueError(f"pretrain.files: {path} is empty; give text")


def corpus(source: Source, seed: int) -> Iterator[str]:
    """Texts to pre-train on, one paragraph each: no empty lines, no wikitext headings.

    Args:
        source: ``{"kind": "synthetic"}`` (``rows``: how many of each task) or
            ``{"kind": "files", "files": [...], "column": "text"}``.
        seed: of the generator; files are read as they are.

    Raises:
        ValueError: as ``check_corpus``.
    """
    check_corpus(source)
    if source["kind"] == "synthetic":
        from mcsmoe.data import synthetic

        yield from synthetic.corpus(seed, source.get("rows"))
        return
    for file in source["files"]:
        for text in _lines(Path(file), source.get("column", "text")):
            if text and not text.isspace() and not _HEADING.match(text):
                yield text.strip()


def _lines(path: Path, column: str) -> Iterator[str | None]:
    if path.suffix == ".txt":
        for _, text in lines(path):
            yield text
        return
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()
