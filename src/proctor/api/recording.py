"""Tasks to requests: entries are recorded unless all that they are made from is as it was; the store keeps both."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from proctor.api.context import RunContext
from proctor.catalog.inputs import FORMAT, Inputs, differences, hub_caches, hub_files, renewed
from proctor.catalog.lm_eval.source import ENVIRONMENT, HOST, LmEvalSource
from proctor.catalog.native import NativeSource
from proctor.catalog.source import Made
from proctor.config.spec import LmEvalTask, TaskSpec
from proctor.errors import ProctorError, StoreError, UsageError
from proctor.processes.exchange import RunModule, run_module
from proctor.processes.resident import Residents
from proctor.records import Answer, Recording, Response, Suite, digest
from proctor.score.lm_eval import LmEvalReplay
from proctor.score.native import NativeReplay
from proctor.store import Store
from proctor.store.durable import check_name, make_directory, publish_bytes

_INPUTS: Final = "inputs"
"""Directory of the store: what recordings were made from, by the key of the entry."""


class StoredRecordings(Mapping[str, Recording]):
    """Recordings of a store by fingerprint, each read when it is first asked for: planning needs none of them."""

    def __init__(self, store: Store, fingerprints: Sequence[str], known: Mapping[str, Recording] | None = None) -> None:
        self._store = store
        self._fingerprints = dict.fromkeys(fingerprints)
        self._read = dict(known or {})

    def __getitem__(self, fingerprint: str) -> Recording:
        """Raises KeyError, or StoreError if it cannot be read."""
        if fingerprint not in self._fingerprints:
            raise KeyError(fingerprint)
        if fingerprint not in self._read:
            self._read[fingerprint] = self._store.read_recording(fingerprint)
        return self._read[fingerprint]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fingerprints)

    def __len__(self) -> int:
        return len(self._fingerprints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The suites of a run in configuration order, and their recordings by fingerprint."""

    suites: tuple[Suite, ...]
    recordings: Mapping[str, Recording]
    inputs: tuple[str | None, ...] = ()
    """For each entry the key of its inputs; None where they are not all known."""
    known: frozenset[str] = frozenset()
    """Suites of which everything that they are made from is known, and was just found as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One entry as the store remembers it."""

    key: str
    suites: tuple[Suite, ...]
    recordings: tuple[str, ...]


def harness() -> Residents:
    """Processes for lm-eval's interpreters, to be left when the work is done."""
    return Residents(HOST, ENVIRONMENT)


def kept(context: RunContext, store: Store) -> list[Kept | None]:
    """For each entry of `tasks:` what is recorded of it; None where anything it was made from is not as it was.

    Raises MissingTool where lm-eval is not.
    """
    return [_kept(store, key_of(entry)) for entry in context.spec.tasks]


def record(
    context: RunContext, store: Store, *, known: Sequence[Kept | None] = (), run: RunModule = run_module
) -> Recorded:
    """Record every task entry that is not `known`, several at once, and keep the outcome.

    Raises UnknownName, TaskError, HarnessError, StoreError; of several errors that of the first entry, without waiting
    for what others are about.
    """
    return record_all(context, store, known=known, run=run, errors=None)


