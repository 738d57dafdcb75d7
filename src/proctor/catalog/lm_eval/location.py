"""Where lm-eval is installed, and in which version, without starting its interpreter if that can be seen."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.errors import MissingTool

PROVEN: Final = "0.4.13"
"""The version whose inside we know; any other may score differently without saying so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """An installed lm-eval."""

    version: str
    metadata: Path
    """Its dist-info directory."""

    @property
    def stamp(self) -> tuple[str, str, int]:
        """Changes when another lm-eval is installed there."""
        return self.version, str(self.metadata), self.metadata.stat().st_mtime_ns


def locate(python: str | None) -> Location | None:
    """The lm-eval of `python` (None: ours); None if its files do not show, for example outside a virtual environment.

    Raises MissingTool if there is none, or one of another version.
    """
    if python is None or os.path.abspath(os.path.expanduser(python)) == os.path.abspath(sys.executable):
        found = _ours()
    else:
        found = _in_environment(python)
    if found is not None:
        check_version(found.version, python)
    return found


def recall(file: Path) -> Location | None:
    """What a child said of an interpreter before, if that lm-eval is still there."""
    if not file.exists():
        return None
    version, metadata = json.loads(file.read_text(encoding="utf-8"))
    return Location(version=version, metadata=Path(metadata)) if Path(metadata).exists() else None


def check_version(version: str, python: str | None) -> None:
    """Raises MissingTool unless `version` is the proven one."""
    if version != PROVEN:
        where = f"the environment of {python}" if python else "this environment"
        raise MissingTool(
            f"{where} has lm-eval {version}; this Proctor knows lm-eval {PROVEN}",
            hint=install_hint(python),
        )


def install_hint(python: str | None) -> str:
    """What to type to get the proven version there."""
    return f"{python or sys.executable} -m pip install lm-eval=={PROVEN}"


def _ours() -> Location:
    try:
        distribution = importlib.metadata.distribution("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingTool(
            "lm-eval is not installed here",
            hint="pip install 'proctor-evals[lm-eval]', or give the task `python:` of an environment that has it",
        ) from error
    metadata = Path(str(distribution.locate_file(f"lm_eval-{distribution.version}.dist-info")))
    return Location(version=distribution.version, metadata=metadata if metadata.is_dir() else Path(__file__).parent)


def _in_environment(python: str) -> Location | None:
    program = shutil.which(os.path.expanduser(python))
    if program is None:
        return None
    root = Path(program).absolute().parent.parent
    if not (root / "pyvenv.cfg").exists():
        return None
    for metadata in sorted(root.glob("lib/python3*/site-packages/lm_eval-*.dist-info")):
        return Location(version=metadata.name.removeprefix("lm_eval-").removesuffix(".dist-info"), metadata=metadata)
    return None
