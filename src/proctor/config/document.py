"""A configuration file as a tree of values that remember where they were written.

The YAML is the 1.2 core schema: only true and false are booleans, 10:20 is text and not a number to base
60, dates are text. A key that appears twice is an error. Later stages (extends, --set, relative paths,
messages) need to know file and line of a value, which is why plain Python values do not do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import yaml

from proctor.errors import ConfigError, nearest

Loc = tuple[str | int, ...]
"""The way to a value: keys and list positions from the top."""

_MAX_NODES: Final = 100_000
"""More values than any configuration has; a few lines of nested YAML aliases can ask for billions."""
_MAX_DEPTH: Final = 60
_TAG: Final = "tag:yaml.org,2002:"
INT: Final = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+")
FLOAT: Final = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value was written. `file` is what to print: a path, or the override itself."""

    file: str
    directory: Path
    """What relative paths in the value are relative to."""
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value: a mapping (`keys`), a list (`items`) or neither, which is a scalar."""

    origin: Origin
    keys: Mapping[str, Node] | None = None
    items: tuple[Node, ...] | None = None
    scalar: bool | int | float | str | None = None
    text: str = ""
    """A scalar as it was written."""

    @property
    def is_scalar(self) -> bool:
        """Neither a mapping nor a list."""
        return self.keys is None and self.items is None

    def plain(self) -> Any:
        """The value without its origins."""
        if self.keys is not None:
            return {key: node.plain() for key, node in self.keys.items()}
        if self.items is not None:
            return [node.plain() for node in self.items]
        return self.scalar

    def child(self, part: str | int) -> Node | None:
        """The value below a key or at a position; None if there is none."""
        if self.keys is not None:
            return self.keys.get(str(part))
        if self.items is not None and isinstance(part, int) and -len(self.items) <= part < len(self.items):
            return self.items[part]
        return None

    def put(self, loc: Loc, node: Node) -> Node:
        """A copy with `node` at `loc`; mappings on the way that do not exist are created.

        Raises LookupError(depth) where a scalar or a list without that position is in the way.
        """
        return _put(self, loc, node, 0)

    def walk(self, loc: Loc = ()) -> Iterator[tuple[Loc, Node]]:
        """Every value below, this one first."""
        yield loc, self
        for key, node in (self.keys or {}).items():
            yield from node.walk((*loc, key))
        for i, node in enumerate(self.items or ()):
            yield from node.walk((*loc, i))


def _put(node: Node, loc: Loc, new: Node, depth: int) -> Node:
    if depth == len(loc):
        return new
    part = loc[depth]
    if node.items is not None and isinstance(part, int):
        if not -len(node.items) <= part < len(node.items):
            raise LookupError(depth)
        items = list(node.items)
        items[part] = _put(items[part], loc, new, depth + 1)
        return replace(node, items=tuple(items))
    if node.is_scalar and node.scalar is None:
        node = Node(origin=new.origin, keys={})
    if node.keys is None:
        raise LookupError(depth)
    below = node.keys.get(str(part)) or Node(origin=new.origin, keys={})
    return replace(node, keys=dict(node.keys) | {str(part): _put(below, loc, new, depth + 1)})


def from_plain(value: Any, origin: Origin) -> Node:
    """The tree of a plain value, everything with the same origin."""
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return Node(origin=origin, keys={str(k): from_plain(v, origin) for k, v in pairs})
    if isinstance(value, list | tuple):
        return Node(origin=origin, items=tuple(from_plain(v, origin) for v in cast("list[Any]", value)))
    return Node(origin=origin, scalar=value, text=str(value))


class _Loader(yaml.CSafeLoader):
    """Only composes; scalars are resolved by the patterns below and built by `_Builder`."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", INT.pattern, list("-+0123456789")),
    ("float", FLOAT.pattern, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    cast("Any", _Loader).add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)


