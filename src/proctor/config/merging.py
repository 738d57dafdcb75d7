"""`extends:` and the deep merge of mappings."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from proctor.config.document import Node, read
from proctor.errors import ConfigError

TYPED: Final[dict[str, str | None]] = {"engine": "openai", "launch": "local", "server": None}
"""Mappings whose other keys depend on `type`, and the type when none is stated: another type replaces the
mapping instead of merging."""


def merge(base: Node, over: Node, key: str = "") -> Node:
    """`over` on top of `base`: mappings are merged key by key, everything else is replaced.

    Under a key of TYPED, an `over` that states another `type` drops the keys of the base's type.
    """
    if base.keys is None or over.keys is None:
        return over
    if key in TYPED and over.child("type") is not None and _type(over, key) != _type(base, key):
        return over
    keys = dict(base.keys)
    for name, node in over.keys.items():
        keys[name] = merge(keys[name], node, name) if name in keys else node
    return replace(over, keys=keys)


def _type(node: Node, key: str) -> object:
    stated = node.child("type")
    return stated.scalar if stated is not None else TYPED[key]


def read_extended(path: Path, shown: str | None = None, chain: tuple[Path, ...] = ()) -> Node:
    """A file merged over the files of its `extends:`, which are merged left to right.

    Files are named relative to the one that names them. Raises ConfigError for a cycle (naming the chain),
    for a file that is missing, and for a top level that is no mapping.
    """
    identity = Path(os.path.realpath(path))
    if identity in chain:
        cycle = [*chain[chain.index(identity) :], identity]
        raise ConfigError(f"`extends:` goes round in a circle: {' → '.join(str(p) for p in cycle)}")
    root = read(path, shown)
    if root.keys is None:
        found = (
            "a list" if root.items is not None else "empty" if root.scalar is None else f"the text {root.text[:40]!r}"
        )
        raise ConfigError(
            f"{root.origin.file}: the top level must be a mapping with name, models and tasks, but it is {found}",
            hint="`proctor init` writes an annotated file",
        )
    bases = root.keys.get("extends")
    own = replace(root, keys={k: v for k, v in root.keys.items() if k != "extends"})
    if bases is None:
        return own
    merged: Node | None = None
    for name in _names(bases):
        below = Path(os.path.expanduser(str(name.scalar)))
        try:
            base = read_extended(name.origin.directory / below, chain=(*chain, identity))
        except ConfigError as error:
            if chain or "circle" in error.message:
                raise
            raise ConfigError(f"{name.origin}: extends: {error.message}", hint=error.hint) from error
        merged = base if merged is None else merge(merged, base)
    return own if merged is None else merge(merged, own)


def _names(bases: Node) -> tuple[Node, ...]:
    names = bases.items if bases.items is not None else (bases,)
    for name in names:
        if not isinstance(name.scalar, str) or not name.scalar:
            raise ConfigError(f"{name.origin}: extends: expected a file name or a list of file names")
    return names