def record_all(
    context: RunContext,
    store: Store,
    *,
    known: Sequence[Kept | None] = (),
    run: RunModule = run_module,
    errors: list[ProctorError] | None,
) -> Recorded:
    """`record` that goes on with the other entries where one fails, and adds to `errors` what it would have raised.

    What it returns is then only a part, and is not the run's.
    """
    entries = context.spec.tasks
    found = list(known) or [None] * len(entries)
    pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))), thread_name_prefix="record")
    try:
        work = [
            None if old is not None else pool.submit(_make, entry, run)
            for entry, old in zip(entries, found, strict=True)
        ]
        made: dict[str, Recording] = {}
        for n, future in enumerate(work):
            if future is None:
                continue
            try:
                key, one = future.result()
            except ProctorError as error:
                if errors is None:
                    raise
                errors.append(error)
                continue
            found[n] = _keep(store, key, one)
            # What marking needs is found out by `prepare`, and kept beside the recording.
            made.update(
                (r.fingerprint, replace(r, labels=store.recording_labels(r.fingerprint))) for r in one.recordings
            )
    finally:
        # After an error nobody waits for the others: they end with the processes that they talk to.
        pool.shutdown(wait=False, cancel_futures=True)
    whole = [one for one in found if one is not None]
    suites = {suite.id: suite for one in whole for suite in one.suites}
    fingerprints = [fp for suite in suites.values() for fp in suite.recordings]
    inputs = tuple(one.key or None for one in whole)
    if not errors:
        context.directory.create()
        state = {"tasks": _tasks_digest(context), "suites": list(suites), "inputs": list(inputs)}
        context.directory.write(context.directory.suites, json.dumps(state, indent=1))
    return Recorded(
        suites=tuple(suites.values()),
        recordings=StoredRecordings(store, fingerprints, made),
        inputs=inputs,
        known=frozenset(s.id for one in whole if one.key for s in one.suites),
    )


def key_of(entry: TaskSpec) -> str | None:
    """What the inputs of an entry are kept under; None if that cannot be told before it is recorded."""
    return LmEvalSource().input_key(entry) if isinstance(entry, LmEvalTask) else NativeSource().input_key(entry)


def _make(entry: TaskSpec, run: RunModule) -> tuple[str | None, Made]:
    key = key_of(entry)  # before the files are read, like everything that it stands for
    made = LmEvalSource(run=run).make(entry) if isinstance(entry, LmEvalTask) else NativeSource().make(entry)
    return key, made


def _keep(store: Store, key: str | None, made: Made) -> Kept:
    for recording in made.recordings:
        if not store.has_recording(recording.fingerprint):
            store.write_recording(recording)
    for suite in made.suites:
        store.write_suite(suite)
    one = Kept(key=key or "", suites=made.suites, recordings=tuple(r.fingerprint for r in made.recordings))
    if key is None or made.inputs is None:
        return Kept(key="", suites=one.suites, recordings=one.recordings)
    _write_inputs(store, one, made.inputs)
    return one


def _write_inputs(store: Store, one: Kept, inputs: Inputs) -> None:
    path = store.path / _INPUTS / f"{check_name('key of inputs', one.key)}.json"
    value = {
        "format": FORMAT,
        "suites": [s.id for s in one.suites],
        "recordings": list(one.recordings),
        "inputs": inputs.to_json(),
    }
    # Without it everything is recorded again next time, and is right.
    with contextlib.suppress(OSError):
        make_directory(path.parent)
        publish_bytes(path, json.dumps(value, indent=1).encode())


