"""Files of rows: parquet, JSON lines and CSV, checked against a task's columns before and while they are read."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.data.columns import arrow_schema, arrow_type, check_schema, is_nested
from mcsmoe.data.lines import json_lines, kind_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from mcsmoe.data.tasks import Task


def suffixes() -> list[str]:
    """Suffixes of the formats that are read, the preferred one first."""
    return [".parquet", ".jsonl", ".csv"]


def _like(task: Task) -> str:
    return task.hub.repository if task.hub is not None else str(task.file)


def _require(path: Path) -> None:
    if path.suffix not in suffixes():
        raise ValueError(f"{path} has suffix {path.suffix!r}; use one of {', '.join(suffixes())}")
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist; correct the path")
    if not path.stat().st_size:
        raise ValueError(f"data file {path} is empty; give a file with rows")


def parquet_header(path: Path) -> tuple[pa.Schema, int]:
    """(schema, number of rows), from the footer alone.

    Raises:
        ValueError: not readable as parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(
            f"data file {path} is not readable as parquet ({_without(path, error)}); fetch or write it again"
        ) from error


def check_file(path: Path, task: Task) -> None:
    """Check that ``path`` is there, readable and has the task's columns, from its header or first line.

    Raises:
        ValueError: it is not; names the file, the column and the remedy.
    """
    _require(path)
    if path.suffix == ".parquet":
        schema, rows = parquet_header(path)
        check_schema(schema, task.columns, str(path), _like(task))
        if not rows:
            raise ValueError(f"data file {path} has no rows; give a file with rows")
        return
    names, more = _csv_header(path) if path.suffix == ".csv" else _json_header(path)
    if names:
        _check_names(names, path, task)
    if not more:
        raise ValueError(f"data file {path} has no rows; give a file with rows")


def _json_header(path: Path) -> tuple[list[str], bool]:
    """(fields of the first row, whether there is one)."""
    try:
        first = next(json_lines(path), None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data file {path} is not readable as jsonl ({_without(path, error)}); write it again"
        ) from error
    return ([], False) if first is None else (list(first[1]), True)


def _without(path: Path, error: Exception) -> str:
    """The message in one line, and without the file that the sentence around it names."""
    return " ".join(str(error).removeprefix(f"{path}: ").split())


def _csv_header(path: Path) -> tuple[list[str], bool]:
    """(names in the first row that is not blank, whether a row follows it)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = (row for row in csv.reader(handle) if row)
            return next(rows, []), next(rows, None) is not None
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(
            f"data file {path} is not readable as csv ({_without(path, error)}); write it again"
        ) from error


def _check_names(names: list[str], path: Path, task: Task) -> None:
    twice = [name for name in task.columns if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: there are two columns {twice[0]!r}; remove or rename one")
    missing = [name for name in task.columns if name not in names]
    if missing:
        raise ValueError(
            f"{path}: column {missing[0]!r} is missing (there are {', '.join(names)}); "
            f"rename or add it, as in {_like(task)}"
        )
    nested = [name for name, kind in task.columns.items() if is_nested(kind)]
    if path.suffix == ".csv" and nested:
        raise ValueError(
            f"{path}: column {nested[0]!r} of task {task.name} is {arrow_type(task.columns[nested[0]])}, "
            "which CSV cannot hold; use parquet or JSON lines"
        )


def read_rows(path: Path, task: Task) -> pd.DataFrame:
    """The task's columns of a file.

    Raises:
        ValueError: as ``check_file``, or a value that does not fit its column.
    """
    check_file(path, task)
    import pyarrow as pa

    try:
        table = _read(path, task)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(
            f"data file {path} does not hold the columns of task {task.name} ({_without(path, error)}); "
            f"correct it, as in {_like(task)}"
        ) from error
    if not table.num_rows:
        raise ValueError(f"data file {path} has no rows; give a file with rows")
    made: pd.DataFrame = table.to_pandas()
    return made


def _read(path: Path, task: Task) -> Any:
    names = list(task.columns)
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        from mcsmoe.artefacts.digests import check_seal

        check_seal(path)
        return pq.read_table(path, columns=names)
    # The types are given, not guessed: text that looks like a date or a number stays text.
    schema = arrow_schema(task.columns)
    if path.suffix == ".jsonl":
        return _read_json(path, schema)
    import pyarrow.csv as pc

    return pc.read_csv(
        path,
        # A row has to fit into a block.
        read_options=pc.ReadOptions(block_size=min(path.stat().st_size + 1, 2**31 - 1)),
        parse_options=pc.ParseOptions(newlines_in_values=True),
        convert_options=pc.ConvertOptions(
            include_columns=names,
            column_types={field.name: field.type for field in schema},
            strings_can_be_null=False,
        ),
    )


def _read_json(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema`` and no others, which may hold what they like."""
    import pyarrow as pa

    numbers: list[int] = []
    values: dict[str, list[Any]] = {name: [] for name in schema.names}
    for number, row in json_lines(path):
        numbers.append(number)
        for name, column in values.items():
            column.append(row.get(name))
    return pa.table([_column(path, field, values[field.name], numbers) for field in schema], schema=schema)


def _column(path: Path, field: pa.Field, values: list[Any], numbers: list[int]) -> pa.Array:
    """The values as an array of the column's type.

    Raises:
        ValueError: one that is of another; names its line.
    """
    import pyarrow as pa

    def array(some: list[Any]) -> pa.Array:
        if pa.types.is_integer(field.type) and any(isinstance(value, bool) for value in some):
            raise pa.ArrowInvalid("not an integer")
        return pa.array(some, field.type)

    try:
        return array(values)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        for value, number in zip(values, numbers, strict=True):
            try:
                array([value])
            except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: line {number}: column {field.name!r} is {kind_of(value)} and no {field.type} "
                    f"({' '.join(str(error).split())[:200]})"
                ) from error
        raise
