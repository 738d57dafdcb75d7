"""`--set a.b=c`: one value of the configuration, changed from the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from proctor.config.document import Loc, Node, Origin, parse
from proctor.config.fields import fields_at
from proctor.errors import ConfigError, nearest

_ASSIGNMENT: Final = re.compile(r'(?P<target>(?:"[^"]*"|[^="])*)=(?P<value>.*)', re.DOTALL)


def apply_override(root: Node, override: str, directory: Path) -> Node:
    """`root` with one value replaced. The value is YAML; a position in a list is written as a number.

    A key that contains dots may be written as it is, where it exists, or in double quotes; one that contains `=`
    needs them. Relative paths in
    the value are relative to `directory`. Raises ConfigError for an override without `=`, a path through
    something that is no mapping or list, and a key that the schema does not have.
    """
    shown = f"--set {override}"
    split = _ASSIGNMENT.fullmatch(override)
    if split is None or not split["target"].strip():
        raise ConfigError(f"{shown!r} is not of the form KEY=VALUE", hint="for example --set engine.max_in_flight=8")
    target, text = split["target"].strip(), split["value"]
    loc = _locate(root, _parts(target))
    if loc[0] == "extends":
        raise ConfigError(f"{shown}: `extends:` is read before overrides; write it in a file")
    _check_keys(loc, root, shown)
    origin = Origin(file=shown, directory=directory)
    try:
        return root.put(loc, _relabel(parse(text, origin), origin))
    except LookupError as error:
        depth = int(error.args[0])
        raise ConfigError(f"{shown}: {_in_the_way(root, loc, depth)}") from error


def _parts(target: str) -> list[str]:
    parts = re.findall(r'"([^"]*)"|([^."]+)', target)
    return [quoted or bare for quoted, bare in parts]


def _locate(root: Node, parts: list[str]) -> Loc:
    """Group the dotted parts into keys: the longest run of parts that is a key there, else one part."""
    loc: list[str | int] = []
    node: Node | None = root
    rest = parts
    while rest:
        if node is not None and node.items is not None and re.fullmatch(r"-?\d+", rest[0]):
            loc.append(int(rest[0]))
            taken = 1
        else:
            keys = (node.keys if node is not None else None) or {}
            taken = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in keys), 1)
            loc.append(".".join(rest[:taken]))
        node = node.child(loc[-1]) if node is not None else None
        rest = rest[taken:]
    return tuple(loc)


def _check_keys(loc: Loc, root: Node, shown: str) -> None:
    for depth, part in enumerate(loc):
        valid = fields_at(loc[:depth], root.plain())
        if valid is None or part in valid:
            continue
        where = ".".join(map(str, loc[:depth])) or "the configuration"
        near = nearest(str(part), valid)
        known = f"did you mean {' or '.join(map(repr, near))}?" if near else f"valid: {', '.join(valid)}"
        raise ConfigError(f"{shown}: {where} has no key {str(part)!r}; {known}")


def _in_the_way(root: Node, loc: Loc, depth: int) -> str:
    node: Node | None = root
    for part in loc[:depth]:
        node = node.child(part) if node is not None else None
    where = ".".join(map(str, loc[:depth])) or "the top level"
    if node is not None and node.items is not None:
        return f"{where} is a list of {len(node.items)}; positions are 0 to {len(node.items) - 1}, not {loc[depth]!r}"
    return f"{where} is {node.text if node is not None else None!r}, which has no keys"


def _relabel(node: Node, origin: Origin) -> Node:
    """The tree with one origin everywhere: line numbers within an override say nothing."""
    return Node(
        origin=origin,
        keys=None if node.keys is None else {k: _relabel(v, origin) for k, v in node.keys.items()},
        items=None if node.items is None else tuple(_relabel(v, origin) for v in node.items),
        scalar=node.scalar,
        text=node.text,
    )
