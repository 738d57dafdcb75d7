"""Servers that we start: replicas, ports, keys, restarts. A `Recipe` says what is particular to each kind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import aiohttp

from proctor.config.spec import ServerBase
from proctor.errors import ServerError
from proctor.infer.server import Backend, Load, ServedModel, ServerPaths
from proctor.infer.servers.hardware import describe_hardware
from proctor.infer.servers.health import Probe, StartLimits, describe_log, listed_names, wait_until_healthy
from proctor.infer.servers.hints import find_cause, killed_hint
from proctor.infer.servers.placement import LOOPBACK, OnThisMachine, Placement, Site
from proctor.infer.servers.stalls import StallWatch
from proctor.interpreters import Command
from proctor.processes.container import Container
from proctor.processes.group import ProcessGroup
from proctor.records import EngineInfo, canonical_json

_PORT_TRIES: Final = 4
"""Another process can take a port between our look and the server's bind; so often in a row it is no accident."""
_DEAD_AFTER: Final = 3
"""Health questions refused, or answered 5xx, in a row before a living process counts as dead."""
_DEAD_PAUSE_S: Final = 0.5
_BACKOFF_LONGEST_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one replica runs, for this start."""

    replica: int
    port: int
    api_key: str
    api_key_file: Path
    """Holds the key and nothing else; readable by the owner only."""
    devices: tuple[str, ...]
    host: str = LOOPBACK
    """Of the first node, where there are several."""
    inside: bool = False
    """In a container: programs are those of its image."""
    nodes: int = 1
    node_rank: str = "0"
    """Of the node that runs the command; a mark that a step replaces, where there are several."""
    master_port: int = 0
    """Free on the first node, for what the nodes tell each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a running server says about itself."""

    version: str = "unknown"
    dtype: str = "unknown"
    parallelism: str = "tp1"
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Recipe(Protocol):
    """What is particular to one kind of server."""

    @property
    def engine(self) -> str: ...

    @property
    def health(self) -> str:
        """Path that answers 2xx once requests are served."""
        ...

    @property
    def keyed(self) -> bool:
        """Whether the server is made to demand the key."""
        ...

    @property
    def direct(self) -> bool:
        """Whether the server is a descendant of the command, so that it must itself hold the port."""
        ...

    def command(self, place: Place) -> Command:
        """The command that serves the model there, with its whole environment. No secret in its arguments."""
        ...

    async def describe(self, probe: Probe, log: Path) -> Facts:
        """Ask the running server what it is. Never raises: what it does not tell stays unknown."""
        ...


class _Replica:
    """One started process group and the URL it serves; replaced by a new one on restart."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.group: ProcessGroup | None = None
        self.backend: Backend | None = None
        self.attempts = 0
        self.restarts = 0
        self.site: Site | None = None
        self.stall = StallWatch()
        self.reloaded = False
        """Whether it has got other weights since it was started."""


