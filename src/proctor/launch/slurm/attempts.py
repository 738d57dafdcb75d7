"""Whether one attempt of one job still runs, by the scheduler's word. One cached poll answers for the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from proctor.errors import ProctorError
from proctor.launch.launcher import JobState
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import read_accounting, read_one, read_queue
from proctor.launch.slurm.records import QueueRecord

MAX_AGE_S: Final = 5.0
"""How old a poll may be. A dead attempt is noticed that much later; Slurm itself takes far longer."""
MIN_GAP_S: Final = 0.5
"""Between two polls that questions force, and after one that failed."""


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
        self._poll: _Poll | None = None
        self._others: dict[str, _Poll] = {}
        self._gone: set[str] = set()
        self._failed_at: float | None = None
        self.failure: ProctorError | None = None
        """Why the queue could not be read the last time."""

    def is_live(self, job: str, array_task: str, restart: int, *, mine: bool | None = None) -> bool | None:
        """True: it runs. False: it is over for good. None: the queue cannot be read, or hides it. Blocks.

        `job` is the array's id or the task's own; `array_task` is empty for a job that is no array. `mine`
        says whether it is this user's, where that is known: a job that is not among this user's is asked for by
        its id otherwise. Where others' jobs are hidden and sacct knows nothing either, nothing can be said; one's own
        are never hidden, and gone when the queue does not have them.
        """
        attempt = (job, array_task, restart)
        with self._lock:
            if job in self._gone:
                return False
            if self._failed_at is not None and self._clock() - self._failed_at < self._min_gap_s:
                return None
            try:
                answer = self._answer(attempt, mine)
            except ProctorError as error:
                # The protocol's way of saying so: None, and no conclusion.
                self._failed_at, self._poll, self.failure = self._clock(), None, error
                self._others.clear()
                return None
            self._failed_at = self.failure = None
            return answer

    def _answer(self, attempt: tuple[str, str, int], mine: bool | None) -> bool | None:
        asked = self._clock()
        poll = self._poll
        if poll is None or asked - poll.began > self._max_age_s:
            poll = self._read()
        if mine is not True and attempt[0] not in poll.jobs:
            return self._by_id(attempt, mine)
        answer = poll.answer(attempt, certain=poll.began >= asked)
        if answer is None and poll.began < asked:
            # It may have started after the poll.
            left = poll.ended + self._min_gap_s - self._clock()
            if left > 0:
                time.sleep(left)
            answer = self._read().answer(attempt, certain=True)
        return answer

    def _by_id(self, attempt: tuple[str, str, int], mine: bool | None) -> bool | None:
        """Of a job that is not among this user's: another's, or one that the controller has forgotten."""
        job = attempt[0]
        asked = self._clock()
        poll = self._others.get(job)
        if poll is not None and asked - poll.began <= self._max_age_s:
            answer = poll.answer(attempt, certain=False)
            if answer is not None:
                return answer
        records = read_one(self._commands, job)
        if records is not None:
            self._others[job] = poll = _Poll(records, began=asked, ended=self._clock())
            return poll.answer(attempt, certain=True)
        self._others.pop(job, None)
        if self._hides_jobs and not (mine is None and self._ended_by_accounting(attempt)):
            return None
        self._gone.add(job)
        return False

    def _ended_by_accounting(self, attempt: tuple[str, str, int]) -> bool:
        """Whether sacct, which shows every user his own, knows the job and nothing of it runs or waits."""
        records = read_accounting(self._commands, [attempt[0]])
        return bool(records) and all(record.stands.final for record in records or ())

    def _read(self) -> _Poll:
        began = self._clock()
        records = read_queue(self._commands)
        self._poll = _Poll(records, began=began, ended=self._clock())
        return self._poll


class _Poll:
    """One reading of the queue."""

    def __init__(self, records: Sequence[QueueRecord], *, began: float, ended: float) -> None:
        self.began = began
        self.ended = ended
        by_array = {(record.array, record.array_task): record for record in records}
        # A task of an array has an id of its own too; the array's own id goes to one of them.
        self._by_key: Mapping[tuple[str, str], QueueRecord] = {(r.job, r.array_task): r for r in records} | by_array
        self.jobs = {record.array for record in records} | {record.job for record in records}
        self._newest = max((int(record.job) for record in records if record.job.isdigit()), default=0)

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
        if record.restarts < restart or record.stands is JobState.PENDING:
            # The controller has forgotten that it began, as one that was killed does; or the poll is older than that.
            return None
        return True
