"""Files of rows: parquet, JSON lines and CSV, checked against a task's columns before and while they are read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe.data.columns import arrow_schema, arrow_type, check_schema, is_nested

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
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"data file {path} is not readable as parquet ({error}); fetch or write it again") from error


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
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            if path.suffix == ".csv":
                names, more = next(csv.reader(handle)), handle.readline()
            else:
                first = json.loads(handle.readline())
                names, more = list(first), "rows"
    except (OSError, UnicodeDecodeError, ValueError, TypeError, StopIteration) as error:
        raise ValueError(f"data file {path} is not readable as {path.suffix[1:]} ({error}); write it again") from error
    _check_names(names, path, task)
    if not more:
        raise ValueError(f"data file {path} has no rows; give a file with rows")


def _check_names(names: list[str], path: Path, task: Task) -> None:
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
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, pa.ArrowKeyError, OSError) as error:
        raise ValueError(
            f"data file {path} does not hold the columns of task {task.name} ({str(error).strip()}); "
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
        import pyarrow.json as pj

        options = pj.ParseOptions(explicit_schema=schema, newlines_in_values=False)
        return pj.read_json(path, parse_options=options).select(names)
    import pyarrow.csv as pc

    return pc.read_csv(
        path,
        parse_options=pc.ParseOptions(newlines_in_values=True),
        convert_options=pc.ConvertOptions(
            include_columns=names,
            column_types={field.name: field.type for field in schema},
            strings_can_be_null=False,
        ),
    )
