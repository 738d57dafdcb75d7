"""Any model class of lm-eval as an engine, in a process of its own, fed in slices.

The class renders, tokenises and fits to its window by itself, with its own habits; what it answers is what
lm-eval's own run with this class gets. Each slice's answers are yielded, and so journaled, as soon as it is done.

Slices find their size by the clock, and cannot be seen in the answers at batch size 1. A class with larger batches
sorts what it is given by length and pads each batch to its longest: then the slice decides who shares a batch, and
the last digits of a log-likelihood may differ from those of a run that is handed everything at once, as they do
between two batch sizes. Slices are therefore whole batches; for `auto`, which looks for its batch size anew in
every call, they are as large as they may be.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import struct
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

from proctor.config.spec import LmEvalModelEngine as LmEvalSpec
from proctor.errors import ConfigError, MissingTool, ServerError, UnknownName, UsageError
from proctor.infer.engine import PhysicalRequest
from proctor.infer.lm_eval_host import frame
from proctor.infer.lm_eval_resolution import resolution_digest
from proctor.infer.server import ServedModel
from proctor.infer.servers.hardware import describe_hardware
from proctor.infer.servers.health import LifeSigns, StartState, describe_log, start_error
from proctor.infer.servers.hints import find_cause, killed_hint
from proctor.infer.servers.inside import model_binds
from proctor.infer.tokenizer import template_digest, tokenizer_digest
from proctor.infer.tokenizer_directory import read_json
from proctor.interpreters import OFFLINE, Command, image_command, module_command
from proctor.processes.container import Container, contained
from proctor.processes.group import ProcessGroup
from proctor.records import (
    Answer,
    Boundary,
    EngineInfo,
    Failure,
    Kind,
    Request,
    Response,
    canonical_json,
    digest,
)

SEEDS: Final = (0, 1234, 1234)
"""random, numpy, torch: what lm-eval's entry point sets before it builds the model."""
SLICE_S: Final = 10.0
"""What a slice should take: so much work at most is lost with a process that dies."""
_FIRST_SLICE: Final = 8
_LINGER_S: Final = 0.1
"""How long a slice that is not full waits for more."""
_STALLED_S: Final = 600.0
_LENGTH: Final = struct.Struct(">Q")
_LOST: Final = re.compile(r"device-side assert|illegal memory access|CUDA error|EngineDeadError|NCCL", re.IGNORECASE)
"""After these the process answers nothing more: it must be started anew."""
_HOST: Final = "proctor.infer.lm_eval_host"
_NO_PIPES: Final = ("pyxis", "podman")
_MEMORY: Final = re.compile(r"out of memory|OutOfMemory|can't allocate memory", re.IGNORECASE)


def is_sampled(request: Request) -> bool:
    """Whether asking again may give another answer. By lm-eval's rule greedy needs no do_sample and temperature 0."""
    if request.kind is not Kind.GENERATE:
        return False
    arguments = cast("dict[str, Any]", json.loads(request.arguments))
    return bool(arguments.get("do_sample")) or bool(arguments.get("temperature"))


