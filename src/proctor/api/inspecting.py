"""Looking without running: configurations and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proctor.api.context import RunContext
from proctor.api.targets import resolve_targets
from proctor.catalog.models import ModelEntry, expand_models, fetch_model
from proctor.config.engines import engine_for, launch_for
from proctor.config.schema import dump_resolved
from proctor.config.starter import starter_files
from proctor.errors import UsageError

__all__ = [
    "Checked",
    "fetch_model",
    "init",
    "models",
    "validate",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration that is fit to run."""

    run: str
    models: tuple[str, ...]
    tasks: int
    resolved: str


def init(directory: str | Path, answers: Mapping[str, str] | None = None, *, force: bool = False) -> list[Path]:
    """Write run.yaml, and a small task beside it where the answers use it; the paths, run.yaml first.

    Raises UsageError if one of them exists, unless `force`.
    """
    files = {Path(directory) / name: text for name, text in starter_files(answers).items()}
    there = [str(path) for path in files if path.exists()]
    if there and not force:
        raise UsageError(
            f"{', '.join(there)} already there", hint="choose another directory, or overwrite with --force"
        )
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {str(directory)!r}: {error.strerror}") from error
    return list(files)


def validate(config: str | Path, overrides: Sequence[str] = ()) -> Checked:
    """Check keys, values, models and their files. Raises ConfigError, ModelError."""
    context = RunContext.open(config, overrides)
    for name in context.spec.models:
        engine_for(context.spec, name)
        launch_for(context.spec, name)
    return Checked(
        run=context.spec.name,
        models=tuple(e.shown for e in expand_models(context.spec)),
        tasks=len(context.spec.tasks),
        resolved=dump_resolved(context.spec),
    )


def models(config: str | Path, overrides: Sequence[str] = ()) -> list[tuple[ModelEntry, str]]:
    """Every model and checkpoint with its weights fingerprint. Reads the weights. Raises ModelError."""
    context = RunContext.open(config, overrides)
    return [(t.entry, t.weights) for t in resolve_targets(context, None)]
