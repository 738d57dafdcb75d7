"""Marks while others are asked: what is answered as a whole is marked in the background, and remembered.

What was said is remembered by a digest of everything that it was said of, answers included. So it does not matter when:
at the end all is marked with its final answers, and what was said of exactly these is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from proctor.api.context import RunContext
from proctor.api.recording import Recorded
from proctor.api.targets import Target
from proctor.config.names import slug
from proctor.errors import ProctorError
from proctor.processes.resident import Residents
from proctor.records import Answer, Response, Suite
from proctor.score.lm_eval import LmEvalReplay, Said
from proctor.score.native import NativeReplay
from proctor.score.replay import Marks
from proctor.store import Answers, Store
from proctor.store.durable import publish_bytes
from proctor.store.keys import KeyArray, key_array

LOOK_S: Final = 2.0
"""Between two looks at what is answered, at least."""
LOOK_SHARE: Final = 20
"""A look that took a second is followed by so many without one: looking must not slow the asking."""
NICE: Final = 10
"""What marks here meanwhile gives way, as a harness's process does."""
_FORMAT: Final = 1

Ready = Callable[[Target, str, Marks], None]
"""Told of each suite of a harness and each native task that was marked ahead, by its name, on the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A native task that was marked when all of it was answered."""

    keys: KeyArray
    stamp: str
    """Of the answers: see `Answers.stamp`."""
    marks: Marks
    engines: frozenset[str]
    """Ids of what answered."""


class Memory:
    """What was said of one run's suites, by model.

    What the harness said is kept in the run's directory, by token: one file for each model, which holds what was said
    last of each suite. It can be deleted at any time. Marks of native tasks are for this command alone.
    """

    def __init__(self, context: RunContext, recorded: Recorded) -> None:
        """Only suites whose inputs are all known are remembered from one run to the next."""
        self._directory = context.directory.root / "marks"
        self._known = recorded.known
        self._said: dict[str, dict[str, Said]] = {}
        self._finished: dict[str, dict[str, Finished]] = {}
        self._stored: dict[str, frozenset[str]] = {}

    def of(self, target: Target) -> dict[str, Said]:
        """What was said of this model's suites, by token; add to it."""
        if target.id not in self._said:
            found = self._read(self._file(target))
            self._said[target.id] = found
            self._stored[target.id] = frozenset(found)
        return self._said[target.id]

    def finish(self, target: Target, fingerprint: str, finished: Finished) -> None:
        """Remember the marks of a native recording."""
        self._finished.setdefault(target.id, {})[fingerprint] = finished

    def finished(self, target: Target, answers: Answers) -> dict[str, Finished]:
        """The native recordings, by fingerprint, that were marked with the very answers that they have now."""
        known = self._finished.get(target.id, {})
        return {fingerprint: one for fingerprint, one in known.items() if answers.stamp(one.keys) == one.stamp}

    def keep(self, target: Target) -> None:
        """Let the next run find what was said. That it cannot be written costs time and nothing else."""
        latest = {one.suite: one for one in self.of(target).values() if one.suite in self._known}
        tokens = frozenset(one.token for one in latest.values())
        if tokens == self._stored[target.id]:
            return
        value = {"format": _FORMAT, "said": [asdict(one) for one in latest.values()]}
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            data = gzip.compress(json.dumps(value).encode(), 3)
            publish_bytes(self._file(target), data)
            self._stored[target.id] = tokens

    def _file(self, target: Target) -> Path:
        return self._directory / f"{slug(target.id)}.json.gz"

    def _read(self, file: Path) -> dict[str, Said]:
        try:
            value = json.loads(gzip.decompress(file.read_bytes()))
            found = [Said(**one) for one in value["said"]] if value["format"] == _FORMAT else []
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
            return {}
        return {one.token: one for one in found if one.suite in self._known}


@dataclass(slots=True, eq=False)
class _Waiting:
    """A harness's suite, or a native task, that is not marked yet for a model."""

    target: Target
    suite: Suite
    recordings: tuple[str, ...]
    """Those of the suite that are meant: of a native one each is marked for itself."""
    keys: KeyArray