class LmEvalModelEngine:
    """One model class in a child process. Use as an async context manager."""

    def __init__(
        self,
        spec: LmEvalSpec,
        *,
        path: str,
        log: Path,
        revision: str | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        container: Container | None = None,
    ) -> None:
        """`container`: around the child; its image has lm-eval. Raises ConfigError for one that passes on no pipes."""
        if container is not None and container.type in _NO_PIPES:
            raise ConfigError(
                f"engine type lm_eval speaks to its process through pipes, which {container.type} does not pass on",
                hint="use apptainer, singularity, enroot or charliecloud, or `launch.container: {type: none}` with "
                "`engine.python` of an environment",
            )
        self._spec = spec
        self._path = path
        self._log = log
        self._container = container
        self._model = ServedModel(path=path, tokenizer=tokenizer)
        self._orders: dict[str, Any] = {
            "model": spec.model,
            "model_args": spec.model_args,
            "batch_size": spec.batch_size,
            "device": spec.device,
            "seeds": SEEDS,
            "path": path,
            "revision": revision,
            "tokenizer": tokenizer,
            "trust_remote_code": trust_remote_code,
        }
        self._resolution = self._identify(revision, tokenizer)
        self._host: _Host | None = None
        self._info: EngineInfo | None = None

    def _identify(self, revision: str | None, tokenizer: str | None) -> str:
        model = Path(self._path)
        chosen = Path(tokenizer) if tokenizer else model
        if not chosen.is_dir():
            # A hub id or a file: its own identity stands for what cannot be read here.
            named = digest([str(chosen), revision])
            return resolution_digest(self._spec, tokenizer=named, template=named)
        return resolution_digest(
            self._spec,
            tokenizer=tokenizer_digest(chosen),
            template=template_digest(chosen),
            generation_config=read_json(model / "generation_config.json"),
        )

    async def __aenter__(self) -> Self:
        host = await _Host.start(self._spec, self._orders, self._log, self._command)
        self._info = await self._describe(host.ready)
        self._host = host
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._host is not None:
            await self._host.stop()
            self._host = None

    def _command(self, fds: Sequence[int]) -> Command:
        if self._container is None:
            return module_command(self._spec.python, _HOST, *map(str, fds))
        command, sources = image_command(self._spec.python, _HOST, *map(str, fds))
        binds = model_binds(self._model, *sources)
        forward = ["PYTHONPATH", *(name for name in OFFLINE if name in command.env)]
        return contained(self._container, command, forward=forward, binds=binds)

    @property
    def info(self) -> EngineInfo:
        """As the class described itself after loading."""
        if self._info is None:
            raise RuntimeError("the engine is not entered")
        return self._info

    @property
    def resolution(self) -> str:
        """The `resolution_digest` of this model."""
        return self._resolution

    @property
    def resolves_alone(self) -> bool:
        return True

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        """Give each its physical key; the class does the rest. Needs no running host."""
        return [self._physical(request) for request in requests]

    def _physical(self, request: Request) -> PhysicalRequest:
        asked = request.to_json()
        if not is_sampled(request):
            asked.pop("sample_index", None)
            asked.pop("replicate", None)
        physical = digest([self._resolution, asked])
        return PhysicalRequest(key=request.key, physical_key=physical, kind=request.kind, request=request)

    async def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncGenerator[Answer]:
        """Ask slice by slice; the next one is collected meanwhile."""
        if self._host is None:
            raise RuntimeError("the engine is not entered")
        pace = Pace(self._spec.batch_size, self._spec.slice_size)
        async with _Feed(requests, pace.largest) as feed:
            while taken := await feed.take(pace.size):
                started = time.monotonic()
                for part in _by_kind(taken):
                    async for answer in self._ask(self._host, part):
                        yield answer
                pace.took(len(taken), time.monotonic() - started)

    async def _ask(self, host: _Host, part: Sequence[PhysicalRequest]) -> AsyncGenerator[Answer]:
        """Answer requests of one kind. A part that raises is halved until the requests that raise stand alone."""
        waiting = [list(part)]
        while waiting:
            asked = waiting.pop()
            started = time.monotonic()
            reply = await host.ask(asked[0].kind, [item.request.to_json() for item in asked])
            error = reply.get("error")
            if error is None:
                each_s = (time.monotonic() - started) / len(asked)
                for item, result in zip(asked, reply["results"], strict=True):
                    yield self._answer(item, result, each_s)
            elif _LOST.search(error):
                raise host.lost(f"cannot go on: {error}")
            elif len(asked) > 1:
                middle = len(asked) // 2
                waiting += [asked[middle:], asked[:middle]]
            else:
                yield _failure(asked[0], Boundary.ENGINE, error, retryable=bool(_MEMORY.search(error)))

    def _answer(self, item: PhysicalRequest, result: Mapping[str, Any], latency_s: float) -> Answer:
        if "error" in result:
            return _failure(item, Boundary.RENDER, result["error"], retryable=False)
        value, logprob, greedy = result["value"], None, None
        if item.kind is Kind.LOGLIKELIHOOD:
            logprob, greedy = float(value[0]), bool(value[1])
        elif item.kind is Kind.ROLLING:
            logprob = float(value)
        if logprob is not None and not math.isfinite(logprob):
            return _failure(item, Boundary.ENGINE, f"the log-probability is {logprob}", retryable=False)
        return Response(
            key=item.key,
            physical_key=item.physical_key,
            text=value if item.kind is Kind.GENERATE else None,
            logprob=logprob,
            is_greedy=greedy,
            prompt_tokens=result.get("prompt", 0),
            completion_tokens=result.get("completion", 0),
            truncated_tokens=result.get("cut", 0),
            # The classes draw from one global generator: a request has no seed of its own.
            seed_honoured=False if is_sampled(item.request) else None,
            engine_id=self.info.id,
            latency_s=latency_s,
            created=time.time(),
        )

    async def _describe(self, said: Mapping[str, Any]) -> EngineInfo:
        versions = cast("dict[str, str]", said["versions"])
        gpus = cast("list[str]", said["gpus"])
        details = {
            "class": said["class"],
            "versions": versions,
            "device": said["device"],
            "max_length": said["max_length"],
            "batch_size": self._spec.batch_size,
            "model_args": self._spec.model_args,
        }
        parallel = self._spec.model_args.get("tensor_parallel_size") or 1
        return EngineInfo(
            engine=f"lm_eval:{self._spec.model}",
            version=versions.get("lm_eval", "unknown"),
            dtype=str(said["dtype"]),
            parallelism=f"tp{parallel}",
            hardware=", ".join(gpus) if gpus else await describe_hardware(),
            method="in-process",
            details=canonical_json(details),
        )


