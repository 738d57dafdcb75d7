"""pydantic's findings in plain words: file, line, dotted path, the value, and what would be valid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from proctor.config.document import Loc, Node
from proctor.config.fields import Place, place, tag_of
from proctor.config.spec import TASK_SOURCES, RunSpec
from proctor.errors import nearest

_EXPECTED: Final = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_parsing_size": "expected a smaller whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "model_type": "expected a mapping (key: value)",
    "model_attributes_type": "expected a mapping (key: value)",
    "dict_type": "expected a mapping (key: value)",
    "tuple_type": "expected a list",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}
_EMPTY_HINT: Final = {
    "models": "; for example models: {smollm2: {path: embedded:smollm2-135m}}",
    "tasks": "; for example tasks: [{lm_eval: hellaswag}]",
}
_ROOT_ONLY: Final = "extends"


def explain(error: ValidationError, root: Node, schema: Any = RunSpec, prefix: Loc = ()) -> list[str]:
    """One line for each finding, in the order of the file. `prefix` is where `schema` stands in `root`."""
    base = root
    for part in prefix:
        base = base.child(part) or base
    data = base.plain()
    lines: dict[str, tuple[int, int]] = {}
    for i, found in enumerate(error.errors(include_url=False)):
        where = place(found["loc"], data, schema)
        node, known = _deepest(base, where.loc)
        if found["type"] in ("too_short", "missing") and _is_consequence(found, node, known, where.loc):
            continue
        dotted = ".".join(_shown(part) for part in (*prefix, *where.loc))
        what = _message(found, node if known == len(where.loc) else None, where, data, schema)
        line = f"{node.origin}: {dotted + ': ' if dotted else ''}{what}"
        lines.setdefault(line, (node.origin.line or 0, i))
    return sorted(lines, key=lambda line: lines[line])


def text_places(error: ValidationError, root: Node, schema: Any = RunSpec) -> list[tuple[Loc, Node]]:
    """Where text is expected and an unquoted number, true or false stands: meant as it was written."""
    data = root.plain()
    out: list[tuple[Loc, Node]] = []
    for found in error.errors(include_url=False):
        where = place(found["loc"], data, schema)
        node, known = _deepest(root, where.loc)
        if found["type"] == "string_type" and known == len(where.loc) and node.is_scalar and node.scalar is not None:
            out.append((where.loc, node))
    return out


def _deepest(root: Node, loc: Loc) -> tuple[Node, int]:
    """The node at `loc`, or the last one on the way that exists, and how far that is."""
    for depth, part in enumerate(loc):
        below = root.child(part)
        if below is None:
            return root, depth
        root = below
    return root, len(loc)


def _is_consequence(found: ErrorDetails, node: Node, known: int, loc: Loc) -> bool:
    """pydantic calls a list too short when its only item is wrong; the item's own line is enough."""
    return found["type"] == "too_short" and known == len(loc) and bool(node.keys or node.items or node.text)


def _shown(part: str | int) -> str:
    text = str(part)
    return text if re.fullmatch(r"[\w-]+", text) else repr(text)


def _message(found: ErrorDetails, node: Node | None, where: Place, data: Any, schema: Any) -> str:
    kind = found["type"]
    context = found.get("ctx") or {}
    if kind == "extra_forbidden":
        return _unknown_key(found["loc"], data, schema)
    if kind == "missing":
        return "this key is required"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _no_branch(node, where)
    if kind == "literal_error":
        return _not_among(node, re.findall(r"'([^']*)'", str(context.get("expected", ""))))
    if kind == "value_error":
        text = str(context.get("error", found["msg"]))
        return text if node is None or not node.is_scalar else text + _got(node)
    for limit, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if limit in context:
            return f"must be {sign} {context[limit]}{_got(node)}"
    if kind == "too_short":
        return "must not be empty" + _EMPTY_HINT.get(str(where.loc[-1]) if where.loc else "", "")
    return _EXPECTED.get(kind, found["msg"][:1].lower() + found["msg"][1:]) + _got(node)


def _got(node: Node | None) -> str:
    if node is None:
        return ""
    if node.keys is not None:
        return ", not a mapping"
    if node.items is not None:
        return ", not a list"
    if node.scalar is None:
        return ", but it is empty"
    return f", not {_cut(node.text)!r}"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(loc: Sequence[str | int], data: Any, schema: Any) -> str:
    key = str(loc[-1])
    parent = place(loc[:-1], data, schema)
    valid = list(parent.fields or ())
    if parent.schema is RunSpec:
        valid.append(_ROOT_ONLY)
    chosen = parent.schema if len(parent.branches) > 1 else None
    of = f" for {'type: ' if chosen not in TASK_SOURCES.values() else ''}{tag_of(chosen)}" if chosen else ""
    near = nearest(key, valid)
    if near:
        return f"unknown key {key!r}{of}; did you mean {' or '.join(map(repr, near))}?"
    others = [tag_of(b) for b in parent.branches if b is not chosen and key in b.model_fields]
    elsewhere = f" (it belongs to {', '.join(others)})" if others else ""
    return f"unknown key {key!r}{of}{elsewhere}; valid: {', '.join(valid)}"


def _no_branch(node: Node | None, where: Place) -> str:
    tags = [tag_of(branch) for branch in where.branches]
    if set(tags) <= set(TASK_SOURCES):
        return _no_source(node, tags)
    stated = node.child("type") if node is not None else None
    if node is None or node.keys is None:
        return f"expected a mapping with `type:` ({', '.join(tags)}){_got(node)}"
    if stated is None:
        return f"`type:` is missing; one of: {', '.join(tags)}"
    return "type: " + _not_among(stated, tags)


def _no_source(node: Node | None, tags: list[str]) -> str:
    keys = " or ".join(f"`{tag}:`" for tag in tags)
    if node is None or node.keys is None:
        return f"expected a mapping with {keys}{_got(node)}"
    both = [tag for tag in tags if tag in node.keys]
    if both:
        return f"has {' and '.join(f'`{tag}:`' for tag in both)}; an entry has one of them"
    for key in node.keys:
        near = nearest(key, tags)
        if near:
            return f"unknown key {key!r}; did you mean {near[0]!r}?"
    return f"needs {keys}; it has {', '.join(map(repr, node.keys)) or 'no keys'}"


def _not_among(node: Node | None, valid: list[str]) -> str:
    text = _cut(node.text) if node is not None and node.is_scalar else ""
    near = nearest(text, valid)
    also = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown value {text!r}; {also}valid: {', '.join(valid)}"
