"""Column types of task files, and their meaning for pyarrow: the hub's schema written down, and files checked against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mcsmoe.data.lines import shown

if TYPE_CHECKING:
    import pyarrow as pa

_DEEPEST = 16
SCALARS = ("string", "int32", "int64", "float32", "float64", "bool")


def as_columns(raw: Any, where: str) -> None:
    """Check the ``columns`` of a task file.

    Raises:
        ValueError: not a mapping, or a type that is neither a scalar's name, a list of one type nor a mapping.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise ValueError(f"{where}: columns is {shown(raw)}, not a mapping of names to types; correct it")
    for name, kind in raw.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}: columns names {shown(name)}, which is not text; write it in quotes")
        _check(kind, f"{where}: columns.{name}", _DEEPEST)


def _check(kind: Any, where: str, deeper: int) -> None:
    if not deeper:
        raise ValueError(f"{where} is nested deeper than {_DEEPEST} levels; correct it")
    if isinstance(kind, Mapping) and kind:
        for name, inner in kind.items():
            _check(inner, f"{where}.{name}", deeper - 1)
    elif isinstance(kind, list) and len(kind) == 1:
        _check(kind[0], f"{where}[]", deeper - 1)
    elif kind not in SCALARS:
        raise ValueError(
            f"{where} is {shown(kind)}; use one of {', '.join(SCALARS)}, a list of one type, or a mapping of names"
        )


def is_nested(kind: Any) -> bool:
    """Whether the type is a list or a struct, which CSV cannot hold."""
    return not isinstance(kind, str)


def arrow_type(kind: Any) -> pa.DataType:
    """The hub's own type of a column."""
    import pyarrow as pa

    if isinstance(kind, Mapping):
        return pa.struct([pa.field(name, arrow_type(inner)) for name, inner in kind.items()])
    if isinstance(kind, list):
        return pa.list_(arrow_type(kind[0]))
    return {"bool": pa.bool_}.get(kind, getattr(pa, kind, pa.string))()


def arrow_schema(columns: Mapping[str, Any]) -> pa.Schema:
    """The hub's own schema of a task."""
    import pyarrow as pa

    return pa.schema([pa.field(name, arrow_type(kind)) for name, kind in columns.items()])


def fits(found: pa.DataType, kind: Any) -> bool:
    """Whether a column of type ``found`` can serve as ``kind``: the width of numbers and lists does not matter."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, Mapping):
        if not types.is_struct(found):
            return False
        inner = {found.field(i).name: found.field(i).type for i in range(found.num_fields)}
        return all(name in inner and fits(inner[name], wanted) for name, wanted in kind.items())
    if isinstance(kind, list):
        is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        return is_list and fits(found.value_type, kind[0])
    if types.is_dictionary(found):
        return fits(found.value_type, kind)
    if kind == "string":
        return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    if kind == "bool":
        return types.is_boolean(found)
    if kind.startswith("int"):
        return types.is_integer(found)
    return types.is_floating(found) or types.is_integer(found)


def check_schema(found: pa.Schema, columns: Mapping[str, Any], where: str, like: str) -> None:
    """Compare a file's schema with a task's columns; more columns than needed are fine.

    Raises:
        ValueError: a column is missing or has another type; names the column, both types and the data set to look like.
    """
    for name, kind in columns.items():
        if found.names.count(name) > 1:
            raise ValueError(f"{where}: there are two columns {name!r}; remove or rename one")
        if name not in found.names:
            raise ValueError(
                f"{where}: column {name!r} is missing (there are {', '.join(found.names)}); rename or add it, as in {like}"
            )
        if not fits(found.field(name).type, kind):
            raise ValueError(
                f"{where}: column {name!r} is of type {found.field(name).type}, not {arrow_type(kind)}; "
                f"convert it, as in {like}"
            )


def plain(value: Any) -> Any:
    """A cell of a pandas frame as plain Python: arrays become lists, missing values None."""
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if value != value else value  # NaN is the one value that differs from itself


def null_inside(value: Any, kind: Any, where: str) -> str | None:
    """Where a plain value of type ``kind`` holds a null in what the task declares; None where it does not."""
    if value is None:
        return where
    if isinstance(kind, Mapping):
        found = (null_inside(value.get(name), inner, f"{where}.{name}") for name, inner in kind.items())
    elif isinstance(kind, list):
        found = (null_inside(item, kind[0], f"{where}[{place}]") for place, item in enumerate(value))
    else:
        return None
    return next((one for one in found if one is not None), None)