class _Host:
    """The child process and the two pipes to it. One question at a time."""

    def __init__(self, group: ProcessGroup, sink: int) -> None:
        self._group = group
        self._sink = sink
        self._source = asyncio.StreamReader()
        self._pipe: asyncio.ReadTransport
        self._writing: asyncio.Future[None] | None = None
        self._next = 0
        self._lock = asyncio.Lock()
        self.ready: Mapping[str, Any] = {}

    @classmethod
    async def start(
        cls, spec: LmEvalSpec, orders: Mapping[str, Any], log: Path, build: Callable[[Sequence[int]], Command]
    ) -> _Host:
        """Start it and wait until the model is loaded. Raises ServerError with the log's end."""
        there_read, here_write = os.pipe()
        here_read, there_write = os.pipe()
        theirs = (there_read, there_write)
        try:
            command = build(theirs)
            group = await ProcessGroup.start(command.argv, env=command.env, log=log, pass_fds=theirs)
        except BaseException:
            os.close(here_read)
            os.close(here_write)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        host = cls(group, here_write)
        await host._listen(here_read)
        try:
            await host._load(spec, orders)
        except BaseException:
            await host.stop()
            raise
        return host

    async def _listen(self, fd: int) -> None:
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._source), os.fdopen(fd, "rb", buffering=0)
        )

    async def _load(self, spec: LmEvalSpec, orders: Mapping[str, Any]) -> None:
        what = f"lm-eval model {spec.model!r} for {orders['path']!r}"
        with suppress(ConnectionError):
            await self._write(orders)
        signs, reading = LifeSigns(self._group), asyncio.ensure_future(self._read())
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=1.0)
                if signs.quiet_s() > _STALLED_S:
                    raise start_error(what, StartState.STALLED, self._group, f"no sign of life for {_STALLED_S:g} s")
            reply = reading.result()
        except asyncio.IncompleteReadError:
            code = await self._group.wait()
            happened = f"ended with exit status {code}"
            raise start_error(what, StartState.FAILED, self._group, happened) from None
        finally:
            reading.cancel()
        if "error" in reply:
            raise _refusal(spec, reply) or start_error(what, StartState.FAILED, self._group, reply["error"])
        self.ready = reply["ready"]

    async def ask(self, kind: Kind, requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One slice. Raises ServerError if the process ends."""
        async with self._lock:
            self._next += 1
            try:
                await self._write({"id": self._next, "kind": kind.value, "requests": requests})
                while True:
                    reply = await self._read()
                    # An answer to a question whose asker has gone is still on its way.
                    if reply.get("id") == self._next:
                        return reply
            except (asyncio.IncompleteReadError, ConnectionError):
                code = await self._group.wait()
                raise self.lost(f"ended with exit status {code}") from None

    def lost(self, happened: str) -> ServerError:
        """The error that ends everything: the process is gone, or no longer of use."""
        log = self._group.log
        cause = find_cause(log)
        return ServerError(
            f"the lm-eval process {happened}{describe_log(log)}",
            hint=cause.hint if cause else killed_hint(self._group.returncode) or "see the log, and run again to go on",
            state="died",
            log=str(log),
        )

    async def _read(self) -> dict[str, Any]:
        head = await self._source.readexactly(_LENGTH.size)
        return json.loads(await self._source.readexactly(_LENGTH.unpack(head)[0]))

    async def _write(self, message: Any) -> None:
        # In a thread: a pipe holds 64 KiB and the process reads only between slices. One whose asker was
        # cancelled is written to its end before the next begins.
        if self._writing is not None:
            await asyncio.wait([self._writing])
        data = memoryview(frame(message))
        self._writing = asyncio.ensure_future(asyncio.to_thread(_write_all, self._sink, data))
        await asyncio.shield(self._writing)

    async def stop(self) -> None:
        """End the process; what it computes is lost."""
        try:
            await self._group.stop()
        finally:
            if self._writing is not None:
                # Whatever it still had to say has nobody to read it: the write has failed by now.
                await asyncio.gather(self._writing, return_exceptions=True)
            self._pipe.close()
            os.close(self._sink)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _refusal(spec: LmEvalSpec, reply: Mapping[str, Any]) -> UsageError | None:
    """What only the configuration can mend."""
    if reply["missing"]:
        return MissingTool(
            f"the interpreter {spec.python or 'that runs proctor'!r} has no lm-eval: {reply['error']}",
            hint="install lm-eval there, or name the one that has it with `engine.python`",
        )
    names = cast("list[str]", reply["names"])
    return UnknownName.among("lm-eval model class", spec.model, names) if names and spec.model not in names else None


class Pace:
    """How many requests the next slice has: doubled while slices take less than half of SLICE_S, halved after one
    that took more than twice that; a multiple of the batch size where `largest` allows one."""

    def __init__(self, batch_size: int | str, largest: int) -> None:
        if isinstance(batch_size, str):
            self.largest = self.size = self._smallest = largest
            return
        self.largest = largest // batch_size * batch_size or largest
        self._smallest = self.size = min(-(-_FIRST_SLICE // batch_size) * batch_size, self.largest)

    def took(self, requests: int, seconds: float) -> None:
        """Learn from a slice. One that was not full says nothing about a larger one, unless it was slow."""
        if seconds > 2 * SLICE_S:
            self.size = max(self._halved(), self._smallest)
        elif seconds < SLICE_S / 2 and requests >= self.size:
            self.size = min(self.size * 2, self.largest)

    def _halved(self) -> int:
        # In whole first slices, which are whole batches.
        return self.size // 2 // self._smallest * self._smallest


class _Feed:
    """Collects requests ahead of the host: at most one slice waits while another is computed."""

    def __init__(self, requests: AsyncIterable[PhysicalRequest], ahead: int) -> None:
        self._requests = requests
        self._room = asyncio.Semaphore(ahead)
        self._queue: asyncio.Queue[PhysicalRequest | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._pull())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _pull(self) -> None:
        try:
            async for request in self._requests:
                await self._room.acquire()
                self._queue.put_nowait(request)
        finally:
            self._queue.put_nowait(None)

    async def take(self, size: int) -> list[PhysicalRequest]:
        """A slice of at most `size`: what is there, and what comes while lingering.

        Empty at the end; raises what the source raised.
        """
        taken: list[PhysicalRequest] = []
        with suppress(TimeoutError):
            while len(taken) < size:
                async with asyncio.timeout(_LINGER_S if taken else None):
                    item = await self._queue.get()
                if item is None:
                    self._queue.put_nowait(None)
                    break
                taken.append(item)
                self._room.release()
        if not taken and self._task is not None:
            await self._task
        return taken


def _by_kind(taken: Sequence[PhysicalRequest]) -> list[list[PhysicalRequest]]:
    """One list for each kind, with equal contexts side by side: the classes compute them once."""
    parts: dict[Kind, list[PhysicalRequest]] = defaultdict(list)
    for item in taken:
        parts[item.kind].append(item)
    for part in parts.values():
        part.sort(key=lambda item: (item.request.text, [(m.role, m.content) for m in item.request.messages]))
    return list(parts.values())


def _failure(item: PhysicalRequest, boundary: Boundary, message: str, *, retryable: bool) -> Failure:
    return Failure(
        key=item.key,
        physical_key=item.physical_key,
        boundary=boundary,
        message=message,
        retryable=retryable,
        created=time.time(),
    )
