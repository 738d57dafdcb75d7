"""Names of tasks. Apart from the rest, so that a search imports little."""

from __future__ import annotations

from collections.abc import Sequence

from proctor.catalog.lm_eval.source import LmEvalSource
from proctor.catalog.native import NativeSource
from proctor.catalog.source import TaskInfo
from proctor.errors import MissingTool


def has_lm_eval(python: str | None = None) -> bool:
    """Whether tasks of lm-evaluation-harness can be listed and recorded with this interpreter."""
    try:
        LmEvalSource(python).search("no such task")
    except MissingTool:
        return False
    return True


def search_tasks(
    pattern: str = "", *, source: str | None = None, include: Sequence[str] = (), python: str | None = None
) -> list[TaskInfo]:
    """Names that contain `pattern` or match it as a glob. Raises MissingTool if lm-eval was asked for and is absent."""
    found: list[TaskInfo] = []
    if source in (None, "native"):
        found += [t for t in NativeSource().list() if pattern.strip("*") in t.name]
    if source in (None, "lm_eval"):
        try:
            found += LmEvalSource(python).search(pattern or "*", include=include)
        except MissingTool:
            if source is not None or python is not None:
                raise
    return found
