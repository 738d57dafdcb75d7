"""Relative paths in a configuration: relative to the file that states them."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from proctor.config.document import Loc, Node, Origin
from proctor.config.spec import RunSpec, is_url

HUB: Final = "hub:"
"""Prefix of a model path that is a hub id, whatever directories exist."""
_SCHEMES: Final = ("embedded:", HUB)
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ANY: Final = None

_LAUNCH: Final[tuple[tuple[str | None, ...], ...]] = (("launch",), ("models", _ANY, "launch"))
_FILES: Final[tuple[tuple[str | None, ...], ...]] = (
    ("store",),
    ("runs",),
    ("tasks", _ANY, "include_path"),
    *((*launch, "environment", key) for launch in _LAUNCH for key in ("venv", "pixi", "conda_sh")),
)
_IMAGES: Final = tuple((*launch, "container", "image") for launch in _LAUNCH)
_WEIGHTS: Final[tuple[tuple[str | None, ...], ...]] = (
    ("models", _ANY, "path"),
    ("models", _ANY, "tokenizer"),
    ("models", _ANY, "adapters"),
)
_ENGINE_PROGRAMS: Final[tuple[tuple[str | None, ...], ...]] = (("engine", "python"), ("engine", "server", "python"))
_PROGRAMS: Final[tuple[tuple[str | None, ...], ...]] = (
    ("tasks", _ANY, "python"),
    *_ENGINE_PROGRAMS,
    *(("models", _ANY, *rest) for rest in _ENGINE_PROGRAMS),
    *((*launch, "environment", key) for launch in _LAUNCH for key in ("conda", "python")),
)
_TASK_FILES: Final[tuple[tuple[str | None, ...], ...]] = (("tasks", _ANY, "native"), ("tasks", _ANY, "lm_eval"))


def absolute(root: Node, home: Origin) -> Node:
    """The tree with every relative path made absolute, and `store` and `runs` filled in beside `home`.

    A program (`python:`) is a path only if it contains a slash; a model is a local path if it is absolute,
    begins with ./ ../ or ~, ends in .gguf, is no possible hub id, or exists; otherwise it becomes
    `hub:ID`. A native task is a file unless it begins with a scheme (`demo:`); an lm-eval task is one only
    if it looks like a path to YAML.
    """
    for key in ("store", "runs"):
        if root.keys is not None and key not in root.keys:
            default = str(RunSpec.model_fields[key].default)
            root = root.put((key,), Node(origin=replace(home, line=None), scalar=default, text=default))
    for loc, node in list(root.walk()):
        if not isinstance(node.scalar, str) or not node.scalar:
            continue
        resolved = _resolved(loc, node.scalar, node.origin.directory)
        if resolved != node.scalar:
            root = root.put(loc, replace(node, scalar=resolved, text=resolved))
    return root


def local_path(path: str, directory: Path) -> Path | None:
    """Where a model's, tokenizer's or adapter's `path` is on this machine; None if it is something else."""
    if is_url(path) or path.startswith(_SCHEMES):
        return None
    full = _joined(path, directory)
    explicit = path.startswith(("/", "./", "../", "~")) or path in (".", "..") or path.endswith((".gguf", "/"))
    return full if explicit or not _HUB_ID.fullmatch(path) or os.path.exists(full) else None


def _resolved(loc: Loc, text: str, directory: Path) -> str:
    if _matches(loc, _FILES):
        return str(_joined(text, directory))
    if _matches(loc, _WEIGHTS):
        local = local_path(text, directory)
        if local is not None:
            return str(local)
        return text if is_url(text) or text.startswith(_SCHEMES) else HUB + text
    if _matches(loc, _PROGRAMS):
        return str(_joined(text, directory)) if "/" in text or text.startswith("~") else text
    if _matches(loc, _IMAGES):
        is_file = text.startswith(("./", "../", "~")) or text.endswith((".sif", ".sqsh"))
        return str(_joined(text, directory)) if is_file else text
    if _matches(loc, _TASK_FILES):
        is_native = "native" in loc
        scheme = re.match(r"[a-z][a-z0-9_]+:", text)
        is_file = not scheme if is_native else text.endswith((".yaml", ".yml"))
        return str(_joined(text, directory)) if is_file else text
    return text


def _matches(loc: Loc, patterns: tuple[tuple[str | None, ...], ...]) -> bool:
    """Whether `loc`, or the list that it is an item of, is one of the patterns."""
    for pattern in patterns:
        trimmed = loc[:-1] if len(loc) == len(pattern) + 1 and isinstance(loc[-1], int) else loc
        if len(trimmed) == len(pattern) and all(p in (_ANY, part) for p, part in zip(pattern, trimmed, strict=True)):
            return True
    return False


def _joined(path: str, directory: Path) -> Path:
    return Path(os.path.normpath(directory / os.path.expanduser(path)))
