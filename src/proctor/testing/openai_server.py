"""A fake OpenAI-compatible server: fast, deterministic, and as faulty as asked. `testing.server` is its program."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from types import TracebackType
from typing import Any, Final, Self, cast

import orjson
from aiohttp import web

from proctor.infer.fake_model import BEGIN, encode
from proctor.infer.server import Backend
from proctor.testing.answers import Answer, Answerer, Refused, aborted, chat_prompt, prompts_of, spoilt
from proctor.testing.options import ServerOptions

JSON: Final = "application/json"
GENERATE: Final = "/inference/v1/generate"
COMPLETIONS: Final = ("/v1/completions", "/v1/chat/completions", "/completion", GENERATE)
_METRICS: Final = {
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting"),
    "sglang": ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
    "llama.cpp": ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
}


def prompt_digest(prompt: str | Sequence[int]) -> str:
    """How the journal and /__stats name a prompt, given as the client sends it: text or ids."""
    return hashlib.blake2b(orjson.dumps(prompt), digest_size=12).hexdigest()


def drawn(digest: str, sigma: float) -> float:
    """A log-normal factor of median 1 that belongs to the prompt with this digest."""
    return math.exp(sigma * NormalDist().inv_cdf((int(digest[:12], 16) + 0.5) / 16**12))


@dataclass(slots=True)
class Stats:
    """What was asked."""

    requests: int = 0
    answered: int = 0
    faults: Counter[str] = field(default_factory=Counter[str])
    prompts: Counter[str] = field(default_factory=Counter[str])
    in_flight: int = 0
    max_in_flight: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "answered": self.answered,
            "faults": dict(self.faults),
            "prompts": dict(self.prompts),
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
        }


class FakeServer:
    """An async context manager: listens on loopback while entered; port 0 picks a free one."""

    def __init__(self, options: ServerOptions | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.options = options or ServerOptions()
        self.stats = Stats()
        self.slowness = 1.0
        """Factor of every latency; may be changed while it runs, over HTTP as /__slowness/5."""
        self._host = host
        self._port = port
        self._answerer = Answerer(self.options)
        self._random = random.Random(self.options.faults.seed)
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None
        self._journal: int | None = None
        self._bodies: int | None = None
        self._ready_at = 0.0
        self._next_tokens = 0
        """Requests in flight that want chosen next tokens."""
        self._spoilt = False
        self._stalled = asyncio.Event()
        slots = self.options.latency.slots
        self._slots = asyncio.Semaphore(slots) if slots else None
        self._running = 0

    async def __aenter__(self) -> Self:
        self._ready_at = time.monotonic() + self.options.slow_start_s
        if self.options.journal is not None:
            self._journal = _appending(self.options.journal)
        if self.options.bodies is not None:
            self._bodies = _appending(self.options.bodies)
        self._runner = web.ServerRunner(
            web.Server(self._handle, handler_cancellation=True, access_log=None),
            handle_signals=False,
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, self._host, self._port)
        await self._site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stalled.set()
        if self._runner is not None:
            await self._runner.cleanup()
        for file in (self._journal, self._bodies):
            if file is not None:
                os.close(file)
        self._journal = self._bodies = None

    @property
    def url(self) -> str:
        """The base URL. Valid once entered."""
        return f"http://{self._host}:{self._port}"

    @property
    def backend(self) -> Backend:
        """The server as the engine wants it."""
        return Backend(url=self.url, api_key=self.options.api_key, served_model=self.options.served_model)

    def break_next_tokens(self) -> None:
        """From now on chosen next tokens come back without values."""
        self._spoilt = True

    async def stop_listening(self) -> None:
        """Take no new connections; what is open goes on."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    def break_cached_echo(self) -> None:
        """From now on echo on top of the prefix cache does not say what it found there."""
        self._answerer.cached_echo = "uncounted"

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path in COMPLETIONS:
            return await self._complete(request, path)
        if path == "/__stats":
            return _json(self.stats.to_json())
        if path.startswith("/__slowness/"):
            self.slowness = float(path.rpartition("/")[2])
            return _json({})
        if time.monotonic() < self._ready_at:
            return _error(503, "the model is loading")
        if path == "/tokenize" and self.options.tokenize:
            return self._tokenize(orjson.loads(await request.read()))
        return self._about(path)

    def _about(self, path: str) -> web.Response:
        if path == "/health":
            return web.Response(body=b"")
        if path == "/v1/models":
            model = {"id": self.options.served_model, "object": "model", "max_model_len": self.options.max_model_len}
            return _json({"object": "list", "data": [model]})
        if path == "/metrics":
            return web.Response(text=self._metrics())
        if path == "/version" and not self.options.native:
            return _json({"version": "0.0-fake"})
        if path == "/props" and self.options.native:
            return _json({"default_generation_settings": {}, "bos_token": "<s>", "eos_token": "</s>"})
        return _error(404, "not found")

    def _metrics(self) -> str:
        lines = [f"fake_requests_total {self.stats.requests}", f"fake_answered_total {self.stats.answered}"]
        if self.options.prefix_cache:
            lines.append(f'vllm:cache_config_info{{block_size="{self.options.prefix_cache}"}} 1.0')
        if self.options.metrics:
            running, waiting = _METRICS[self.options.metrics]
            labels = "" if self.options.metrics == "llama.cpp" else '{model_name="default"}'
            lines += [f"{running}{labels} {self._running}.0", f"{waiting}{labels} {self._waiting}.0"]
        return "\n".join(lines) + "\n"

    @property
    def _waiting(self) -> int:
        return self.stats.in_flight - self._running

    def _tokenize(self, body: dict[str, Any]) -> web.Response:
        text = body.get("content" if self.options.native else "prompt")
        if not isinstance(text, str):
            return _error(400, "no text to tokenize")
        tokens = encode(text)
        if body.get("add_special_tokens") or body.get("add_special"):
            tokens = [BEGIN, *tokens]
        return _json({"tokens": tokens, "count": len(tokens)})

    async def _complete(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        stats = self.stats
        stats.requests += 1
        if self.options.die_after is not None and stats.requests > self.options.die_after:
            os._exit(1)
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        body: dict[str, Any] = {}
        try:
            body = orjson.loads(await request.read())
            self._next_tokens += "logprob_token_ids" in body
            return await self._answer(request, path, body)
        except Refused as refused:
            return _error(400, str(refused))
        finally:
            stats.in_flight -= 1
            self._next_tokens -= "logprob_token_ids" in body

    async def _answer(self, request: web.BaseRequest, path: str, body: dict[str, Any]) -> web.StreamResponse:
        if time.monotonic() < self._ready_at:
            return _error(503, "the model is loading")
        key = self.options.api_key
        if key is not None and request.headers.get("Authorization") != f"Bearer {key}":
            return _error(401, "Unauthorized")
        if (path == "/completion" and not self.options.native) or (path == GENERATE and not self.options.prefix_cache):
            return _error(404, "not found")
        fault = self._draw_fault()
        self._note(body, path, fault or "answered")
        if fault is not None:
            self.stats.faults[fault] += 1
        answer = self._compute(body, path)
        async with self._slots or contextlib.nullcontext():
            self._running += 1
            try:
                delay = self._delay(answer.generated, body)
                if delay > 0:
                    await asyncio.sleep(delay)
            finally:
                self._running -= 1
        if fault == "stall" and self.options.faults.stall_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stalled.wait(), self.options.faults.stall_s)
        elif fault is not None:
            return await self._fail(request, fault, answer)
        self.stats.answered += 1
        mixed = self.options.next_tokens == "spoilt" and self.stats.in_flight > self._next_tokens
        if "logprob_token_ids" in body and (mixed or self._spoilt):
            answer = spoilt(answer)
        return web.Response(body=orjson.dumps(answer.body), content_type=JSON)

    def _compute(self, body: dict[str, Any], path: str) -> Answer:
        if path == "/completion":
            return self._answerer.native(body)
        if path == GENERATE:
            return self._answerer.generate(body)
        if path == "/v1/completions":
            return self._answerer.completion(body, prompts_of(body), chat=False)
        return self._answerer.completion(body, [chat_prompt(body)], chat=True)

    def _note(self, body: dict[str, Any], path: str, fate: str) -> None:
        prompt = _asked(body)
        items = cast("list[Any]", prompt) if isinstance(prompt, list) else []
        lines = ""
        for one in items if items and isinstance(items[0], (list, str)) else [cast("Any", prompt)]:
            name = prompt_digest(one)
            self.stats.prompts[name] += 1
            lines += f"{name} {path} {fate}\n"
        if self._journal is not None:
            # One write to a file opened for appending: whole lines, and nothing of ours to lose when killed.
            os.write(self._journal, lines.encode("ascii"))
        if self._bodies is not None:
            os.write(self._bodies, orjson.dumps(body) + b"\n")

    def _draw_fault(self) -> str | None:
        faults = self.options.faults
        if faults.room and self.stats.in_flight > faults.room:
            return "rate_limited"
        drawn = self._random.random()
        for name in ("rate_limited", "server_error", "reset", "stall", "truncated", "error_body", "aborted", "empty"):
            drawn -= getattr(faults, name)
            if drawn < 0:
                return name
        return None

    async def _fail(self, request: web.BaseRequest, fault: str, answer: Answer) -> web.StreamResponse:
        if fault == "rate_limited":
            return _error(429, "too many requests", {"Retry-After": str(self.options.faults.retry_after_s)})
        if fault == "server_error":
            return _error(500, "internal error")
        if fault == "error_body":
            return _json({"error": {"message": "the engine is lost", "type": "internal", "code": 500}})
        if fault == "empty":
            return _json({})
        if fault == "aborted":
            return _json(aborted(answer).body)
        if fault == "truncated":
            whole = orjson.dumps(answer.body)
            return web.Response(body=whole[: len(whole) // 2], content_type=JSON)
        if fault == "stall":
            await self._stalled.wait()
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)

    def _delay(self, generated: int, body: dict[str, Any]) -> float:
        latency = self.options.latency
        delay = latency.fixed_s + latency.per_token_s * generated
        if latency.lognormal_s > 0:
            if latency.by_prompt:
                factor = drawn(prompt_digest(cast("str | list[int]", _asked(body))), latency.sigma)
            else:
                factor = self._random.lognormvariate(0.0, latency.sigma)
            delay += latency.lognormal_s * factor
        return delay * self.slowness


def _asked(body: dict[str, Any]) -> object:
    return body.get("prompt", body.get("messages", body.get("token_ids")))


def _appending(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _json(value: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type=JSON)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    body = orjson.dumps({"error": {"message": message, "type": "fake", "code": status}})
    return web.Response(status=status, body=body, content_type=JSON, headers=headers)
