"""One worker from start to end: its models one after another, signals, the clock, what comes after."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from proctor.config.engines import client_processes
from proctor.config.spec import OpenAIEngine
from proctor.errors import LaunchError, ProbeError, ProctorError, ServerError, StoreError, Unreachable, UsageError
from proctor.records import Shard
from proctor.store import Answers, Store
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import (
    Attempt,
    AttemptRecord,
    Continuation,
    Ending,
    Scheduler,
    carry_on,
    drain_at,
    earlier_attempts,
    read_attempts,
    stop_at,
)
from proctor.worker.build import ComingServer, engine_for, watched
from proctor.worker.bundle import Bundle
from proctor.worker.clients import ClientProcesses, Orders
from proctor.worker.events import Event, EventLog
from proctor.worker.handover import Handover
from proctor.worker.job import Job
from proctor.worker.preread import Preread, preread, weight_files
from proctor.worker.run_directory import NOTHING_OWED, RunDirectory
from proctor.worker.serving import serving
from proctor.worker.session import Outcome, Session
from proctor.worker.share import Share

PLAN_POLL_S: Final = 0.1
"""Between two looks for a plan that is being made on this machine."""
CLOCK_S: Final = 1.0
"""Between two looks at the clock."""
EARLY_S: Final = 90.0
"""Slurm sends the signal before the end up to a minute too early: a warning, at which the end is asked for again."""


@dataclass(slots=True)
class Totals:
    """Over all models of one worker."""

    answered: int = 0
    failed: int = 0
    models: list[str] = field(default_factory=list[str])

    def add(self, job: Job, outcome: Outcome, beside: Sequence[Event]) -> None:
        """Count one model's session, and what processes beside it said last."""
        self.answered += outcome.answered + outcome.aliased + sum(one.requests + one.aliases for one in beside)
        self.failed += outcome.failed + sum(one.failed for one in beside)
        self.models.append(job.model)


