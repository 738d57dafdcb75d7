"""Asking a server about itself."""

from __future__ import annotations

import aiohttp
import pytest

from proctor.infer.servers import health
from proctor.infer.servers.health import Probe, Reply

SILENCE = Reply(status=0, error="no answer")
NONE = Reply(status=404, text="not found")
SOME = Reply(status=200, text='{"version": "1.2"}')


@pytest.mark.parametrize(
    ("replies", "version", "asked"),
    [([SOME], "1.2", 1), ([SILENCE, SOME], "1.2", 2), ([SILENCE, SILENCE, SOME], None, 2), ([NONE, SOME], None, 1)],
)
async def test_only_silence_is_asked_again(
    replies: list[Reply], version: str | None, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []

    async def get(_probe: Probe, path: str) -> Reply:
        paths.append(path)
        return replies[len(paths) - 1]

    monkeypatch.setattr(health, "_AGAIN_S", 0.0)
    monkeypatch.setattr(Probe, "get", get)
    async with aiohttp.ClientSession() as session:
        reply = await Probe(session, "http://127.0.0.1:9", None, timeout_s=1).learn("/version")
    assert reply.field("version") == version
    assert paths == ["/version"] * asked
