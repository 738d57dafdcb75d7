"""The clock inside a measured server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest
from bench import gpu, random_model
from bench.server_clock import PATH, ServerClock

TOOK_S = 0.05


async def slow(scope, receive, send) -> None:
    if scope["path"] == "/v1/completions":
        await asyncio.sleep(TOOK_S)
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(app: ServerClock, path: str) -> dict:
    sent = []

    async def send(message) -> None:
        sent.append(message)

    await app({"type": "http", "path": path}, None, send)  # type: ignore[arg-type]
    return json.loads(sent[-1]["body"]) if path == PATH else {}


async def test_it_counts_from_the_first_request_to_the_last_answer_and_begins_anew() -> None:
    app = ServerClock(slow)
    await ask(app, "/health")
    await asyncio.gather(ask(app, "/v1/completions"), ask(app, "/v1/completions"))
    await ask(app, "/v1/completions")
    await asyncio.sleep(5 * TOOK_S)  # idle at the end: counts for nothing
    found = await ask(app, PATH)
    assert found["requests"] == 3
    assert 2 * TOOK_S <= found["seconds"] < 5 * TOOK_S
    assert await ask(app, PATH) == {"requests": 0, "seconds": 0.0}
    await ask(app, "/v1/completions")
    assert (await ask(app, PATH))["requests"] == 1


def test_servers_import_it_with_the_standard_library_alone() -> None:
    code = "import sys, bench.server_clock; print([m for m in ('aiohttp', 'proctor', 'orjson') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("shape", "billions"), [("0.5b", 0.49), ("1.5b", 1.54), ("3b", 3.09), ("8b", 8.03)])
def test_shapes_are_those_of_known_models(shape: str, billions: float) -> None:
    """With their own vocabularies, and Llama's head untied, they would have as many parameters as those do."""
    one = random_model.SHAPES[shape]
    vocabulary, heads = (128_256, 2) if shape == "8b" else (151_936, 1)
    count = (heads - 1) * vocabulary * one.hidden
    for file in random_model.tensors(one, vocabulary):
        for size in file.values():
            number = 1
            for n in size:
                number *= n
            count += number
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_what_is_not_said_comes_from_the_device() -> None:
    options, device = gpu.parse(["--device", "cpu"])
    assert (options.shape, options.documents, options.in_flight) == ("tiny", device.documents, [32])
    options, device = gpu.parse(["--shape", "8b", "--in-flight", "7"])
    assert (options.shape, options.in_flight, device.gpus) == ("8b", [7], 1)
