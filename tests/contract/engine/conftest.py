"""Every engine that the one suite runs on."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proctor.catalog.embedded import locate
from proctor.config.spec import LlamaCppServer
from proctor.config.spec import OpenAIEngine as Spec
from proctor.infer.engine import Engine
from proctor.infer.fake import FakeEngine
from proctor.infer.openai import OpenAIEngine
from proctor.infer.resolve import SERVER, TokenizerSource
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.records import EngineInfo
from proctor.testing import FakeServer, ServerOptions, write_byte_tokenizer

ENGINES = ["fake", "openai-ids", "openai-lists", "openai-text", "openai-two-servers", "openai-forced"]
REAL = pytest.param("llama.cpp", marks=[pytest.mark.slow, pytest.mark.xdist_group("llama.cpp")])


def over_http(servers: list[FakeServer], tokenizer: TokenizerSource, spec: Spec, name: str = "fake") -> OpenAIEngine:
    return OpenAIEngine(
        spec,
        backends=lambda: tuple(s.backend for s in servers),
        info=lambda: EngineInfo(engine=name, version="1"),
        tokenizer=tokenizer,
    )


@pytest.fixture(params=[*ENGINES, REAL])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    kind = str(request.param)
    if kind == "fake":
        async with FakeEngine() as fake:
            yield fake
        return
    if kind == "llama.cpp":
        async for real in llama_cpp(tmp_path):
            yield real
        return
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer")
    options = ServerOptions(native=kind == "openai-forced")
    async with FakeServer(options) as one, FakeServer(options) as two:
        servers = [one, two] if kind == "openai-two-servers" else [one]
        source: TokenizerSource = {"openai-text": None, "openai-forced": SERVER}.get(kind, tokenizer)
        spec = Spec(batch_size=4 if kind == "openai-lists" else 1)
        name = "llama.cpp" if kind == "openai-forced" else "fake"
        async with over_http(servers, source, spec, name) as http:
            yield http


async def llama_cpp(tmp_path: Path) -> AsyncIterator[Engine]:
    model = os.environ.get("PROCTOR_TEST_GGUF") or locate("smollm2-135m")
    if model is None:
        pytest.skip("no GGUF file: neither PROCTOR_TEST_GGUF nor the embedded model is there")
    pytest.importorskip("xllamacpp")
    paths = ServerPaths(logs=tmp_path, scratch=tmp_path)
    server = build_server(LlamaCppServer(slots=2), ServedModel(path=str(model)), paths=paths)
    async with server:
        engine = OpenAIEngine(
            Spec(max_gen_toks=16),
            backends=lambda: server.backends,
            info=lambda: server.info,
            tokenizer=SERVER,
        )
        async with engine:
            yield engine


@pytest.fixture
def arguments() -> str:
    """Greedy, twelve tokens at most."""
    return json.dumps({"until": ["\n\n"], "max_gen_toks": 12})
