"""`python -m proctor.worker RUN_DIRECTORY JOB INDEX`: one worker process.

SIGINT or SIGTERM once: finish what is in flight, keep it, exit 3 if work is owed. Twice: stop at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from proctor.errors import Incomplete, ProctorError
from proctor.store import Owner, Store
from proctor.worker.build import engine_for, server_for
from proctor.worker.events import EventLog
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory
from proctor.worker.session import Outcome, Session


async def work(directory: RunDirectory, job: Job, *, index: int, retry_failed: bool) -> Outcome:
    """Do one worker's share. Raises ProctorError; whatever was acknowledged is kept."""
    worker = f"{job.job_id}-{index}"
    store = Store.open(Path(job.store), create=False)
    owner = Owner.here(run=job.run)
    with EventLog(directory.events / f"{worker}.jsonl", worker=worker, model=job.model) as events:
        task = asyncio.current_task()
        assert task is not None
        signals = _Signals(task)
        try:
            async with contextlib.AsyncExitStack() as stack:
                server = server_for(job, worker=worker)
                if server is not None:
                    await stack.enter_async_context(server)
                engine = await stack.enter_async_context(engine_for(job, server, worker=worker))
                writer = await stack.enter_async_context(store.writer(job.weights, job.resolution, owner=owner))
                session = Session(
                    store=store,
                    answers=await asyncio.to_thread(store.answers, job.weights, job.resolution),
                    ledger=store.ledger(job.weights, owner=owner, segment=writer.name),
                    writer=writer,
                    engine=engine,
                    server=server,
                    events=events,
                )
                signals.attach(session)
                shards = await asyncio.to_thread(directory.read_shards, job.model)
                outcome = await session.work(shards, retry_failed=retry_failed)
            events.phase("done")
            return outcome
        except ProctorError as error:
            events.failed(error)
            raise


class _Signals:
    """First signal drains, second cancels; before the session exists the first one cancels too."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self._session: Session | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._received)

    def attach(self, session: Session) -> None:
        self._session = session

    def _received(self) -> None:
        if self._session is None or self._session.outcome.drained:
            self._task.cancel()
        else:
            self._session.drain()


def main(arguments: list[str]) -> int:
    """Run one worker; the exit code is the error's."""
    run, job_file, index, *flags = arguments
    try:
        outcome = asyncio.run(
            work(
                RunDirectory(Path(run)),
                Job.read(Path(job_file)),
                index=int(index),
                retry_failed="--retry-failed" in flags,
            )
        )
    except ProctorError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return Incomplete.exit_code
    return Incomplete.exit_code if outcome.drained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
