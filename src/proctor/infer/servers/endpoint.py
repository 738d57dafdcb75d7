"""Servers that run already and are not ours to start or stop."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self, cast

import aiohttp

from proctor.config.spec import EndpointServer
from proctor.errors import ConfigError, ServerError
from proctor.infer.origin import proxy_of
from proctor.infer.server import Backend, ServedModel
from proctor.infer.servers.health import Probe, Reply, field_of, listed_names
from proctor.records import EngineInfo

_REQUEST_S: Final = 15.0
_TAILS: Final = ("/chat/completions", "/completions", "/models", "/v1")
"""What people paste after the base URL; cut off, in this order."""
_ENGINES: Final = {"vllm": "vllm", "llamacpp": "llama.cpp", "sglang": "sglang"}
"""`owned_by` in /v1/models, for servers that say what they are."""


def base_url(text: str) -> str:
    """The base URL without /v1 and without a trailing slash. Raises ConfigError if it is no http(s) URL."""
    try:
        parts = urllib.parse.urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        raise _bad_url(text) from None
    if not valid:
        raise _bad_url(text)
    path = parts.path.rstrip("/")
    for end in _TAILS:
        path = path.removesuffix(end).rstrip("/")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _bad_url(text: str) -> ConfigError:
    return ConfigError(
        f"{text!r} is not the URL of an endpoint", hint="write it in full, such as http://localhost:8000"
    )


class Endpoint:
    """One model at one or several base URLs; `model.path` is the first."""

    def __init__(
        self, spec: EndpointServer, model: ServedModel, *, urls: Sequence[str] = (), api_key: str | None = None
    ) -> None:
        self._spec = spec
        self._model = model
        self._urls = list(dict.fromkeys(base_url(url) for url in (model.path, *urls)))
        self._key = api_key
        self._session: aiohttp.ClientSession | None = None
        self._backends: tuple[Backend, ...] = ()
        self._info: EngineInfo | None = None

    @property
    def backends(self) -> tuple[Backend, ...]:
        return self._backends

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise RuntimeError("the endpoint is not entered")
        return self._info

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        try:
            self._backends = tuple(await asyncio.gather(*(self._reach(url) for url in self._urls)))
            self._info = await self._describe(self._backends[0])
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ensure(self) -> None:
        """Raises ServerError when no URL answers any more; one of several may be away for a while."""
        results = await asyncio.gather(*(self._reach(url) for url in self._urls), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(results):
            raise errors[0]

    def _probe(self, url: str) -> Probe:
        if self._session is None:
            raise RuntimeError("the endpoint is not entered")
        # Endpoints may lie behind a proxy, unlike what we start ourselves.
        return Probe(self._session, url, self._key, _REQUEST_S, proxy=proxy_of(url))

    async def _reach(self, url: str) -> Backend:
        probe = self._probe(url)
        if self._spec.health is not None:
            path = self._spec.health if self._spec.health.startswith("/") else f"/{self._spec.health}"
            reply = await probe.get(path)
            if not reply.ok:
                raise _unreachable(url, path, reply, keyed=self._key is not None)
        reply = await probe.get("/v1/models")
        names = listed_names(reply)
        if names is not None:
            return self._backend(url, self._choose(url, names))
        if self._spec.health is None or reply.status in (401, 403):
            raise _unreachable(url, "/v1/models", reply, keyed=self._key is not None)
        # The health path vouches for a server that does not list its models.
        return self._backend(url, self._model.name)

    def _backend(self, url: str, served_model: str) -> Backend:
        return Backend(url=url, api_key=self._key, served_model=served_model, proxy=proxy_of(url))

    def _choose(self, url: str, names: list[str]) -> str:
        if self._model.name in names:
            return self._model.name
        if self._model.name == "default" and len(names) == 1:
            return names[0]
        shown = ", ".join(map(repr, names[:12])) or "none"
        raise ServerError(
            f"the endpoint {url} does not serve {self._model.name!r}; it lists: {shown}",
            hint="set the model's `served_model` to one of them",
            state="unreachable",
        )

    async def _describe(self, backend: Backend) -> EngineInfo:
        probe = self._probe(backend.url)
        entries = (await probe.learn("/v1/models")).field("data")
        owners = [field_of(entry, "owned_by") for entry in cast(list[Any], entries or [])]
        owner = str(owners[0] or "") if owners else ""
        version = (await probe.learn("/version")).field("version")
        return EngineInfo(
            engine=_ENGINES.get(owner, "openai"),
            version=str(version or "unknown"),
            parallelism="unknown",
            details=json.dumps({"owned_by": owner, "urls": len(self._urls)}, sort_keys=True),
        )


def _unreachable(url: str, path: str, reply: Reply, *, keyed: bool) -> ServerError:
    where = f"the endpoint {url}"
    if reply.status in (401, 403):
        said = "refuses the key" if keyed else "wants a key"
        return ServerError(
            f"{where} {said} (HTTP {reply.status} for {path})",
            hint="name the environment variable that holds the key with the model's `api_key_env`",
            state="unreachable",
        )
    if reply.status:
        what = f"HTTP {reply.status}" if not reply.ok else "no list of models"
        return ServerError(
            f"{where} answers {path} with {what}: {reply.text[:200].strip()!r}",
            hint="is it the base URL of an OpenAI-compatible server (without /v1)? For one that lists no models, "
            "set server: {type: endpoint, health: /path}",
            state="unreachable",
        )
    if reply.refused:
        hint = "nobody listens there: start the server, or correct host and port in the model's `path`"
    else:
        hint = "check the host name, the network and any proxy (curl the URL from this machine)"
    return ServerError(f"{where} cannot be reached: {reply.error}", hint=hint, state="unreachable")
