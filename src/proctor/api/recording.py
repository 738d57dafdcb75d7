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
from proctor.errors import StoreError
from proctor.records import Answer, Recording, Response, Suite
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
    context.directory.write(context.directory.suites, json.dumps(list(suites), indent=1))
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
    """The suites of this run, without their requests. Raises StoreError if nothing was recorded."""
    path = context.directory.suites
    try:
        ids: Sequence[str] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"nothing has been recorded yet for the run {context.spec.name!r}",
            hint=f"proctor run {shlex.quote(str(context.config))}",
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {str(path)!r}: {error}", hint="`proctor run` records again") from error
    return tuple(store.read_suite(i) for i in ids)
