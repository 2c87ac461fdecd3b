"""The one place that knows how prompts are written: Jinja templates and expressions over the columns of a row.

They run in Jinja's sandbox, which keeps them from the machine, and within limits, which keep them from its time and memory:
a template comes from a file that somebody else may have written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

Template = Callable[[Mapping[str, Any]], str]
Expression = Callable[[Mapping[str, Any]], Any]

_MOST_ITEMS = 100_000  # of all loops of one template together, and of one list
_MOST_CHARACTERS = 30_000_000  # of one text
_MOST_BITS = 4096  # of one number
_WIDTH = re.compile(r"[0-9]{5,}")  # in a format: longer than any prompt is wide
_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
_spent: ContextVar[list[int]] = ContextVar("_spent")


class TemplateError(ValueError):
    """A template that cannot be filled in with a row; names the file, the field and what is wrong."""


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined, nodes
    from jinja2.sandbox import SandboxedEnvironment, SecurityError, safe_range
    from jinja2.visitor import NodeTransformer

    def check(allowed: bool, what: str) -> None:
        if not allowed:
            raise SecurityError(f"{what} is more than a prompt can need")

    def size(value: Any) -> int:
        return len(value) if isinstance(value, (str, list, tuple)) else len(str(value))

    def check_call(name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """What ``name``, a filter or a method of its first argument, would make of its arguments."""
        values = (*given[1:], *named.values())
        check(not any(isinstance(value, int) and abs(value) > _MOST_ITEMS for value in values), f"{values} in {name}")
        if name in ("format", "format_map") and given:
            check(not _WIDTH.search(str(given[0])), f"the width in {name}")
        if name == "replace" and len(given) > 2:
            check(size(given[0]) * max(1, size(given[2])) <= _MOST_CHARACTERS, "the text of replace")
        if name == "join":
            check(sum(map(size, given[-1] if len(given) > 1 else given[0])) <= _MOST_CHARACTERS, "the text of join")

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            if name == "join" and len(given) > skip:
                # A generator can be read once only.
                given = (*given[:skip], list(given[skip]), *given[skip + 1 :])
                check(sum(map(size, given[skip])) <= _MOST_CHARACTERS, "the text of join")
                check(len(given[skip]) * sum(map(size, given[skip + 1 :])) <= _MOST_CHARACTERS, "the text of join")
            else:
                check_call(name, given[skip:], named)
            return function(*given, **named)

        return call

    def counted(items: Iterable[Any]) -> Iterator[Any]:
        spent = _spent.get()
        for item in items:
            spent[0] += 1
            check(spent[0] <= _MOST_ITEMS, f"going through more than {_MOST_ITEMS} items")
            yield item

    def concatenated(parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        check(sum(map(len, texts)) <= _MOST_CHARACTERS, "the text")
        return "".join(texts)

    class Limits(NodeTransformer):
        """Loops count what they go through, and texts that are put together are measured."""

        def visit_For(self, node: Any) -> Any:
            node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
            return self.generic_visit(node)

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "concatenated", [], [], None, None, lineno=node.lineno)

    class Sandbox(SandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%", "+"})

        def _parse(self, *words: Any) -> Any:
            return Limits().visit(super()._parse(*words))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*" and isinstance(left, int) and isinstance(right, int):
                check(left.bit_length() + right.bit_length() <= _MOST_BITS, f"{operator} of numbers")
            elif operator == "*" and not isinstance(left, float) and not isinstance(right, float):
                sequence, count = (right, left) if isinstance(left, int) else (left, right)
                most = _MOST_CHARACTERS if isinstance(sequence, str) else _MOST_ITEMS
                check(size(sequence) * count <= most, "a text or list that many times")
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                check(left.bit_length() * abs(right) <= _MOST_BITS, f"{operator} of numbers")
            elif operator == "%" and isinstance(left, str):
                check(not _WIDTH.search(left), "the width in a format")
            elif operator == "+" and isinstance(left, (str, list, tuple)):
                most = _MOST_CHARACTERS if isinstance(left, str) else _MOST_ITEMS
                check(size(left) + size(right) <= most, "the text or list")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, called: Any, *given: Any, **named: Any) -> Any:  # type: ignore[override]
            owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
            if isinstance(owner, str):
                check_call(name, (owner, *given), named)
            return super().call(context, called, *given, **named)

    made = Sandbox(undefined=StrictUndefined, autoescape=False)
    made.filters = {name: guarded(name, function) for name, function in made.filters.items()}
    made.filters |= {"counted": counted, "concatenated": concatenated}
    made.globals = {"zip": zip, "range": safe_range}
    return made


def squeeze(text: str) -> str:
    """``text`` with each run of white space as one space and none at the ends."""
    return " ".join(text.split())


def _check(source: str, columns: Mapping[str, Any], where: str) -> None:
    from jinja2 import TemplateError as JinjaError
    from jinja2 import meta, nodes

    environment = _environment()
    try:
        tree = environment.parse(source)
        used = meta.find_undeclared_variables(tree)
    except (JinjaError, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"{where} is not valid Jinja ({' '.join(str(error).split())}); correct it") from error
    # What defines, imports or repeats parts of a template has no use in a prompt, and no limit.
    unfit = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.Extends)
    for node in tree.find_all((*unfit, nodes.Include, nodes.Import, nodes.FromImport, nodes.For)):
        if not isinstance(node, nodes.For) or node.recursive:
            what = "a recursive loop" if isinstance(node, nodes.For) else type(node).__name__.lower()
            raise ValueError(f"{where} uses {what}, which prompts do not have; use expressions, if, for and set")
    unknown = sorted(used - set(columns) - set(environment.globals))
    if unknown:
        raise ValueError(f"{where} uses {unknown[0]!r}, which is not among columns ({', '.join(columns)}); correct it")


def _within_limits(make: Callable[[Mapping[str, Any]], Any], where: str) -> Callable[[Mapping[str, Any]], Any]:
    from jinja2 import TemplateError as JinjaError

    def made(row: Mapping[str, Any]) -> Any:
        before = _spent.set([0])
        try:
            return make(row)
        except TemplateError:
            raise
        except (JinjaError, *_ERRORS) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise TemplateError(f"{where} cannot be filled in ({reason}); correct it, or the row") from error
        finally:
            _spent.reset(before)

    return made


def template(text: str, columns: Mapping[str, Any], where: str) -> Template:
    """A function from a row to the filled-in text, white space squeezed. It raises ``TemplateError``.

    Raises:
        ValueError: invalid Jinja, or a name that is not a column; names ``where``.
    """
    _check(text, columns, where)
    compiled = _environment().from_string(text)

    def filled(row: Mapping[str, Any]) -> str:
        parts, length = [], 0
        for part in compiled.generate(row):
            parts.append(part)
            length += len(part)
            if length > _MOST_CHARACTERS:
                raise TemplateError(f"{where} writes more than {_MOST_CHARACTERS} characters; shorten it, or the row")
        return squeeze("".join(parts))

    return _within_limits(filled, where)


def expression(text: str, columns: Mapping[str, Any], where: str) -> Expression:
    """A function from a row to the value of a Jinja expression. It raises ``TemplateError``.

    Raises:
        ValueError: invalid Jinja, or a name that is not a column; names ``where``.
    """
    _check("{{ " + text + " }}", columns, where)
    from jinja2 import TemplateError as JinjaError

    try:
        compiled = _environment().compile_expression(text, undefined_to_none=False)
    except (JinjaError, RecursionError) as error:
        raise ValueError(f"{where} is not a Jinja expression ({' '.join(str(error).split())}); correct it") from error
    return _within_limits(lambda row: compiled(row), where)
