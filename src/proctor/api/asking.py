"""The workers of a run on this machine: started as soon as there is something for them to do, watched, drained."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from proctor import errors
from proctor.api.context import RunContext
from proctor.api.local_workers import local_workers
from proctor.api.progress import Progress, WorkerEvents
from proctor.api.targets import Target
from proctor.config.engines import Launch
from proctor.config.spec import LocalLaunch
from proctor.errors import ConfigError, LaunchError, ProctorError
from proctor.launch.launcher import Job as LaunchJob
from proctor.launch.launcher import JobState, JobStatus
from proctor.launch.local import LocalLauncher
from proctor.plan import ModelPlan, Plan
from proctor.worker.run_directory import NOTHING_OWED, PLANNED

POLL_S: Final = 0.25
"""Between two looks at the workers: what a person sees as live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How asking went."""

    drained: bool = False
    errors: tuple[ProctorError, ...] = ()


@dataclass(slots=True, eq=False)
class Workers:
    """A context manager: leaving it ends every worker that still runs.

    Workers can be begun before there is a plan: they wait, with their servers coming up, for a file of this command's
    own (see `worker.__main__`).
    """

    context: RunContext
    retry_failed: bool = False
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _launcher: LocalLauncher | None = None
    _events: WorkerEvents | None = None
    _token: str = field(default_factory=lambda: secrets.token_hex(8))
    _early: dict[str, list[LaunchJob]] = field(default_factory=dict[str, list[LaunchJob]])
    """By target."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        with contextlib.suppress(OSError):
            self.context.directory.plan_token(self._token).unlink()

    async def begin(self, targets: Sequence[Target]) -> None:
        """Start the workers: an interpreter takes a second to start, a server minutes.

        Raises ConfigError for another launcher than this machine's, LaunchError for what could never run.
        """
        starting = [(t, t.launch.workers) for t in targets if isinstance(t.launch, LocalLaunch)]
        if not starting or not isinstance(self.context.spec.launch, LocalLaunch):
            return
        launcher, _ = await self._open()
        early = {t.id: self._jobs(t, workers, 0.0, "--plan-token", self._token) for t, workers in starting}
        await launcher.submit([job for jobs in early.values() for job in jobs])
        self._early = early

    async def ask(
        self,
        targets: Sequence[Target],
        plan: Plan,
        progress: Progress,
        beside: AbstractAsyncContextManager[None],
    ) -> Asked:
        """Let everything that the plan owes be asked; `beside` is entered meanwhile."""
        owing = [(t, m) for t, m in zip(targets, plan.models, strict=True) if m.shards]
        if not owing:
            self._say(NOTHING_OWED)
            return Asked()
        directory = self.context.directory
        directory.write_plan({m.model: m.shards for _, m in owing})
        jobs = [job for target, model in owing for job in self._planned(target, model)]
        launcher, events = await self._open()
        wanted, begun = {job.id for job in jobs}, [job.id for early in self._early.values() for job in early]
        async with _draining(launcher) as drain:
            self._say(PLANNED)
            await launcher.cancel([name for name in begun if name not in wanted])
            await launcher.submit([job for job in jobs if job.id not in begun])
            async with beside:
                states = await _watch(launcher, events, progress)
        progress.events(events.read())
        return Asked(drained=drain.requested, errors=tuple(_failures(states, jobs, events)))

    def _say(self, text: str) -> None:
        if self._early:
            self.context.directory.write(self.context.directory.plan_token(self._token), text)

    async def _open(self) -> tuple[LocalLauncher, WorkerEvents]:
        if self._launcher is None or self._events is None:
            self._events = WorkerEvents(self.context.directory.events)
            self._events.skip()
            launcher = await LocalLauncher.open(_here(self.context.spec.launch))
            self._launcher = await self._stack.enter_async_context(launcher)
        return self._launcher, self._events

    def _planned(self, target: Target, model: ModelPlan) -> list[LaunchJob]:
        workers = min(model.workers, model.shard_count)
        if target.id in self._early:
            return self._early[target.id][:workers]
        return self._jobs(target, workers, model.cost_s)

    def _jobs(self, target: Target, workers: int, cost_s: float, *flags: str) -> list[LaunchJob]:
        flags = (*flags, *(["--retry-failed"] if self.retry_failed else []))
        return local_workers(self.context, target, workers=workers, cost_s=cost_s, flags=flags)


def _here(launch: Launch) -> LocalLaunch:
    if isinstance(launch, LocalLaunch):
        return launch
    raise ConfigError(
        f"launch.type is {launch.type!r}: `run` starts workers on this machine only",
        hint="`proctor submit` sends them to the cluster; or add --set launch='{type: local}'",
    )


async def _watch(launcher: LocalLauncher, events: WorkerEvents, progress: Progress) -> Mapping[str, JobStatus]:
    while True:
        states = await launcher.poll(wait_s=POLL_S)
        progress.events(events.read())
        if all(s.state.final for s in states.values()):
            return states


def _failures(states: Mapping[str, JobStatus], jobs: Sequence[LaunchJob], events: WorkerEvents) -> list[ProctorError]:
    """One error for each worker that failed, in its own words where it could still say any."""
    found: list[ProctorError] = []
    for job in jobs:
        status = states[job.id]
        said = events.last(job.id)
        if status.state is not JobState.FAILED or status.returncode == errors.Incomplete.exit_code:
            continue
        if said is not None and said.error:
            kind: type[ProctorError] = getattr(errors, said.error, ProctorError)
            found.append(kind(said.message, hint=said.hint))
        else:
            reason = status.message or f"it ended with status {status.returncode}"
            found.append(
                LaunchError(f"worker {job.id} failed: {reason}", hint=f"see {job.log}; repeat the command to continue")
            )
    return found


class _Drain:
    requested = False


@contextlib.asynccontextmanager
async def _draining(launcher: LocalLauncher) -> AsyncGenerator[_Drain]:
    """Pass on a first signal as a request to drain, a second as an order to stop."""
    drain = _Drain()
    loop = asyncio.get_running_loop()
    pending: set[asyncio.Task[None]] = set()

    def received() -> None:
        work = launcher.cancel(drain=not drain.requested)
        drain.requested = True
        task = loop.create_task(work)
        pending.add(task)
        task.add_done_callback(pending.discard)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            loop.add_signal_handler(number, received)
    except (ValueError, RuntimeError):
        # Not the main thread: whoever runs us handles signals.
        yield drain
        return
    try:
        yield drain
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        if pending:
            await asyncio.gather(*pending)
