"""Templates of a native task: sandboxed Jinja over one document, where a missing field is an error."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, UndefinedError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from proctor.catalog.native_rows import Row, Rows
from proctor.errors import TaskError, nearest


class _NullField(Exception):
    """A template wrote a null."""


def _no_null(value: Any) -> Any:
    if value is None:
        raise _NullField
    return value


class _Environment(SandboxedEnvironment):
    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        """One dictionary: Jinja's chain of two is walked anew for each rendering, a third of its time here."""
        return {**self.globals, **(d or {})}


_ENVIRONMENT: Final = _Environment(
    undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_no_null
)


class FieldTemplate:
    """One template of a task file, under the key that it stands at.

    A row's fields are the variables; `doc` is the whole row, for names that are no identifiers.
    """

    def __init__(self, source: str, *, key: str, file: str) -> None:
        """Compile. Raises TaskError for a template that does not parse."""
        self._key = key
        self._file = file
        try:
            tree = _ENVIRONMENT.parse(source)
            self._template = _ENVIRONMENT.from_string(source)
            self._expression = (
                _ENVIRONMENT.compile_expression(_inside(source), undefined_to_none=False)
                if _is_expression(tree, source)
                else None
            )
        except TemplateSyntaxError as error:
            raise TaskError(
                f"{file!r}: the template of `{key}` does not parse (line {error.lineno}): {error.message}"
            ) from error
        self._fields = sorted(meta.find_undeclared_variables(tree))

    def text(self, rows: Rows, index: int) -> str:
        """Render row `index`. Raises TaskError that names the field, the row and the fields there are."""
        try:
            return self._template.render(_variables(rows.rows[index]))
        except (TemplateError, _NullField, ArithmeticError, LookupError, TypeError, ValueError) as e:
            raise self._refused(e, rows, index) from e

    def value(self, rows: Rows, index: int) -> Any:
        """As `text`, but a template that is one {{expression}} keeps its value: a list, a number, None."""
        if self._expression is None:
            return self.text(rows, index)
        try:
            result = self._expression(_variables(rows.rows[index]))
            if isinstance(result, Undefined):
                str(result)  # StrictUndefined raises here, with the field's name
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._refused(error, rows, index) from error
        return result

    def _refused(self, error: Exception, rows: Rows, index: int) -> TaskError:
        row = rows.rows[index]
        where = f"{self._file!r}: `{self._key}` at {rows.place(index)}"
        missing = [f for f in self._fields if f not in row and f != "doc"]
        if isinstance(error, UndefinedError) and missing:
            name = missing[0]
            near = nearest(name, row)
            reason = (
                f"there is no field {name!r}; "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"the row has: {', '.join(sorted(row)) or 'none'}"
            )
            if name in rows.omitted:
                reason += f" ({name!r} holds no text)"
            return TaskError(f"{where}: {reason}")
        if isinstance(error, _NullField):
            nulls = [f for f in self._fields if f in row and row[f] is None]
            return TaskError(f"{where}: {' and '.join(map(repr, nulls)) or 'a value'} is null")
        return TaskError(f"{where}: {type(error).__name__}: {error}")


def _variables(row: Row) -> dict[str, Any]:
    return {"doc": row, **row}


def _is_expression(tree: nodes.Template, source: str) -> bool:
    if not (source.startswith("{{") and source.endswith("}}")) or len(tree.body) != 1:
        return False
    output = tree.body[0]
    return (
        isinstance(output, nodes.Output)
        and len(output.nodes) == 1
        and not isinstance(output.nodes[0], nodes.TemplateData)
    )


def _inside(source: str) -> str:
    return source[2:-2].removeprefix("-").removesuffix("-").strip()
