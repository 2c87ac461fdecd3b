"""The one place that knows how prompts are written: Jinja templates and expressions over the columns of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

Template = Callable[[Mapping[str, Any]], str]
Expression = Callable[[Mapping[str, Any]], Any]


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    made = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    made.globals = {"zip": zip, "range": range}
    return made


def squeeze(text: str) -> str:
    """``text`` with each run of white space as one space and none at the ends."""
    return " ".join(text.split())


def _check(source: str, columns: Mapping[str, Any], where: str) -> None:
    from jinja2 import TemplateSyntaxError, meta

    environment = _environment()
    try:
        used = meta.find_undeclared_variables(environment.parse(source))
    except TemplateSyntaxError as error:
        raise ValueError(f"{where} is not valid Jinja ({error.message}); correct it") from error
    unknown = sorted(used - set(columns) - set(environment.globals))
    if unknown:
        raise ValueError(f"{where} uses {unknown[0]!r}, which is not among columns ({', '.join(columns)}); correct it")


def template(text: str, columns: Mapping[str, Any], where: str) -> Template:
    """A function from a row to the filled-in text, white space squeezed.

    Raises:
        ValueError: invalid Jinja, or a name that is not a column; names ``where``.
    """
    _check(text, columns, where)
    compiled = _environment().from_string(text)
    return lambda row: squeeze(compiled.render(row))


def expression(text: str, columns: Mapping[str, Any], where: str) -> Expression:
    """A function from a row to the value of a Jinja expression.

    Raises:
        ValueError: invalid Jinja, or a name that is not a column; names ``where``.
    """
    _check("{{ " + text + " }}", columns, where)
    compiled = _environment().compile_expression(text, undefined_to_none=False)
    return lambda row: compiled(row)
