"""run.yaml to RunSpec: extends, overrides, paths, validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from proctor.config.complaints import explain, text_places
from proctor.config.document import Loc, Node
from proctor.config.engines import ENGINE, LAUNCH, engine_for, launch_for
from proctor.config.merging import merge, read_extended
from proctor.config.overrides import apply_override
from proctor.config.paths import absolute
from proctor.config.spec import EngineSpec, LaunchSpec, RunSpec
from proctor.errors import ConfigError


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunSpec:
    """Read a configuration file, with `extends:` and `--set` overrides, as a checked RunSpec.

    Paths in the result are absolute, and a model that is a hub id is written `hub:ID`. Raises one ConfigError
    that lists everything wrong, a line each: file, line, dotted path, value, and the nearest valid key.
    """
    shown = os.fspath(path)
    root = read_extended(Path(shown), shown)
    home = root.origin
    for override in overrides:
        root = apply_override(root, override, Path.cwd())
    return _validated(absolute(root, home), shown)


def _validated(root: Node, shown: str) -> RunSpec:
    try:
        spec = RunSpec.model_validate(root.plain())
    except ValidationError as error:
        as_written = text_places(error, root)
        if as_written:
            return _validated(_as_text(root, as_written), shown)
        raise _config_error(explain(error, root), shown) from None
    faults: list[str] = []
    for name in spec.models:
        for key, adapter, schema in (("engine", ENGINE, EngineSpec), ("launch", LAUNCH, LaunchSpec)):
            root, found = _check_override(root, ("models", name, key), adapter, schema)
            faults += found
    if faults:
        raise _config_error(faults, shown)
    spec = RunSpec.model_validate(root.plain())
    for name in spec.models:
        faults += _conflicts(spec, name, root)
    if faults:
        raise _config_error(faults, shown)
    return spec


def _check_override(root: Node, loc: Loc, adapter: TypeAdapter[Any], schema: Any) -> tuple[Node, list[str]]:
    """Validate a model's engine or launch as it is once merged over the run's; faults, a line each.

    Returns the tree too, in which numbers that were meant as text have become text.
    """
    own = _at(root, loc)
    if own is None or own.keys is None:
        return root, []
    base = root.child(loc[-1])
    whole = own if base is None else merge(base, own, str(loc[-1]))
    try:
        adapter.validate_python(whole.plain())
    except ValidationError as error:
        as_written = [(p, n) for p, n in text_places(error, whole, schema) if _at(own, p) is n]
        if as_written:
            fixed = _as_text(root, [((*loc, *p), n) for p, n in as_written])
            return _check_override(fixed, loc, adapter, schema)
        return root, explain(error, root.put(loc, whole), schema, loc)
    return root, []


def _conflicts(spec: RunSpec, name: str, root: Node) -> list[str]:
    try:
        engine_for(spec, name)
        launch_for(spec, name)
    except ConfigError as error:
        origin = (_at(root, ("models", name)) or root).origin
        return [f"{origin}: models.{name}: {error}"]
    return []


def _at(root: Node, loc: Loc) -> Node | None:
    node: Node | None = root
    for part in loc:
        node = node.child(part) if node is not None else None
    return node


def _as_text(root: Node, places: list[tuple[Loc, Node]]) -> Node:
    for loc, node in places:
        root = root.put(loc, replace(node, scalar=node.text))
    return root


def _config_error(lines: list[str], shown: str) -> ConfigError:
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError(f"{shown}: {len(lines)} errors\n" + "\n".join(f"  {line}" for line in lines))
