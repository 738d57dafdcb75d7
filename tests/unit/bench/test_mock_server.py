"""The benchmarks' mock server answers as a server would: read by Proctor's own client, and byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from bench.load import hammer, request_body
from bench.mock_server import CHAT, COMPLETIONS, MODEL, TEXT, TOKEN_IDS, serve


@pytest.fixture
async def url() -> AsyncGenerator[str]:
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve("127.0.0.1", 0, 0.01, listening.set_result))
    yield await listening
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("ids", [True, False])
async def test_both_routes_answer_with_text_usage_and_the_ids_that_were_asked_for(
    url: str, path: str, ids: bool
) -> None:
    status, answer = await post(url + path, request_body(path, 1, ids=ids))
    (choice,) = answer["choices"]
    assert status == 200
    assert (choice["message"]["content"] if path == CHAT else choice["text"]) == TEXT
    assert choice["finish_reason"] == "stop"
    assert choice.get("token_ids") == (list(TOKEN_IDS) if ids else None)
    assert answer["usage"]["completion_tokens"] == len(TOKEN_IDS)


@pytest.mark.parametrize(
    ("prompt", "choices"), [("text", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1, 2], [3], [4]], 3), (["one"], 1)]
)
async def test_a_list_of_prompts_has_a_choice_for_each(url: str, prompt: object, choices: int) -> None:
    status, answer = await post(url + COMPLETIONS, {"model": MODEL, "prompt": prompt, "max_tokens": 4})
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices))


async def test_what_it_cannot_do_is_refused(url: str) -> None:
    assert (await post(url + CHAT, {"model": MODEL, "messages": [], "stream": True}))[0] == 400
    assert (await post(url + "/v1/embeddings", {}))[0] == 404


async def test_it_says_what_it_serves(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(url + "/v1/models") as response:
            assert [entry["id"] for entry in (await response.json())["data"]] == [MODEL]
        for path in ("/health", "/version"):
            async with session.get(url + path) as response:
                assert response.status == 200


async def test_requests_in_pieces_and_side_by_side_are_answered_in_order(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\ncontent-length: "
    one = (head + '16\r\n\r\n{"prompt": "aa"}').encode()
    two = (head + '22\r\n\r\n{"prompt": ["a","bc"]}').encode()
    whole = one + two
    for piece in (whole[:30], whole[30:80], whole[80:]):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.01)
    seen = b""
    while seen.count(b'"usage"') < 2:
        seen += await reader.read(65_536)
    first, second = seen.split(b"HTTP/1.1 ")[1:]
    assert (first.count(b'"index"'), second.count(b'"index"')) == (1, 2)
    writer.close()
    await writer.wait_closed()


async def test_the_load_generator_counts_what_the_server_counts(url: str) -> None:
    found = await hammer(url, CHAT, 40, 8)
    assert found["requests_per_s"] > 0
