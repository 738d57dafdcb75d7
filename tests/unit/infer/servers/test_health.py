"""Asking a server about itself."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from proctor.infer.servers import health
from proctor.infer.servers.health import Probe

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\nConnection: close\r\n\r\n{"version": "1.2"}'


@pytest.mark.parametrize(("silent", "version"), [(2, "1.2"), (9, None)])
async def test_what_a_server_says_of_itself_is_asked_again(
    silent: int, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_AGAIN_S", 0.01)
    asked = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        if asked > 2 * silent:  # aiohttp may ask a GET twice by itself
            writer.write(ANSWER)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, aiohttp.ClientSession() as session:
        reply = await Probe(session, url, None, timeout_s=10).learn("/version")
    assert reply.field("version") == version


async def test_an_answer_without_what_was_asked_for_is_an_answer() -> None:
    asked = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, aiohttp.ClientSession() as session:
        reply = await Probe(session, url, None, timeout_s=10).learn("/version")
    assert (reply.status, reply.field("version"), asked) == (404, None, 1)
