"""Tasks to requests: record every entry, keep recordings and suites in the store."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from proctor.api.context import RunContext
from proctor.catalog.lm_eval.source import LmEvalSource
from proctor.catalog.native import NativeSource
from proctor.config.spec import LmEvalTask, TaskSpec
from proctor.errors import StoreError, UsageError
from proctor.records import Answer, Recording, Response, Suite, digest
from proctor.score.lm_eval import LmEvalReplay
from proctor.score.native import NativeReplay
from proctor.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The suites of a run in configuration order, and their recordings by fingerprint."""

    suites: tuple[Suite, ...]
    recordings: dict[str, Recording]


def record(context: RunContext, store: Store) -> Recorded:
    """Record every task entry and keep the outcome. Raises UnknownName, TaskError, HarnessError, StoreError."""
    suites: dict[str, Suite] = {}
    recordings: dict[str, Recording] = {}
    for entry in context.spec.tasks:
        found, recorded = record_entry(entry)
        for recording in recorded:
            recordings[recording.fingerprint] = recording
            if not store.has_recording(recording.fingerprint):
                store.write_recording(recording)
        for suite in found:
            suites[suite.id] = suite
            store.write_suite(suite)
    context.directory.create()
    kept = {"tasks": _tasks_digest(context), "suites": list(suites)}
    context.directory.write(context.directory.suites, json.dumps(kept, indent=1))
    return Recorded(suites=tuple(suites.values()), recordings=recordings)


def record_entry(entry: TaskSpec) -> tuple[list[Suite], list[Recording]]:
    """Record one entry with the source it names."""
    if isinstance(entry, LmEvalTask):
        return LmEvalSource().record(entry)
    return NativeSource().record(entry)


def prove(found: Recorded) -> dict[str, tuple[str, ...]]:
    """Mark every suite once on fake answers, with sockets blocked; what each recording's marking needs.

    Raises TaskError for a task that cannot be marked from answers alone.
    """
    theirs = [s for s in found.suites if s.source == "lm_eval"]
    for suite in found.suites:
        if suite.source != "lm_eval":
            recordings = [found.recordings[fp] for fp in suite.recordings]
            NativeReplay().mark(suite, recordings, _fake_answers(recordings))
    proven = LmEvalReplay().prove(theirs, list(found.recordings.values())) if theirs else []
    return {r.fingerprint: r.labels for r in proven}


def _fake_answers(recordings: Sequence[Recording]) -> dict[str, Answer]:
    return {
        i.key: Response(key=i.key, physical_key=i.key, text="A", finish_reason="stop", logprob=-1.0, is_greedy=False)
        for r in recordings
        for i in r.instances
    }


def recorded(context: RunContext, store: Store) -> Recorded:
    """What was recorded for this run before. Raises StoreError if nothing was."""
    suites = recorded_suites(context, store)
    fingerprints = dict.fromkeys(fp for s in suites for fp in s.recordings)
    return Recorded(suites=suites, recordings={fp: store.read_recording(fp) for fp in fingerprints})


def recorded_suites(context: RunContext, store: Store) -> tuple[Suite, ...]:
    """The suites of this run, without their requests.

    Raises UsageError if nothing was recorded yet, or if `tasks:` has changed since; StoreError if what was
    recorded cannot be read.
    """
    path = context.directory.suites
    command = f"proctor prepare {shlex.quote(str(context.config))}"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        tasks, ids = kept["tasks"], [str(i) for i in kept["suites"]]
    except FileNotFoundError:
        raise UsageError(
            f"nothing has been recorded yet for the run {context.spec.name!r}", hint=f"{command}, or `proctor run`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"cannot read {str(path)!r}: {error}", hint=f"{command} records again") from error
    if tasks != _tasks_digest(context):
        raise UsageError(
            f"the tasks of {str(context.config)!r} have changed since they were recorded",
            hint=f"{command} records them; `proctor run` does and goes on",
        )
    return tuple(store.read_suite(i) for i in ids)


def planned_suites(context: RunContext, store: Store) -> tuple[Suite, ...]:
    """The suites as last recorded for these `tasks:`; recorded now if they were not, or have changed."""
    try:
        return recorded_suites(context, store)
    except (UsageError, StoreError):
        return record(context, store).suites


def _tasks_digest(context: RunContext) -> str:
    return digest([entry.model_dump(mode="json") for entry in context.spec.tasks])
