"""The shipped fake: the same answers everywhere, and a journal that survives kill -9."""

from __future__ import annotations

import asyncio
import math
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proctor.infer.client import Client, Reply
from proctor.testing import FakeServer, Latency, ServerOptions, prompt_digest
from proctor.testing.openai_server import drawn
from proctor.testing.server import parse


async def post(client: Client, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    reply = await client.post(path, body)
    assert isinstance(reply, Reply), reply
    return reply.value


async def test_instances_agree_and_other_weights_differ() -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "Hello", "max_tokens": 20, "temperature": 0},
        {"prompt": "Hello", "max_tokens": 20, "temperature": 0.8, "seed": 5},
        {"prompt": list(b"Hello"), "max_tokens": 2, "echo": True, "logprobs": 1, "temperature": 0},
    ]
    async with FakeServer() as one, FakeServer() as two, FakeServer(ServerOptions(weights="other")) as three:
        answers = []
        for server in (one, two, three):
            async with Client(lambda s=server: [s.backend]) as client:
                answers.append([(await post(client, body))["choices"] for body in bodies])
    assert answers[0] == answers[1]
    assert all(a != b for a, b in zip(answers[0], answers[2], strict=True))


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.1}, {"max_tokens": 3}]
)
async def test_what_is_sampled_or_penalised_is_answered_otherwise(change: dict[str, float]) -> None:
    body = {"prompt": "Hello there", "max_tokens": 30, "temperature": 0}
    async with FakeServer() as server, Client(lambda: [server.backend]) as client:
        assert (await post(client, body))["choices"] != (await post(client, body | change))["choices"]


async def test_defaults_of_the_server_act_only_on_fields_that_are_not_sent() -> None:
    body = {"prompt": "Hello there", "max_tokens": 30, "temperature": 0}
    options = ServerOptions(defaults={"repetition_penalty": 1.3})
    async with FakeServer() as plain, FakeServer(options) as opinionated:
        async with Client(lambda: [plain.backend]) as client:
            expected = (await post(client, body))["choices"]
        async with Client(lambda: [opinionated.backend]) as client:
            assert (await post(client, body))["choices"] != expected
            assert (await post(client, body | {"repetition_penalty": 1.0}))["choices"] == expected


def test_latencies_by_prompt_are_log_normal() -> None:
    logs = sorted(math.log(drawn(prompt_digest(f"prompt {i}"), 0.7)) for i in range(4000))
    assert statistics.mean(logs) == pytest.approx(0, abs=0.05)
    assert statistics.stdev(logs) == pytest.approx(0.7, rel=0.05)


async def test_a_prompt_takes_as_long_wherever_and_whenever_it_is_asked() -> None:
    slow = next(p for p in map(str, range(10_000)) if drawn(prompt_digest(p), 1.0) > 20)
    options = ServerOptions(latency=Latency(lognormal_s=0.01, sigma=1.0, by_prompt=True))
    for _ in range(2):
        async with FakeServer(options) as server, Client(lambda s=server: [s.backend]) as client:
            for _ in range(2):
                began = time.monotonic()
                await post(client, {"prompt": slow, "max_tokens": 1})
                assert time.monotonic() - began > 0.2


async def test_the_routes_beside_completions() -> None:
    async with FakeServer() as server, aiohttp.ClientSession(server.url) as session:
        for path, part in [
            ("/health", ""),
            ("/v1/models", '"default"'),
            ("/metrics", "fake_requests_total"),
            ("/version", "version"),
            ("/__stats", '"requests":0'),
        ]:
            async with session.get(path) as response:
                assert response.status == 200
                assert part in await response.text()
        async with session.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}) as response:
            assert (await response.json())["tokens"] == [97, 98]
        async with session.get("/nowhere") as response:
            assert response.status == 404


async def test_chat_and_lists_are_answered_in_order() -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "temperature": 0}
    same = {"prompt": "[user]Hi\n[assistant]", "max_tokens": 9, "temperature": 0}
    many = {"prompt": ["a", "b", "c"], "max_tokens": 9, "temperature": 0}
    async with FakeServer() as server, Client(lambda: [server.backend]) as client:
        rendered = (await post(client, chat, "/v1/chat/completions"))["choices"][0]["message"]["content"]
        assert rendered == (await post(client, same))["choices"][0]["text"]
        together = [c["text"] for c in (await post(client, many))["choices"]]
        alone = [(await post(client, many | {"prompt": p}))["choices"][0]["text"] for p in "abc"]
    assert together == alone


def test_the_command_line_reaches_every_option() -> None:
    line = "--port 7 --echo shifted --native --no-echo-zero --die-after 3 --rate-limited 0.5 --fixed-s 0.25 --weights w"
    options, parsed = parse([*line.split(), "--defaults", '{"top_p": 0.5}'])
    assert parsed.port == 7
    assert (options.echo, options.native, options.echo_zero, options.die_after) == ("shifted", True, False, 3)
    assert (options.faults.rate_limited, options.latency, options.weights) == (0.5, Latency(fixed_s=0.25), "w")
    assert options.defaults == {"top_p": 0.5}
    assert parse([])[0] == ServerOptions()


@pytest.mark.parametrize("end", ["killed", "dies"])
async def test_the_journal_tells_what_was_asked_before_the_process_ended(tmp_path: Path, end: str) -> None:
    journal, port_file = tmp_path / "journal", tmp_path / "port"
    arguments = ["--journal", str(journal), "--port-file", str(port_file), "--die-after", "4"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proctor.testing.server", *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().removeprefix("listening on ").strip()
    assert url.endswith(":" + port_file.read_text())
    async with aiohttp.ClientSession(url) as session:
        for prompt in ("a", "b", "a", [1, 2]):
            async with session.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}) as response:
                assert response.status == 200
        if end == "dies":
            with pytest.raises(aiohttp.ClientError):
                await session.post("/v1/completions", json={"prompt": "c", "max_tokens": 1})
    if end == "killed":
        process.send_signal(signal.SIGKILL)
    assert await process.wait() == (1 if end == "dies" else -signal.SIGKILL)
    lines = [line.split() for line in journal.read_text().splitlines()]
    assert [line[0] for line in lines] == [prompt_digest(p) for p in ("a", "b", "a", [1, 2])]
    assert {line[1] for line in lines} == {"/v1/completions"}
    assert {line[2] for line in lines} == {"answered"}