class Shift:
    """Runs one worker. Whatever was acknowledged is kept, however it ends."""

    def __init__(
        self,
        directory: RunDirectory,
        assignment: Assignment,
        attempt: Attempt,
        *,
        retry_failed: bool = False,
        retry_reasons: frozenset[str] = frozenset(),
        at_most: int | None = None,
        plan_token: str | None = None,
    ) -> None:
        """`at_most`: of each model only so many requests, to see whether it works. `plan_token`: see `__main__`."""
        self._directory = directory
        self._assignment = assignment
        self._attempt = attempt
        self._share = Share(
            retry_failed=retry_failed,
            retry_reasons=retry_reasons,
            at_most=at_most,
            linger_s=assignment.linger_s,
        )
        self._plan_token = plan_token
        self._nothing_owed = False  # by a plan that was made meanwhile
        self._session: Session | None = None
        self._clients: ClientProcesses | None = None
        self._at_hand = ""
        """The job file of the model at hand."""
        self._next: str | None = None
        """The job file of the model after the one at hand."""
        self._handover = Handover(directory)
        self._preread: Preread | None = None
        self._reason: signal.Signals | None = None
        self._time_is_up = False
        self._left = True  # by the model at hand
        self._task: asyncio.Task[object] | None = None
        self._warned = asyncio.Event()
        self._clock_runs = False
        self.totals = Totals()

    @property
    def stopping(self) -> bool:
        """Whether the worker was asked to end, or has to."""
        return self._time_is_up or self._reason is not None

    async def work(self) -> bool:
        """Work until nothing is left, the time is up or somebody wants the end; whether all that was there is done.

        Raises ProctorError for what ends the worker; the record of the attempt is written either way.
        """
        self._task = asyncio.current_task()
        with self._signals():
            try:
                async with self._clock():
                    left = await self._all_models()
            except ProctorError as error:
                self._record(Continuation(ending=ending_of(error), message=error.message, hint=error.hint))
                raise
            except asyncio.CancelledError:
                if not self.stopping:
                    raise
                left = True
            # A requeue ends this very process, perhaps before scontrol has said that it worked: from here on no
            # signal stops what is left to do, which is quick.
            self._task = None
            await self._end(left=left)
        return not left

    # --- models ---

    async def _all_models(self) -> bool:
        """Every model in this worker's order; whether something may be left because the worker was stopped."""
        async with self._handover:
            return await self._one_after_another()

    async def _one_after_another(self) -> bool:
        failures: list[ProctorError] = []
        names = self._assignment.order(self._attempt.index)
        for number, name in enumerate(names, start=1):
            job = Job.read(self._directory.jobs / name)
            self._at_hand = name
            self._next = self._handover.next = names[number] if number < len(names) else None
            try:
                await self._one_model(job)
            except (ServerError, UsageError) as error:
                # One model that cannot be served costs the others nothing.
                if len(self._assignment.jobs) == 1 or not self._assignment.swap:
                    raise
                failures.append(error)
            if self._nothing_owed:
                break
            if self.stopping:
                return self._left or number < len(names) or bool(failures)
        if failures:
            raise failures[0]
        return False

    async def _one_model(self, job: Job) -> None:
        self._left = True
        worker = f"{job.job_id}-{self._attempt.label}"
        store = Store.open(Path(job.store), create=False, alive=self._attempt.alive())
        if self._plan_token is None and not await self._worth_starting(store, job):
            self._left = False
            return
        bundle = await asyncio.to_thread(Bundle.read, self._directory.bundle)
        if bundle is not None and self._attempt.scheduler is not None:
            await asyncio.to_thread(bundle.check, job.model)
        with EventLog(self._directory.events / f"{worker}.jsonl", worker=worker, model=job.model) as events:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    await self._serve_and_ask(stack, job, store, worker=worker, events=events)
                events.phase("done")
            except ProctorError as error:
                events.failed(error)
                raise

    async def _serve_and_ask(
        self, stack: contextlib.AsyncExitStack, job: Job, store: Store, *, worker: str, events: EventLog
    ) -> None:
        """Start the server, get ready meanwhile, and ask."""
        terms = self._assignment.slurm if self._attempt.scheduler is not None else None
        coming = ComingServer()
        server = coming if isinstance(job.engine_spec, OpenAIEngine) else None
        engine = engine_for(job, server, worker=worker, workers=self._assignment.workers)
        owner = self._attempt.owner(job.run)
        writer = await stack.enter_async_context(store.writer(job.weights, job.resolution, owner=owner))

        async def get_ready() -> Session | None:
            if not await self._planned():
                return None
            return await self._share.session(
                self._directory, job, store, owner=owner, writer=writer, engine=engine, events=events
            )

        start = stack.enter_async_context(serving(job, terms, worker=worker, events=events, handover=self._handover))
        starting, readying = asyncio.create_task(start), asyncio.create_task(get_ready())
        try:
            await asyncio.wait({starting, readying}, return_when=asyncio.FIRST_COMPLETED)
            if readying.done() and readying.result() is None:
                self._left = False
                return
            coming.server = await starting
            clients = self._clients_for(job, worker=worker, events=events)
            watched(coming.server, engine, clients, events)
            await stack.enter_async_context(engine)
            events.phase("serving")
            session = await readying
        finally:
            for task in (starting, readying):
                task.cancel()
            await asyncio.gather(starting, readying, return_exceptions=True)
        if session is None:
            self._left = False
            return
        session.server = coming.server
        session.helped = lambda: clients.working
        async with clients:
            if coming.server is not None and not self.stopping:
                await clients.start(self._more_clients(job), coming.server)
            await self._ask(job, session, clients)

    def _clients_for(self, job: Job, *, worker: str, events: EventLog) -> ClientProcesses:
        orders = Orders(
            job=self._at_hand,
            index=self._attempt.index,
            slurm=self._attempt.scheduler is not None,
            retry_failed=self._share.retry_failed,
            retry_reasons=tuple(self._share.retry_reasons),
        )
        spec = job.engine_spec
        return ClientProcesses(
            self._directory,
            orders,
            max_in_flight=spec.max_in_flight if isinstance(spec, OpenAIEngine) else 0,
            worker=worker,
            events=events,
        )

    def _more_clients(self, job: Job) -> int:
        """How many processes are started besides this one: none for a trial of a few requests."""
        return 0 if self._share.at_most is not None else client_processes(job.engine_spec) - 1

    async def _ask(self, job: Job, session: Session, clients: ClientProcesses) -> None:
        self._session, self._clients = session, clients
        if self.stopping:
            session.drain()
        try:
            async with preread(await asyncio.to_thread(self._next_weights)) as self._preread:
                if self.stopping:
                    self._preread.stop()
                await session.work()
                await clients.finished()
        finally:
            self.totals.add(job, session.outcome, clients.said())
            self._left = session.outcome.left
            if self.stopping:
                self._handover.next = None
            self._session = self._clients = self._preread = None

    def _next_weights(self) -> list[Path]:
        """What the next server will read, while this one needs the disk no more; nothing for a worker that ends."""
        if self._next is None or self.stopping:
            return []
        try:
            return weight_files(Job.read(self._directory.jobs / self._next).path)
        except StoreError:
            return []  # it is told when that model's turn has come

    def _drain(self, session: Session) -> None:
        """Take no more requests; there will be no next model."""
        if self._preread is not None:
            self._preread.stop()
        session.drain()
        if self._clients is not None:
            self._clients.drain()

    async def _planned(self) -> bool:
        """Wait for the plan, if it is still being made; whether anything is owed by it."""
        if self._plan_token is None:
            return True
        path = self._directory.plan_token(self._plan_token)
        while True:
            if said := await asyncio.to_thread(_read, path):
                self._nothing_owed = said == NOTHING_OWED
                if not self._nothing_owed:
                    self._plan_token = None
                return not self._nothing_owed
            await asyncio.sleep(PLAN_POLL_S)

    async def _worth_starting(self, store: Store, job: Job) -> bool:
        """Whether this model owes anything that this worker could do.

        A worker of this machine always begins: whoever started it waits for all of it. One of an allocation begins
        only with what somebody owes and nobody is asking, and goes on to another model only if those who are at
        that one would not be through with it before another server is up.
        """
        if self._attempt.scheduler is None:
            return True
        answers, shards = await self._share.work_of(self._directory, job, store)
        if self._share.retry_failed:
            return bool(shards)
        keys = await asyncio.to_thread(_owed_keys, store, answers, shards)
        if not keys:
            return False
        ledger = store.ledger(job.weights, owner=self._attempt.owner(job.run))
        free = await ledger.unclaimed(keys)
        if not free:
            return False
        others = len({h.owner.attempt for h in (await ledger.live()).values()})
        cost_s = sum(s.cost_s for s in shards) * len(free) / max(len(keys), 1)
        return not self.totals.models or others == 0 or cost_s / others > self._assignment.startup_s

    # --- the end ---

    async def _end(self, *, left: bool) -> None:
        if not left:
            self._record(Continuation(ending=Ending.DONE))
        elif not self._time_is_up:
            why = Ending.MANUAL_CANCELLATION if self._reason else Ending.DONE
            self._record(Continuation(ending=why, message=f"asked to end by {self._reason_name}"))
        else:
            records = read_attempts(self._directory.attempts)
            earlier = earlier_attempts(records, self._attempt.job, self._attempt.array_task)
            after = await carry_on(self._attempt, self._assignment, answered=self.totals.answered, earlier=earlier)
            self._record(after)
            if after.ending in (Ending.NO_PROGRESS, Ending.RESUBMISSION_FAILED):
                raise LaunchError(after.message, hint=after.hint)

    @property
    def _reason_name(self) -> str:
        return self._reason.name if self._reason else "nobody"

    def _record(self, after: Continuation) -> None:
        if self._attempt.scheduler is None:
            return
        record = AttemptRecord(
            worker=f"{self._assignment.shape}-{self._attempt.label}",
            job=self._attempt.job,
            array_task=self._attempt.array_task,
            restart=self._attempt.restart,
            host=socket.gethostname(),
            started=self._attempt.started,
            ended=time.time(),
            ending=after.ending,
            answered=self.totals.answered,
            failed=self.totals.failed,
            models=tuple(self.totals.models),
            message=after.message,
            hint=after.hint,
            successor=after.successor,
        )
        # A full disk must not hide why the worker ended.
        with contextlib.suppress(OSError):
            self._directory.attempts.mkdir(parents=True, exist_ok=True)
            record.write(self._directory.attempts)

    # --- signals and the clock ---

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        for number in numbers:
            loop.add_signal_handler(number, self._received, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _received(self, number: signal.Signals) -> None:
        """USR1: the time is nearly up. Another signal once drains, twice stops; before the first request it stops."""
        if number == signal.SIGUSR1:
            if self._clock_runs:
                self._warned.set()
            else:
                self._up()
            return
        again = self._reason is not None
        self._reason = number
        if self._session is None or again:
            self._cancel()
        else:
            self._drain(self._session)

    def _up(self) -> None:
        if self._time_is_up:
            return
        self._time_is_up = True
        if self._session is None:
            self._cancel()
        else:
            self._drain(self._session)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    @contextlib.asynccontextmanager
    async def _clock(self) -> AsyncGenerator[None]:
        """Drain in time where the scheduler says when the time is up, whether its signal comes or not."""
        terms, scheduler = self._assignment.slurm, self._attempt.scheduler
        if terms is None or scheduler is None:
            yield
            return
        self._clock_runs = True
        watching = asyncio.create_task(self._watch_clock(scheduler, terms.signal_lead_s))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch_clock(self, scheduler: Scheduler, lead_s: float) -> None:
        ends_at = await self._ends_at(scheduler)
        while True:
            now = time.time()
            if ends_at is not None:
                slowest = max((one.slowest_s for one in (self._session, self._clients) if one is not None), default=0.0)
                if now >= drain_at(ends_at, lead_s=lead_s, slowest_s=slowest):
                    self._up()
                if now >= stop_at(ends_at, lead_s=lead_s):
                    self._cancel()
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._warned.wait(), CLOCK_S)
            if self._warned.is_set():
                self._warned.clear()
                ends_at = await self._ends_at(scheduler)
                if ends_at is None or ends_at - time.time() > lead_s + EARLY_S:
                    self._up()  # not Slurm's clock: somebody wants it, or there is no clock to go by

    async def _ends_at(self, scheduler: Scheduler) -> float | None:
        try:
            return await scheduler.ends_at(self._attempt.job, self._attempt.array_task)
        except LaunchError:
            return None  # the signal still comes


def ending_of(error: ProctorError) -> Ending:
    """The word for an error that ended an attempt."""
    match error:
        case ProbeError():
            return Ending.PROBE_FAILED
        case ServerError(state="died" | "unreachable" | "empty"):
            return Ending.SERVER_DIED
        case ServerError():
            return Ending.SERVER_STARTUP_FAILED
        case StoreError():
            return Ending.STORE_FAILED
        case Unreachable():
            return Ending.SERVER_STARTUP_FAILED
        case LaunchError():
            return Ending.NODE_COUNT_MISMATCH
        case UsageError():
            return Ending.CONFIGURATION
        case _:
            return Ending.EVAL_FAILURES


def _read(path: Path) -> str:
    """Empty where there is no file, or none that can be read."""
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""


def _owed_keys(store: Store, answers: Answers, shards: Sequence[Shard]) -> list[str]:
    """The distinct keys of the shards that have no answer."""
    recorded: dict[str, list[str]] = {}
    keys: dict[str, None] = {}
    for shard in shards:
        for task, ordinal in shard.items:
            if task not in recorded:
                recorded[task] = store.recording_keys(task)
            keys[recorded[task][ordinal]] = None
    return answers.owed(list(keys))