class LaunchedServer:
    """The replicas of one model under one recipe. Use as an async context manager."""

    def __init__(
        self,
        recipe: Recipe,
        spec: ServerBase,
        model: ServedModel,
        *,
        paths: ServerPaths,
        api_key: str | None = None,
        limits: StartLimits | None = None,
        container: Container | None = None,
        placement: Placement | None = None,
    ) -> None:
        self._recipe = recipe
        self._container = container
        self._placement = placement or OnThisMachine(spec.replicas)
        self._spec = spec
        self._model = model
        self._paths = paths
        # Digits and letters: a command that takes it as an argument would read a dash in front as an option.
        self._key = api_key or secrets.token_hex(32)
        self._limits = limits or StartLimits(whole_s=spec.start_timeout_s)
        if not self._placement.local:
            # What other nodes compute cannot be seen here: a silent start-up is not a stalled one.
            self._limits = replace(self._limits, stalled_s=self._limits.whole_s)
        self._replicas = [_Replica(index) for index in range(self._placement.replicas)]
        self._load: Callable[[], Mapping[str, Load]] = dict
        self._stack = AsyncExitStack()
        self._lock = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None
        self._info: EngineInfo | None = None
        self._reloaded_info: EngineInfo | None = None

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The replicas' URLs, in the replicas' order."""
        return tuple(replica.backend for replica in self._replicas if replica.backend is not None)

    @property
    def info(self) -> EngineInfo:
        """As found at the first start; `details` say where weights were loaded into a running server since."""
        if self._info is None:
            raise RuntimeError("the server is not entered")
        if self._reloaded_info is not None and any(replica.reloaded for replica in self._replicas):
            return self._reloaded_info
        return self._info

    @property
    def pids(self) -> tuple[int, ...]:
        """The guards of the replicas that have been started."""
        return tuple(replica.group.pid for replica in self._replicas if replica.group is not None)

    def observe(self, load: Callable[[], Mapping[str, Load]]) -> None:
        """From now on `load` says, by URL, what the client has with each backend: without it no stall is seen."""
        self._load = load

    def take_over(self, recipe: Recipe, model: ServedModel, *, logs: Path) -> None:
        """All replicas hold the weights of `model` now: it is this server's model, and a restart starts it with them.

        The name that clients send stays that of the start.
        """
        self._recipe, self._model, self._paths = recipe, model, replace(self._paths, logs=logs)
        logs.mkdir(parents=True, exist_ok=True)
        if self._info is not None:
            details = json.loads(self._info.details) | {"weights": "reloaded"}
            self._reloaded_info = replace(self._info, details=canonical_json(details))
        for replica in self._replicas:
            replica.reloaded, replica.restarts, replica.stall = True, 0, StallWatch()

    async def __aenter__(self) -> Self:
        self._paths.logs.mkdir(parents=True, exist_ok=True)
        self._paths.scratch.mkdir(parents=True, exist_ok=True)
        async with AsyncExitStack() as stack:
            self._session = await stack.enter_async_context(aiohttp.ClientSession())
            stack.push_async_callback(self._stop_all)
            await _together([self._start(replica) for replica in self._replicas])
            self._info = await self._describe()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def ensure(self) -> None:
        """Restart the replicas that died. Raises ServerError when one has spent its restarts."""
        async with self._lock:
            dead = await asyncio.gather(*(self._death(replica) for replica in self._replicas))
            await _together(
                [self._restart(replica, why) for replica, why in zip(self._replicas, dead, strict=True) if why]
            )

    # --- one replica ------------------------------------------------------------------------------

    async def _start(self, replica: _Replica) -> None:
        for tries_left in reversed(range(_PORT_TRIES)):
            try:
                await self._start_once(replica)
            except ServerError:
                cause = find_cause(_log_of(replica))
                if tries_left and cause is not None and cause.port_taken:
                    continue
                raise
            return

    async def _start_once(self, replica: _Replica) -> None:
        replica.backend = None
        await self._stop(replica)
        site = replica.site = self._placement.site(replica.index)
        place = Place(
            replica=replica.index,
            port=site.port,
            api_key=self._key,
            api_key_file=self._write_key(),
            devices=site.devices,
            host=site.host,
            inside=self._container is not None,
            nodes=site.nodes,
            node_rank=site.node_rank,
            master_port=site.master_port,
        )
        command = self._command(place)
        log = self._new_log(replica)
        group = replica.group = await ProcessGroup.start(command.argv, env=command.env, log=log)
        key = self._key if self._recipe.keyed else None
        url = f"http://{place.host}:{place.port}"
        probe = self._probe(url, key)
        try:
            await wait_until_healthy(
                group,
                probe,
                what=self._what(replica),
                health=self._recipe.health,
                port=place.port if self._is_descendant else None,
                limits=self._limits,
            )
            name = await self._served_name(probe, replica)
        except BaseException:
            await self._stop(replica)
            raise
        replica.stall = StallWatch()
        replica.reloaded = False
        replica.backend = Backend(url=url, api_key=key, served_model=name)

    async def _stop(self, replica: _Replica) -> None:
        if replica.group is not None:
            await replica.group.stop()
            await self._placement.ended(replica.index)

    def _command(self, place: Place) -> Command:
        command = self._recipe.command(place)
        env = dict(command.env) | self._spec.env
        if place.devices and self._placement.local:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(place.devices)
        return self._placement.command(
            Command(argv=command.argv, env=env),
            place.replica,
            container=self._container,
            model=self._model,
            scratch=self._paths.scratch,
        )

    @property
    def _is_descendant(self) -> bool:
        """Whether the process that holds the port is one of ours: srun and podman start theirs elsewhere."""
        elsewhere = self._container is not None and self._container.type in ("pyxis", "podman")
        return self._recipe.direct and self._placement.local and not elsewhere

    async def _served_name(self, probe: Probe, replica: _Replica) -> str:
        reply = await probe.get("/v1/models")
        names = listed_names(reply)
        if reply.status in (401, 403):
            said, hint = "refuses the key that it was given", "a command should read the key from {api_key_file}"
        elif not names or self._model.name in names:
            return self._model.name
        elif not self._recipe.direct and len(names) == 1:
            # A command need not use {name}; what it serves alone is what was meant.
            return names[0]
        else:
            said = f"serves {', '.join(map(repr, names[:8]))}, not {self._model.name!r}"
            hint = "another server answers on that port, or the command should pass on {name}"
        raise ServerError(
            f"{self._what(replica)} {said}{describe_log(_log_of(replica))}",
            hint=hint,
            state="failed",
            log=str(_log_of(replica)),
        )

    async def _death(self, replica: _Replica) -> str | None:
        """Why the replica counts as dead, or None. One that is only slow to answer is alive."""
        if replica.group is None or replica.backend is None:
            return "it is not up"
        if replica.group.returncode is not None:
            return f"it ended with exit status {replica.group.returncode}"
        probe = self._probe(replica.backend.url, replica.backend.api_key)
        said = ""
        for left in reversed(range(_DEAD_AFTER)):
            reply = await probe.get(self._recipe.health)
            if not reply.refused and reply.status < 500:
                return await self._stalled(replica)
            said = f"{self._recipe.health} answers HTTP {reply.status}" if reply.status else "nobody listens any more"
            if left:
                await asyncio.sleep(_DEAD_PAUSE_S)
        return said

    async def _stalled(self, replica: _Replica) -> str | None:
        """Why a living replica is no good: it has requests, answers none, and does nothing."""
        group, backend, limit_s = replica.group, replica.backend, self._spec.stall_s
        if group is None or backend is None:
            return None
        waited_s = replica.stall.waiting_s(self._load().get(backend.url, Load()))
        # Only a suspect is looked at, for the latter half of its time.
        if waited_s < limit_s / 2:
            return None
        replica.stall.sees(await self._placement.activity(replica.index, group))
        if waited_s < limit_s or replica.stall.waiting_s(self._load().get(backend.url, Load())) < limit_s:
            return None
        if replica.stall.watched_s < limit_s / 4:
            return None
        return f"it stalled: requests wait, none was answered for {waited_s:.0f} s, and it computes nothing"

    async def _restart(self, replica: _Replica, why: str) -> None:
        while True:
            if replica.restarts >= self._spec.restarts:
                log = _log_of(replica)
                cause = find_cause(log)
                code = replica.group.returncode if replica.group is not None else None
                raise ServerError(
                    f"{self._what(replica)} died: {why}; its {self._spec.restarts} restarts are spent"
                    f"{describe_log(log)}",
                    hint=cause.hint if cause else killed_hint(code) or "raise `engine.server.restarts`, or see the log",
                    state="died",
                    log=str(log),
                )
            replica.restarts += 1
            if replica.restarts > 1:
                await asyncio.sleep(min(2.0 ** (replica.restarts - 2), _BACKOFF_LONGEST_S))
            try:
                await self._start(replica)
            except ServerError as error:
                why = f"it did not start again ({error.state or 'failed'})"
            else:
                return

    async def _stop_all(self) -> None:
        for replica in self._replicas:
            replica.backend = None
        results = await asyncio.gather(*(self._stop(replica) for replica in self._replicas), return_exceptions=True)
        self._key_path().unlink(missing_ok=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # --- what they share --------------------------------------------------------------------------

    def _probe(self, url: str, key: str | None) -> Probe:
        if self._session is None:
            raise RuntimeError("the server is not entered")
        return Probe(self._session, url, key, self._limits.request_s)

    def _what(self, replica: _Replica) -> str:
        number = f" (replica {replica.index})" if len(self._replicas) > 1 else ""
        return f"{self._recipe.engine} server for {self._model.path!r}{number}"

    def _key_path(self) -> Path:
        return self._paths.scratch / f".key-{os.getpid()}-{id(self):x}"

    def _write_key(self) -> Path:
        path = self._key_path()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(self._key)
        return path

    def _new_log(self, replica: _Replica) -> Path:
        """A log of its own for each attempt; those of earlier runs stay."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", self._recipe.engine)
        while True:
            replica.attempts += 1
            path = self._paths.logs / f"{stem}-{replica.index}-{replica.attempts}.log"
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return path

    async def _describe(self) -> EngineInfo:
        first = self._replicas[0]
        if first.backend is None:
            raise RuntimeError("no replica is up")
        facts = await self._recipe.describe(self._probe(first.backend.url, first.backend.api_key), _log_of(first))
        details = dict(facts.details) | {"replicas": len(self._replicas)}
        if self._spec.args:
            details["args"] = self._spec.args
        return EngineInfo(
            engine=self._recipe.engine,
            version=facts.version,
            dtype=facts.dtype,
            parallelism=facts.parallelism,
            hardware=await describe_hardware(first.site.devices if first.site else ()),
            details=canonical_json(details),
        )


def _log_of(replica: _Replica) -> Path:
    return replica.group.log if replica.group is not None else Path(os.devnull)


async def _together(jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; when one fails, cancel the others, wait for their end, and raise its error."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    if not tasks:
        return
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
