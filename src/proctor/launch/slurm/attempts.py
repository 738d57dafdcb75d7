"""Whether one attempt of one job still runs, by the scheduler's word. One cached poll answers for the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from proctor.errors import ProctorError
from proctor.launch.launcher import JobState
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import read_queue
from proctor.launch.slurm.records import QueueRecord

MAX_AGE_S: Final = 5.0
"""How old a poll may be. A dead attempt is noticed that much later; Slurm itself takes far longer."""
MIN_GAP_S: Final = 0.5
"""Between two polls that questions force, and after a poll that failed."""

_Key = tuple[str, str]


class Attempts:
    """Answers from a thread; what is told apart is (job, array task, restart count).

    An attempt is live while the scheduler says that it runs, is suspended, or is completing. A requeued job has
    a higher restart count from the moment of its requeue: the attempt before is dead, also where its processes
    go on on a node that the controller has given up. While Slurm still ends its processes (COMPLETING) it counts
    as live, although the count is up already.
    """

    def __init__(
        self,
        commands: Commands,
        *,
        hides_jobs: bool = False,
        max_age_s: float = MAX_AGE_S,
        min_gap_s: float = MIN_GAP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._commands = commands
        self._hides_jobs = hides_jobs
        self._max_age_s = max_age_s
        self._min_gap_s = min_gap_s
        self._clock = clock
        self._lock = threading.Lock()
        self._everyone = False
        self._poll: _Poll | None = None
        self._failed_at: float | None = None
        self.failure: ProctorError | None = None
        """Why the queue could not be read the last time."""

    def is_live(self, job: str, array_task: str, restart: int, *, mine: bool = True) -> bool | None:
        """True: it runs. False: it is over for good. None: the queue cannot be read, or hides it. Blocks.

        `job` is the array's id or the task's own; `array_task` is empty for a job that is no array. `mine`: it
        is this user's; where others' jobs are hidden, nothing can be said of one that is not.
        """
        attempt = (job, array_task, restart)
        with self._lock:
            asked = self._clock()
            if not mine and not self._everyone:
                self._everyone, self._poll = True, None
            poll = self._recent(asked)
            if poll is None:
                return None
            answer = poll.answer(attempt, certain=poll.began >= asked)
            if answer is None and poll.began < asked:
                # It may have started after the poll.
                poll = self._forced(poll)
                if poll is None:
                    return None
                answer = poll.answer(attempt, certain=True)
            if answer is False and poll.absent(attempt) and not mine and self._hides_jobs:
                return None
            return answer

    def _recent(self, now: float) -> _Poll | None:
        if self._poll is not None and now - self._poll.began <= self._max_age_s:
            return self._poll
        if self._failed_at is not None and now - self._failed_at < self._min_gap_s:
            return None
        return self._read()

    def _forced(self, last: _Poll) -> _Poll | None:
        left = last.ended + self._min_gap_s - self._clock()
        if left > 0:
            time.sleep(left)
        return self._read()

    def _read(self) -> _Poll | None:
        began = self._clock()
        try:
            records = read_queue(self._commands, everyone=self._everyone)
        except ProctorError as error:
            # The protocol's way of saying so: None, and no conclusion.
            self._failed_at, self._poll, self.failure = self._clock(), None, error
            return None
        self._failed_at = self.failure = None
        self._poll = _Poll(records, began=began, ended=self._clock())
        return self._poll


class _Poll:
    """One reading of the queue."""

    def __init__(self, records: Sequence[QueueRecord], *, began: float, ended: float) -> None:
        self.began = began
        self.ended = ended
        by_key: dict[_Key, QueueRecord] = {(record.array, record.array_task): record for record in records}
        # A task of an array has an id of its own too; the array's own id goes to one of them.
        self._by_key: Mapping[_Key, QueueRecord] = {(r.job, r.array_task): r for r in records} | by_key
        self._newest = max((int(record.job) for record in records if record.job.isdigit()), default=0)

    def absent(self, attempt: tuple[str, str, int]) -> bool:
        return attempt[:2] not in self._by_key

    def answer(self, attempt: tuple[str, str, int], *, certain: bool) -> bool | None:
        """None: not to be told from this poll, if the attempt may have begun after it (`certain` False)."""
        job, task, restart = attempt
        record = self._by_key.get((job, task))
        if record is None:
            # Ids are given in order: one below the newest was there before this poll, and is gone.
            known = job.isdigit() and int(job) < self._newest
            return False if certain or known else None
        if record.restarts > restart:
            return record.completing and record.restarts == restart + 1
        if record.stands.final:
            return False
        if record.restarts < restart:
            # The controller has forgotten a requeue that did happen, or the poll is older than it.
            return None
        if record.stands is JobState.PENDING:
            return False if certain else None
        return True