@dataclass(slots=True, eq=False)
class Ahead:
    """Marks a run's suites and native tasks as they become complete, one at a time, giving way to everything else."""

    store: Store
    residents: Residents
    memory: Memory
    ready: Ready
    _answers: dict[str, Answers] = field(default_factory=dict[str, Answers])

    @contextlib.asynccontextmanager
    async def working(self, targets: Sequence[Target], recorded: Recorded) -> AsyncGenerator[None]:
        """Mark as long as the block lasts; at its end what is being marked is finished, and no more begun."""
        stop = asyncio.Event()
        thread = ThreadPoolExecutor(1, thread_name_prefix="proctor-marking", initializer=_give_way)
        task = asyncio.create_task(self._work(targets, recorded, stop, thread))
        try:
            yield
        except BaseException:
            task.cancel()
            raise
        finally:
            stop.set()
            # What fails here fails again, and is said, when everything is marked.
            await asyncio.gather(task, return_exceptions=True)
            thread.shutdown(wait=False)

    async def _work(
        self, targets: Sequence[Target], recorded: Recorded, stop: asyncio.Event, thread: ThreadPoolExecutor
    ) -> None:
        loop = asyncio.get_running_loop()
        theirs = [s for s in recorded.suites if s.source == "lm_eval"]
        for python in dict.fromkeys(json.loads(s.settings)["python"] for s in theirs):
            await asyncio.to_thread(self.residents.start, python)
        waiting = await loop.run_in_executor(thread, self._all, targets, recorded.suites)
        while waiting and not stop.is_set():
            began = time.monotonic()
            complete = await loop.run_in_executor(thread, self._complete, waiting)
            took = time.monotonic() - began
            for one in complete:
                if stop.is_set():
                    return
                waiting.remove(one)
                named = await loop.run_in_executor(thread, self._mark, one, recorded)
                if named is not None:
                    self.ready(one.target, *named)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(LOOK_S, LOOK_SHARE * took))

    def _all(self, targets: Sequence[Target], suites: Sequence[Suite]) -> list[_Waiting]:
        keys = {fp: self.store.recording_keys(fp) for s in suites for fp in s.recordings}
        parts = [
            (suite, part, key_array([key for fingerprint in part for key in keys[fingerprint]]))
            for suite in suites
            for part in ([suite.recordings] if suite.source == "lm_eval" else [(fp,) for fp in suite.recordings])
        ]
        return [_Waiting(target=t, suite=s, recordings=part, keys=k) for t in targets for s, part, k in parts]

    def _complete(self, waiting: Sequence[_Waiting]) -> list[_Waiting]:
        """Those of which everything is answered: answers never change, so their marks will not either."""
        for target in {one.target.id: one.target for one in waiting}.values():
            if target.id in self._answers:
                self._answers[target.id].refresh()
            else:
                self._answers[target.id] = self.store.answers(target.weights, target.resolution)
        return [one for one in waiting if not self._open(one)]

    def _open(self, one: _Waiting) -> bool:
        return bool((self._answers[one.target.id].split(one.keys).row < 0).any())

    def _mark(self, one: _Waiting, recorded: Recorded) -> tuple[str, Marks] | None:
        """The name and the marks; None if that was not possible now."""
        recordings = [recorded.recordings[fp] for fp in one.recordings]
        answers = self._answers[one.target.id]
        keys = [i.key for r in recordings for i in r.instances]
        if one.suite.source == "lm_eval":
            replay = LmEvalReplay(run=self.residents.politely)
            (marks,) = replay.mark_all([one.suite], recordings, answers.read(keys), known=self.memory.of(one.target))
            return None if isinstance(marks, ProctorError) else (" ".join(one.suite.names), marks)
        stamp = answers.stamp(one.keys)
        found = answers.read(keys)
        if stamp is None or stamp != answers.stamp(one.keys):
            return None  # an answer proved damaged while it was read
        (recording,) = recordings
        marks = NativeReplay().mark_one(recording, found)
        finished = Finished(keys=one.keys, stamp=stamp, marks=marks, engines=engine_ids(found.values()))
        self.memory.finish(one.target, recording.fingerprint, finished)
        return recording.task, marks


def engine_ids(answers: Iterable[Answer]) -> frozenset[str]:
    """The ids of what gave these answers."""
    return frozenset(a.engine_id for a in answers if isinstance(a, Response))


def _give_way() -> None:
    """Let this thread alone, on Linux, have what the others leave."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
