"""Profiles from files: ours and the user's. YAML, hence JSON too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from platformdirs import user_config_path
from pydantic import ValidationError

from proctor.config.clusters.oellm import is_oellm, translated
from proctor.config.clusters.profile import ClusterProfile
from proctor.config.complaints import explain, text_places
from proctor.config.document import Node, from_plain, read
from proctor.errors import ConfigError

PACKAGED: Final = Path(__file__).with_name("packaged")
FILE: Final = "clusters.yaml"
VARIABLE: Final = "PROCTOR_CLUSTERS"
"""Names files of profiles, separated as in PATH."""
SHARED: Final = "shared"
"""The entry of a file that holds what all of its entries have."""
_MERGED: Final = frozenset({"container", "staging", "env", "sbatch", "scoring"})


def user_files(environ: Mapping[str, str], beside: Path | None = None) -> list[Path]:
    """The user's files, most particular first: those of PROCTOR_CLUSTERS, clusters.yaml in the directory `beside`
    (that of run.yaml), and clusters.yaml in the user's configuration directory.

    Raises ConfigError if PROCTOR_CLUSTERS names a file that is not there.
    """
    named = [Path(os.path.expanduser(p)) for p in environ.get(VARIABLE, "").split(os.pathsep) if p]
    for path in named:
        if not path.is_file():
            raise ConfigError(f"{VARIABLE} names {str(path)!r}, which is no file")
    return named + [path for path in user_places(beside) if path.is_file()]


def user_places(beside: Path | None = None) -> list[Path]:
    """Where a user's file of profiles is looked for, beside what PROCTOR_CLUSTERS names."""
    return [directory / FILE for directory in (beside, user_config_path("proctor", appauthor=False)) if directory]


def load_profiles(files: Sequence[Path], environ: Mapping[str, str]) -> dict[str, ClusterProfile]:
    """Name → profile: the files' own, in their order, then the packaged ones.

    An entry with the name of a later one is merged over it. Raises ConfigError with file, line and key.
    """
    entries: dict[str, tuple[dict[str, Any], Node, str]] = {}
    for path in (*files, *sorted(PACKAGED.glob("*.yaml"))):
        source = "packaged" if path.parent == PACKAGED else str(path)
        for name, (value, node) in _entries(path, environ).items():
            if name not in entries:
                entries[name] = value, node, source
            else:
                over, own, first = entries[name]
                entries[name] = _merged(value, over), own, f"{first}, over {source}"
    return {name: _profile(name, *entry) for name, entry in entries.items()}


def _entries(path: Path, environ: Mapping[str, str]) -> dict[str, tuple[dict[str, Any], Node]]:
    root = read(path)
    if root.keys is None:
        raise ConfigError(f"{root.origin}: expected a mapping of names to profiles", hint=_HINT)
    for name, node in root.keys.items():
        if node.keys is None:
            raise ConfigError(f"{node.origin}: {name}: expected a profile, which is a mapping", hint=_HINT)
    plain = cast("dict[str, dict[str, Any]]", root.plain())
    shared = plain.pop(SHARED, {})
    own = {key: value for key, value in shared.items() if not key.isupper()}
    out: dict[str, tuple[dict[str, Any], Node]] = {}
    for name, value in plain.items():
        value = _merged(own, value)
        node = root.keys[name]
        if is_oellm(value):
            value = translated(value, shared, environ)
            node = from_plain(value, node.origin)
        out[name] = value, node
    return out


_HINT: Final = "`proctor clusters show generic` lists the keys"


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings that are lists of settings are merged, everything else is replaced."""
    out = dict(base) | dict(over)
    for key in _MERGED & base.keys() & over.keys():
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping):
            out[key] = dict(base[key]) | dict(over[key])
    return out


def _profile(name: str, value: dict[str, Any], node: Node, source: str) -> ClusterProfile:
    try:
        return ClusterProfile.model_validate({**value, "name": name, "source": source})
    except ValidationError as error:
        tree = from_plain(value, node.origin) if node.keys is None else node
        as_written = text_places(error, tree, ClusterProfile)
        fixed = value
        for loc, found in as_written:
            fixed = _replaced(fixed, loc, found.text)
        if as_written:
            return _profile(name, fixed, from_plain(fixed, node.origin), source)
        lines = [f"{line} (cluster {name!r})" for line in explain(error, tree, ClusterProfile)]
        raise ConfigError("\n".join(lines)) from None


def _replaced(value: Any, loc: Sequence[str | int], text: str) -> Any:
    if not loc:
        return text
    first, *rest = loc
    if isinstance(value, Mapping):
        keys = cast("Mapping[Any, Any]", value)
        return {**keys, first: _replaced(keys[first], rest, text)}
    items = list(value)
    items[int(first)] = _replaced(items[int(first)], rest, text)
    return items
