"""A tokenizer of another model is noticed before anything is asked of the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proctor.errors import ModelError
from proctor.infer.dialect import Dialect
from proctor.infer.fake_model import encode
from proctor.infer.same_tokenizer import TEXT
from proctor.records import Kind, Request
from proctor.testing import FakeServer, ServerOptions

from .asking import respond
from .conftest import Connect

QUESTION = Request(kind=Kind.GENERATE, text="Q: 1 + 1 =", arguments='{"until": ["\\n"]}')


class Gateway(FakeServer):
    """Answers /tokenize as told."""

    def __init__(self, status: int, body: dict[str, object]) -> None:
        super().__init__()
        self.asked = 0
        self._says = status, body

    def _tokenize(self, body: dict[str, Any]) -> web.Response:
        self.asked += 1
        status, said = self._says
        return web.json_response(said, status=status)


def swap(directory: Path, one: str, other: str) -> None:
    """Let two letters of the vocabulary change places."""
    path = directory / "tokenizer.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = body["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(body), encoding="utf-8")


@pytest.mark.parametrize("native", [False, True], ids=["vllm", "llama.cpp"])
async def test_the_ids_of_another_vocabulary_are_not_sent(byte_tokenizer: Path, connect: Connect, native: bool) -> None:
    swap(byte_tokenizer, "i", "a")
    dialect = Dialect.LLAMA_CPP if native else Dialect.VLLM
    server = FakeServer(ServerOptions(native=native))
    async with server, connect(lambda: [server.backend], dialect=dialect.value) as engine:
        with pytest.raises(ModelError, match="is not that of the model which the server has") as caught:
            await respond(engine, [QUESTION])
        assert server.stats.requests == 0
    ids = encode(TEXT)
    assert "from number 6 on" in caught.value.message
    assert f"{ids[5:10]} there" in caught.value.message
    assert caught.value.hint is not None and "tokenizer:" in caught.value.hint


@pytest.mark.parametrize("native", [False, True], ids=["vllm", "llama.cpp"])
async def test_the_servers_own_tokenizer_is_used(connect: Connect, native: bool) -> None:
    dialect = Dialect.LLAMA_CPP if native else Dialect.VLLM
    server = FakeServer(ServerOptions(native=native))
    async with server, connect(lambda: [server.backend], dialect=dialect.value) as engine:
        assert (await respond(engine, [QUESTION]))[0].text is not None


async def test_a_server_that_does_not_tokenise_is_believed(byte_tokenizer: Path, connect: Connect) -> None:
    swap(byte_tokenizer, "i", "a")
    options = ServerOptions(tokenize=False)
    async with FakeServer(options) as server, connect(lambda: [server.backend]) as engine:
        assert len(await respond(engine, [QUESTION])) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, {}), (403, {}), (500, {}), (200, {"tokens": ["th", "e"]}), (200, {"ids": [1]}), (200, {"error": "no"})],
)
async def test_whatever_else_is_said_to_that_changes_nothing(
    connect: Connect, status: int, body: dict[str, object]
) -> None:
    """A gateway may answer anything to a path that it does not know, once, and is not thought ill of."""
    async with Gateway(status, body) as server, connect(lambda: [server.backend]) as engine:
        assert len(await respond(engine, [QUESTION])) == 1
        (load,) = engine.load().values()
    assert server.asked == 1
    assert "ejected" not in load.why