def _read_inputs(store: Store, key: str) -> tuple[list[str], list[str], Inputs] | None:
    """(suites, recordings, inputs) kept under `key`; None if there are none that can be understood."""
    try:
        value = json.loads((store.path / _INPUTS / f"{key}.json").read_bytes())
        if value["format"] != FORMAT:
            return None
        return list(value["suites"]), list(value["recordings"]), Inputs.from_json(value["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept(store: Store, key: str | None) -> Kept | None:
    found = None if key is None else _read_inputs(store, key)
    if key is None or found is None:
        return None
    ids, fingerprints, inputs = found
    if differences(inputs, hub_caches(os.environ)) is not None:
        return None
    try:
        suites = tuple(store.read_suite(i) for i in ids)
    except StoreError:
        return None
    if not suites or not all(store.has_recording(fp) for fp in fingerprints):
        return None
    one = Kept(key=key, suites=suites, recordings=tuple(fingerprints))
    with contextlib.suppress(OSError):
        fresh = renewed(inputs)
        if fresh != inputs:
            _write_inputs(store, one, fresh)
    return one


def prove(
    found: Recorded, store: Store, *, errors: list[ProctorError], run: RunModule = run_module
) -> dict[str, tuple[str, ...]]:
    """Mark every suite once on fake answers, with sockets blocked; what each recording's marking needs, which is kept.

    Adds to `errors` what is wrong with tasks that cannot be marked from answers alone. Raises StoreError.
    """
    theirs = [s for s in found.suites if s.source == "lm_eval"]
    proven: Sequence[Recording] = ()
    for suite in found.suites:
        if suite.source != "lm_eval":
            recordings = [found.recordings[fp] for fp in suite.recordings]
            try:
                NativeReplay().mark(suite, recordings, _fake_answers(recordings))
            except ProctorError as error:
                errors.append(error)
    try:
        proven = LmEvalReplay(run=run).prove(theirs, list(found.recordings.values())) if theirs else []
    except ProctorError as error:
        errors.append(error)
    for recording in proven:
        store.label_recording(recording.fingerprint, recording.labels)
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
    return Recorded(suites=suites, recordings=StoredRecordings(store, [fp for s in suites for fp in s.recordings]))


def recorded_suites(context: RunContext, store: Store) -> tuple[Suite, ...]:
    """The suites of this run, without their requests.

    Raises UsageError if nothing was recorded yet, or if `tasks:` or a file that a task is made from has changed
    since; StoreError if what was recorded cannot be read. What cannot be seen from here counts as unchanged.
    """
    path = context.directory.suites
    command = f"proctor prepare {shlex.quote(str(context.config))}"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        tasks, ids = state["tasks"], [str(i) for i in state["suites"]]
        keys = [str(key) for key in state.get("inputs", []) if key]
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
    for key in keys:
        if (what := _changed(store, key, ids)) is not None:
            raise UsageError(
                f"{what} changed since the tasks of {str(context.config)!r} were recorded",
                hint=f"{command} records them; `proctor run` does and goes on",
            )
    return tuple(store.read_suite(i) for i in ids)


def _changed(store: Store, key: str, suites: Sequence[str]) -> str | None:
    """What certainly is not as it was when these suites were recorded."""
    found = _read_inputs(store, key)
    if found is None:
        return None
    if not set(found[0]) <= set(suites):
        return "what the tasks are made from"  # another run has recorded it since
    difference = differences(found[2], hub_caches(os.environ))
    return None if difference is None or difference.gone else difference.what


def read_before(context: RunContext, store: Store) -> list[Path]:
    """The data that the tasks of this run were made from when they were recorded, as far as it is known and here.

    Of data sets of the hub, the files of the commit that was read. Raises nothing: what is not known is not listed.
    """
    try:
        keys = json.loads(context.directory.suites.read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found: dict[Path, None] = {}
    for key in filter(None, keys):
        read = _read_inputs(store, str(key))
        if read is not None:
            # Programs are part of an environment, which is not what is listed here.
            found |= dict.fromkeys(Path(file.path) for file in read[2].files if not file.path.endswith(".py"))
            for hub in read[2].hubs:
                found |= dict.fromkeys(hub_files(hub, hub_caches(os.environ)))
    return [path for path in found if path.is_file()]


def recorded_before(context: RunContext, store: Store, known: Sequence[Kept | None]) -> tuple[Suite, ...] | None:
    """The suites of these `tasks:` as last recorded, where all that is not `known` never is; None otherwise."""
    try:
        state = json.loads(context.directory.suites.read_text(encoding="utf-8"))
        never = [key is None for key in state["inputs"]]
        if state["tasks"] != _tasks_digest(context) or not known:
            return None
        if any(one is None and not unknown for one, unknown in zip(known, never, strict=True)):
            return None
        return tuple(store.read_suite(str(i)) for i in state["suites"])
    except (OSError, ValueError, KeyError, TypeError, StoreError):
        return None


def planned_suites(context: RunContext, store: Store) -> tuple[Suite, ...]:
    """The suites as last recorded for these `tasks:`; recorded now if they were not, or have changed."""
    try:
        return recorded_suites(context, store)
    except (UsageError, StoreError):
        with harness() as residents:
            return record(context, store, known=kept(context, store), run=residents.run).suites


def _tasks_digest(context: RunContext) -> str:
    return digest([entry.model_dump(mode="json") for entry in context.spec.tasks])
