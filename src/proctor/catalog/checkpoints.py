"""Directories of checkpoints: by pattern, or by looking for weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.errors import ModelError, nearest

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".gguf")
_NOT_WEIGHTS: Final = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})
"""What training frameworks leave beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A directory that matched: its name is its label, zero padding kept."""

    path: Path
    label: str
    step: int | None
    """As the directory numbers it, before any offset."""
    commit: str | None = None
    """Of a hub snapshot."""


def is_weight_file(name: str) -> bool:
    """Whether a file of that name holds weights of a model."""
    return name.endswith(WEIGHT_SUFFIXES) and name not in _NOT_WEIGHTS


def has_weights(directory: Path) -> bool:
    """Whether the directory itself (not one below) holds weights. Raises ModelError if it cannot be read."""
    return any(is_weight_file(p.name) for p in children(directory))


def children(directory: Path) -> list[Path]:
    """What is in a directory, sorted by name. Raises ModelError if it cannot be read."""
    try:
        return sorted(directory.iterdir(), key=lambda p: p.name)
    except OSError as error:
        raise ModelError(f"cannot read the directory {str(directory)!r}: {error.strerror}") from error


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A directory-name pattern as an anchored regular expression: {step} is digits, * is anything."""
    escaped = re.escape(pattern).replace(r"\{step\}", "(?P<step>[0-9]+)").replace(r"\*", ".*")
    return re.compile(rf"\A{escaped}\Z", re.DOTALL)


def match_pattern(root: Path, pattern: str, steps: Sequence[int] | None) -> list[Checkpoint]:
    """The child directories of `root` whose name matches, by step and then by name.

    With `steps`, only those; a requested step without a directory is an error that lists the present ones.
    Raises ModelError for that and where nothing matches.
    """
    regex = pattern_regex(pattern)
    directories = [p for p in children(root) if p.is_dir()]
    found = [Checkpoint(path=p, label=p.name, step=int(m["step"])) for p in directories if (m := regex.match(p.name))]
    found.sort(key=lambda c: (c.step, c.label))
    if not found:
        names = [p.name for p in directories]
        near = nearest(pattern.replace("{step}", "0"), names, n=5) or names[:5]
        shown = f"it contains {', '.join(map(repr, near))}" if near else "it contains no directory"
        raise ModelError(f"no directory in {str(root)!r} matches the pattern {pattern!r}; {shown}")
    if steps is None:
        return found
    present = sorted({c.step for c in found if c.step is not None})
    absent = [step for step in steps if step not in present]
    if absent:
        wanted = ", ".join(map(str, absent))
        shown = _listed(present, absent[0])
        raise ModelError(f"no checkpoint of {str(root)!r} for step {wanted}; present: {shown}")
    return [c for c in found if c.step in steps]


def _listed(present: Sequence[int], wanted: int, limit: int = 12) -> str:
    if len(present) <= limit:
        return ", ".join(map(str, present))
    close = sorted(sorted(present, key=lambda step: abs(step - wanted))[:limit])
    return f"{', '.join(map(str, close))} (the nearest of {len(present)})"


def discover(root: Path) -> list[Checkpoint]:
    """Directories with weights: `root` itself; else the children of its hf/; else its sub-directories or their hf/*.

    The first of these that yields anything is the answer. Raises ModelError if none does.
    """
    if has_weights(root):
        return [Checkpoint(path=root, label="main", step=None)]
    found = _below(root / "hf")
    if not found:
        for child in (p for p in children(root) if p.is_dir() and p.name != "hf"):
            if has_weights(child):
                found.append(Checkpoint(path=child, label=child.name, step=None))
            else:
                found += [
                    Checkpoint(path=c.path, label=f"{child.name}/{c.label}", step=None) for c in _below(child / "hf")
                ]
    if not found:
        raise ModelError(f"no directory with weights ({', '.join(WEIGHT_SUFFIXES)}) in or below {str(root)!r}")
    return found


def _below(directory: Path) -> list[Checkpoint]:
    if not directory.is_dir():
        return []
    return [Checkpoint(path=p, label=p.name, step=None) for p in children(directory) if p.is_dir() and has_weights(p)]
