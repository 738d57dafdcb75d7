"""What jobs, workers and servers wrote, and which samples failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.api.context import RunContext
from proctor.api.recording import recorded_suites
from proctor.api.targets import resolve_targets
from proctor.errors import UnknownName
from proctor.processes.group import tail
from proctor.records import Failure

LINES: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    """One log of a run."""

    name: str
    """Its path below the run's `logs/`, without the suffix: what `proctor logs CONFIG NAME` takes a part of."""
    path: Path
    kind: str
    """job: a worker's own words, or a whole job's on a cluster; server: of one model server."""
    modified: float
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedSample:
    """One request that failed for good."""

    model: str
    task: str
    doc_id: int
    boundary: str
    message: str
    attempts: int
    prompt: str


def log_files(config: str | Path, overrides: Sequence[str] = (), *, name: str | None = None) -> list[LogFile]:
    """The run's logs, oldest first; with `name`, those whose name contains it.

    Raises ConfigError; UnknownName, with the names there are, if none fits.
    """
    root = RunContext.open(config, overrides).directory.logs
    found: list[LogFile] = []
    for path in root.rglob("*.log") if root.is_dir() else ():
        stat = path.stat()
        relative = path.relative_to(root)
        found.append(
            LogFile(
                name=str(relative.with_suffix("")),
                path=path,
                kind="job" if len(relative.parts) == 1 else "server",
                modified=stat.st_mtime,
                size=stat.st_size,
            )
        )
    found.sort(key=lambda f: f.modified)
    if name is None:
        return found
    fitting = [f for f in found if name in f.name]
    if not fitting:
        raise UnknownName.among("log", name, [f.name for f in reversed(found)], hint="`proctor logs CONFIG` lists them")
    return fitting


def last_lines(file: LogFile, lines: int = LINES) -> str:
    """The end of a log."""
    return tail(file.path, lines=lines)


def failed_samples(config: str | Path, overrides: Sequence[str] = ()) -> list[FailedSample]:
    """Every request that failed for good, with its prompt. Raises ConfigError, ModelError, StoreError."""
    context = RunContext.open(config, overrides)
    store = context.store(create=False)
    fingerprints = dict.fromkeys(fp for s in recorded_suites(context, store) for fp in s.recordings)
    found: list[FailedSample] = []
    for target in resolve_targets(context, None):
        answers = store.answers(target.weights, target.resolution)
        for fingerprint in fingerprints:
            keys = store.recording_keys(fingerprint)
            failures = answers.read(answers.failed(list(dict.fromkeys(keys))))
            if not failures:
                continue
            recording = store.read_recording(fingerprint)
            for instance in recording.instances:
                failure = failures.get(instance.key)
                if isinstance(failure, Failure):
                    request = instance.request
                    prompt = request.text or "\n".join(f"{m.role}: {m.content}" for m in request.messages)
                    found.append(
                        FailedSample(
                            model=target.id,
                            task=recording.task,
                            doc_id=instance.doc_id,
                            boundary=failure.boundary.value,
                            message=failure.message,
                            attempts=failure.attempts,
                            prompt=prompt + (request.continuation or ""),
                        )
                    )
    return found