def parse(text: str, origin: Origin) -> Node:
    """The tree of one YAML document. An empty text is a scalar None.

    Raises ConfigError with file and line for what is not YAML, duplicate keys and unknown tags.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_fault(error, text, origin)) from error
    finally:
        loader.dispose()
    if root is None:
        return Node(origin=origin)
    return _Builder(origin).build(root, 0)


def read(path: Path, shown: str | None = None) -> Node:
    """`parse` of a file. Raises ConfigError also for a file that is missing, unreadable or not UTF-8."""
    shown = shown or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {shown!r}{_neighbours(path)}", hint=_INIT_HINT) from error
    except IsADirectoryError as error:
        inside = sorted(p.name for p in path.glob("*.y*ml"))[:5]
        more = f"; it contains {', '.join(map(repr, inside))}" if inside else ""
        raise ConfigError(f"{shown!r} is a directory, not a configuration file{more}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 text (byte {error.start}); is it a YAML file?") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {shown!r}: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, Origin(file=shown, directory=path.absolute().parent))


_INIT_HINT: Final = "`proctor init` writes an annotated one"


def _neighbours(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    except OSError:
        return f"; the directory {str(path.parent)!r} does not exist"
    near = nearest(path.name, names) or [n for n in names if n.endswith((".yaml", ".yml"))][:5]
    return f"; next to it: {', '.join(map(repr, near))}" if near else ""


def _yaml_fault(error: yaml.YAMLError, text: str, origin: Origin) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = str(getattr(error, "problem", None) or getattr(error, "context", None) or str(error).splitlines()[0])
    if mark is None:
        return f"{origin}: not valid YAML: {problem}"
    hint = ""
    lines = text.splitlines()
    if mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]:
        hint = "; YAML is indented with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        hint = "; quote a text that contains ': ', and check the indentation"
    elif "another document" in problem:
        problem = "a second document begins here (`---`); a configuration is one"
    return f"{origin.file}:{mark.line + 1}: not valid YAML: {problem}, column {mark.column + 1}{hint}"


class _Builder:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._count = 0

    def build(self, node: yaml.Node, depth: int, line: int | None = None) -> Node:
        here = line or node.start_mark.line + 1
        self._count += 1
        if depth > _MAX_DEPTH:
            raise self._fault(here, f"nested more than {_MAX_DEPTH} deep, or an alias that contains itself")
        if self._count > _MAX_NODES:
            raise self._fault(here, f"more than {_MAX_NODES} values")
        origin = Origin(file=self._origin.file, directory=self._origin.directory, line=here)
        if isinstance(node, yaml.MappingNode):
            return Node(origin=origin, keys=self._mapping(node, depth))
        if isinstance(node, yaml.SequenceNode):
            return Node(origin=origin, items=tuple(self.build(item, depth + 1) for item in node.value))
        return self._scalar(node, origin)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == _TAG + "merge":
                for below in self._merged(value, depth):
                    inherited = dict(below) | inherited
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._fault(line, "a key must be a text, not a list or a mapping")
            if key.value in own:
                first = own[key.value].origin.line
                raise self._fault(line, f"the key {key.value!r} appears twice (first on line {first})")
            own[key.value] = self.build(value, depth + 1, line)
        return inherited | own

    def _merged(self, value: yaml.Node, depth: int) -> Iterator[Mapping[str, Node]]:
        for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(source, yaml.MappingNode):
                raise self._fault(value.start_mark.line + 1, "`<<` must name a mapping or a list of mappings")
            yield self.build(source, depth + 1).keys or {}

    def _scalar(self, node: yaml.Node, origin: Origin) -> Node:
        text = str(node.value)
        kind = node.tag.removeprefix(_TAG)
        value: bool | int | float | str | None
        try:
            match kind:
                case "str":
                    value = text
                case "null":
                    value = None
                case "bool":
                    value = text.lower() == "true"
                case "int":
                    value = _whole(text)
                case "float":
                    value = float(text.replace("_", ""))
                case _:
                    raise self._fault(origin.line, f"the YAML tag {node.tag!r} has no meaning here")
        except ValueError as error:
            raise self._fault(origin.line, f"{text[:60]!r} is no {kind}") from error
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise self._fault(origin.line, f"{text[:60]!r} is too large a number")
        return Node(origin=origin, scalar=value, text=text)

    def _fault(self, line: int | None, what: str) -> ConfigError:
        return ConfigError(f"{replace(self._origin, line=line)}: {what}")


def _whole(text: str) -> int:
    cleaned = text.replace("_", "")
    for prefix, base in (("0x", 16), ("0o", 8)):
        if cleaned.startswith(prefix):
            return int(cleaned[2:], base)
    return int(cleaned)
