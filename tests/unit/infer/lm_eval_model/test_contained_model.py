"""A model class of lm-eval inside a container, which here is a program that does what a container's would."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proctor.config.spec import LmEvalModelEngine as Spec
from proctor.errors import ConfigError
from proctor.infer.engine import PhysicalRequest
from proctor.infer.lm_eval_model import LmEvalModelEngine
from proctor.interpreters import PACKAGE
from proctor.processes.container import Bind, Container
from proctor.records import Kind, Request, Response
from proctor.testing import write_byte_tokenizer

CONTAINER = Container(type="charliecloud", image="/images/x y", binds=(Bind(source="/data", target="/in"),))
# What is inside an image, lm-eval above all, is found there and only there.
FAKE = """#!/bin/sh
printf '%s\\n' "$@" > {words}
while [ "$1" != -- ]; do shift; done
shift
PYTHONPATH="$PYTHONPATH:{site}" exec "$@"
"""
MODEL = """
    class Model:
        @classmethod
        def create_from_arg_obj(cls, arguments, common): return cls()
        def loglikelihood_rolling(self, requests): return [-float(len(r.args[0])) for r in requests]
    def get_model(name): return Model
"""
INSTANCE = """
    class Instance:
        def __init__(self, *, request_type, doc, arguments, idx): self.args = arguments
"""


@pytest.fixture
def words(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the container's program writes the words that it was given."""
    api, tools, words = tmp_path / "site" / "lm_eval" / "api", tmp_path / "tools", tmp_path / "words"
    api.mkdir(parents=True)
    for path in (api.parent / "__init__.py", api / "__init__.py"):
        path.touch()
    (api / "registry.py").write_text(textwrap.dedent(MODEL))
    (api / "instance.py").write_text(textwrap.dedent(INSTANCE))
    tools.mkdir()
    (tools / "ch-run").write_text(FAKE.format(words=shlex.quote(str(words)), site=tmp_path / "site"))
    (tools / "ch-run").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return words


async def test_the_class_is_the_images_and_the_sources_are_ours(tmp_path: Path, words: Path) -> None:
    model = write_byte_tokenizer(tmp_path / "model")
    spec = Spec(model="stand-in", python=sys.executable)
    engine = LmEvalModelEngine(spec, path=str(model), log=tmp_path / "host.log", container=CONTAINER)
    request = Request(kind=Kind.ROLLING, text="four")
    (physical,) = await engine.resolve([request])
    assert isinstance(physical, PhysicalRequest)

    async def feed() -> AsyncIterator[PhysicalRequest]:
        yield physical

    async with engine:
        (answer,) = [answer async for answer in engine.run(feed())]
    assert isinstance(answer, Response)
    assert answer.logprob == -4.0
    seen = words.read_text().splitlines()
    assert seen[:2] == ["--bind", "/data:/in"]
    assert f"{model}:{model}" in seen
    assert f"{PACKAGE}:{PACKAGE}" in seen
    assert seen[seen.index("--") - 1] == "/images/x y"


@pytest.mark.parametrize("kind", ["pyxis", "podman"])
def test_a_container_that_passes_on_no_pipes_is_refused(tmp_path: Path, kind: str) -> None:
    container = Container(type=kind, image="i")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"which {kind} does not pass on"):
        LmEvalModelEngine(Spec(), path=str(tmp_path), log=tmp_path / "log", container=container)
