"""The byte tokenizer, and an engine against a fake server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from proctor.config.spec import OpenAIEngine as Spec
from proctor.infer.client import Retries
from proctor.infer.openai import OpenAIEngine
from proctor.infer.server import Backend
from proctor.records import EngineInfo
from proctor.testing import write_byte_tokenizer

Connect = Callable[..., AbstractAsyncContextManager[OpenAIEngine]]

QUICK = Retries(attempts=8, base_s=0.002, cap_s=0.02, unreachable_s=0.6)


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> Path:
    return write_byte_tokenizer(tmp_path / "byte tokenizer")


@pytest.fixture
def connect(byte_tokenizer: Path) -> Connect:
    """An engine with quick retries: connect(backends, spec fields...)."""

    @asynccontextmanager
    async def connect(
        backends: Callable[[], Sequence[Backend]],
        *,
        retries: Retries = QUICK,
        local: bool = True,
        company: bool = False,
        **spec: object,
    ) -> AsyncIterator[OpenAIEngine]:
        engine = OpenAIEngine(
            Spec(**spec),  # type: ignore[arg-type]
            backends=backends,
            info=lambda: EngineInfo(engine="fake", version="1"),
            tokenizer=byte_tokenizer if local else None,
            retries=retries,
            company=company,
        )
        async with engine:
            yield engine

    return connect
