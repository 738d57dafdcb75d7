"""Marks while others are asked: suites whose answers are all there are marked in the background, and remembered.

What the harness said is remembered by a digest of everything that it was given, answers included. So it does not matter
when it was asked: at the end a suite is marked with its final answers, and what was said of exactly these is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from proctor.api.context import RunContext
from proctor.api.recording import Recorded
from proctor.api.targets import Target
from proctor.config.names import slug
from proctor.errors import ProctorError
from proctor.processes.resident import Residents
from proctor.records import Suite
from proctor.score.lm_eval import LmEvalReplay, Said
from proctor.score.replay import Marks
from proctor.store import Answers, Store
from proctor.store.durable import publish_bytes
from proctor.store.keys import KeyArray, key_array

LOOK_S: Final = 2.0
"""Between two looks at what is answered, at least."""
LOOK_SHARE: Final = 20
"""A look that took a second is followed by so many without one: looking must not slow the asking."""
_FORMAT: Final = 1

Ready = Callable[[Target, Suite, Marks], None]
"""Told of each suite that was marked ahead, on the event loop."""


class Memory:
    """What the harness said of one run's suites, by model and token; kept in the run's directory.

    One file for each model, which holds what was said last of each suite. It can be deleted at any time.
    """

    def __init__(self, context: RunContext, recorded: Recorded) -> None:
        """Only suites whose inputs are all known are remembered from one run to the next."""
        self._directory = context.directory.root / "marks"
        self._known = recorded.known
        self._said: dict[str, dict[str, Said]] = {}
        self._stored: dict[str, frozenset[str]] = {}

    def of(self, target: Target) -> dict[str, Said]:
        """What was said of this model's suites, by token; add to it."""
        if target.id not in self._said:
            found = self._read(self._file(target))
            self._said[target.id] = found
            self._stored[target.id] = frozenset(found)
        return self._said[target.id]

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
    """A suite of a model that is not marked yet."""

    target: Target
    suite: Suite
    keys: KeyArray


@dataclass(slots=True, eq=False)
class Ahead:
    """Marks lm-eval's suites of a run as they become complete, one at a time, giving way to everything else."""

    store: Store
    residents: Residents
    memory: Memory
    ready: Ready
    _answers: dict[str, Answers] = field(default_factory=dict[str, Answers])

    @contextlib.asynccontextmanager
    async def working(self, targets: Sequence[Target], recorded: Recorded) -> AsyncGenerator[None]:
        """Mark as long as the block lasts; at its end what is being marked is finished, and no more begun."""
        stop = asyncio.Event()
        task = asyncio.create_task(self._work(targets, recorded, stop))
        try:
            yield
        except BaseException:
            task.cancel()
            raise
        finally:
            stop.set()
            # What fails here fails again, and is said, when everything is marked.
            await asyncio.gather(task, return_exceptions=True)

    async def _work(self, targets: Sequence[Target], recorded: Recorded, stop: asyncio.Event) -> None:
        theirs = [s for s in recorded.suites if s.source == "lm_eval"]
        for python in dict.fromkeys(json.loads(s.settings)["python"] for s in theirs):
            await asyncio.to_thread(self.residents.start, python)
        waiting = await asyncio.to_thread(self._all, targets, recorded, theirs)
        while waiting and not stop.is_set():
            began = time.monotonic()
            complete = await asyncio.to_thread(self._complete, waiting)
            took = time.monotonic() - began
            for one in complete:
                if stop.is_set():
                    return
                waiting.remove(one)
                marks = await asyncio.to_thread(self._mark, one, recorded)
                if marks is not None:
                    self.ready(one.target, one.suite, marks)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(LOOK_S, LOOK_SHARE * took))

    def _all(self, targets: Sequence[Target], recorded: Recorded, suites: Sequence[Suite]) -> list[_Waiting]:
        keys = {fp: self.store.recording_keys(fp) for s in suites for fp in s.recordings}
        arrays = {s.id: key_array([k for fp in s.recordings for k in keys[fp]]) for s in suites}
        return [_Waiting(target=t, suite=s, keys=arrays[s.id]) for t in targets for s in suites]

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

    def _mark(self, one: _Waiting, recorded: Recorded) -> Marks | None:
        recordings = [recorded.recordings[fp] for fp in one.suite.recordings]
        answers = self._answers[one.target.id].read([i.key for r in recordings for i in r.instances])
        known = self.memory.of(one.target)
        replay = LmEvalReplay(run=self.residents.politely)
        (marks,) = replay.mark_all([one.suite], recordings, answers, known=known)
        return None if isinstance(marks, ProctorError) else marks
