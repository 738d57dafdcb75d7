"""A client process's view of the worker's server, over the link that they have."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import asdict
from typing import Any

import pytest

from proctor.errors import ServerError
from proctor.infer.server import Backend, Load
from proctor.processes.link import Link
from proctor.records import EngineInfo
from proctor.worker.client_process import TheirServer
from proctor.worker.clients import _both, _ensured, _where  # pyright: ignore[reportPrivateUsage]


class Mortal:
    """A server that has another port after each look at it, until it is beyond help."""

    def __init__(self, *, lives: int) -> None:
        self._lives = lives
        self._port = 1

    @property
    def backends(self) -> tuple[Backend, ...]:
        return (Backend(url=f"http://localhost:{self._port}", api_key="secret", served_model="m"),)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(engine="vllm", version=f"0.{self._port}")

    async def ensure(self) -> None:
        self._port += 1
        if self._port > self._lives:
            raise ServerError("it died 3 times", hint="look at its log")


async def served(link: Link, server: Any) -> None:
    """The worker's side."""
    while (message := await link.receive()) is not None:
        assert message == {"ensure": True}
        link.send(await _ensured(server))


async def test_it_is_where_the_worker_says_and_is_restarted_by_the_worker() -> None:
    one, other = socket.socketpair()
    ours, theirs = await Link.over(one), await Link.over(other)
    worker = Mortal(lives=4)
    answering = asyncio.create_task(served(ours, worker))
    server = TheirServer(theirs, _where(worker))  # type: ignore[arg-type]

    async def hear() -> None:
        while (message := await theirs.receive()) is not None:
            server.hear(message)

    hearing = asyncio.create_task(hear())
    assert server.backends == worker.backends and server.info == worker.info
    assert "secret" not in repr(server.backends)
    await asyncio.gather(server.ensure(), server.ensure())
    assert server.backends == worker.backends and server.backends[0].url.endswith(":3")
    await server.ensure()
    with pytest.raises(ServerError, match="it died 3 times") as caught:
        await server.ensure()
    assert caught.value.hint == "look at its log"
    assert server.info.version == "0.4", "what was known stays known"
    for link in (ours, theirs):
        link.close()
    await asyncio.gather(answering, hearing)


def test_what_two_have_with_one_server_is_added_and_what_it_says_is_not() -> None:
    one = Load(in_flight=3, answered=10, limit=8, why="throughput", waiting=2.0, hedged=1)
    other = Load(in_flight=4, answered=20, limit=9, why="the maximum", waiting=3.0)
    assert asdict(_both(one, other)) == asdict(
        Load(in_flight=7, answered=30, limit=17, why="throughput", waiting=2.0, hedged=1)
    )
