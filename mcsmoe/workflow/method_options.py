"""Command-line options for the fields of a method, from the configuration's schema and the tables of methods.

Apart from ``options``, so that a stage which knows no methods does not run again when they change.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from mcsmoe import methods
from mcsmoe.workflow.options import add_option, flag
from mcsmoe.workflow.schema import method


def add_method(
    parser: argparse._ActionsContainer, fields: Iterable[str], start: str | None = None, name: str | None = None
) -> None:
    """One option per field of a method, with the values of the built-in method ``start`` where none is given.

    ``name`` is another name for the option, where there is one field.
    """
    defaults = methods.Method("") if start is None else methods.BUILTIN[start]
    for field in fields:
        part = dict(method()[field])
        if field in methods.CHOICES:
            part["enum"] = list(methods.CHOICES[field])
        key = name or field
        add_option(parser, flag(key), key, part, getattr(defaults, field))
