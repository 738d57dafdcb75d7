"""Inside a real container: charliecloud, with an image that borrows this machine's /usr."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proctor.config.spec import CommandServer
from proctor.config.spec import LmEvalModelEngine as LmEvalSpec
from proctor.infer.engine import PhysicalRequest
from proctor.infer.lm_eval_model import LmEvalModelEngine
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.interpreters import PACKAGE
from proctor.processes.container import Bind, Container
from proctor.records import Kind, Request, Response
from proctor.testing import write_byte_tokenizer

PYTHON = "/usr/bin/python3"
WHERE = "import os, sys; print(sys.version_info[:2] >= (3, 11), os.path.exists({inside!r}))"


@pytest.fixture
def container(tmp_path: Path, mini_script: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    """Skips where there is no charliecloud, no user namespace or no new enough Python below /usr."""
    if shutil.which("ch-run") is None:
        pytest.skip("charliecloud (ch-run) is not installed")
    image = tmp_path / "image"
    for name in ("usr", "dev", "proc", "sys", "tmp", "etc", "home"):
        (image / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (image / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (image / "etc" / name).touch()
    (image / "only-in-the-image").touch()
    sources = (mini_script.parent, PACKAGE, own_cache, tmp_path)
    for path in sources:
        # What is bound must exist in the image; ch-run gives it this machine's /tmp.
        if not path.is_relative_to("/tmp"):
            (image / path.relative_to("/")).mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("USER", "root")
    binds = tuple(Bind(source=str(p), target=str(p)) for p in (Path("/usr"), mini_script.parent))
    looks = ["ch-run", "--bind", "/usr:/usr", str(image), "--", PYTHON, "-c"]
    done = subprocess.run(
        [*looks, WHERE.format(inside="/only-in-the-image")], capture_output=True, text=True, check=False
    )
    if done.stdout.split() != ["True", "True"]:
        pytest.skip(f"no charliecloud container can be run here: {done.stdout}{done.stderr.strip()}")
    return Container(type="charliecloud", image=str(image), binds=binds)


async def test_a_server_inside(container: Container, mini_script: Path, paths: ServerPaths, tmp_path: Path) -> None:
    words = ("--port", "{port}", "--name", "{name}", "--model", "{model}", "--key-file", "{api_key_file}")
    inside = 'test -e /only-in-the-image && exec "$@"'
    spec = CommandServer(argv=("/bin/sh", "-c", inside, "sh", PYTHON, str(mini_script), *words))
    model = tmp_path / "a model"
    model.mkdir()
    server = build_server(spec, ServedModel(path=str(model), name="m"), paths=paths, container=container)
    async with server:
        assert server.backends[0].served_model == "m"


async def test_a_model_class_of_lm_eval_inside(container: Container, tmp_path: Path) -> None:
    api = Path(container.image) / "site" / "lm_eval" / "api"
    api.mkdir(parents=True)
    for path in (api.parent / "__init__.py", api / "__init__.py"):
        path.touch()
    model = """
        class Model:
            @classmethod
            def create_from_arg_obj(cls, arguments, common): return cls()
            def loglikelihood_rolling(self, requests): return [-float(len(r.args[0])) for r in requests]
        def get_model(name): return Model
    """
    instance = """
        class Instance:
            def __init__(self, *, request_type, doc, arguments, idx): self.args = arguments
    """
    (api / "registry.py").write_text(textwrap.dedent(model))
    (api / "instance.py").write_text(textwrap.dedent(instance))
    # This machine's own may have none, and lm-eval's environment has one.
    (api.parent.parent / "numpy.py").write_text("class random:\n    seed = staticmethod(lambda number: None)\n")
    python = Path(container.image) / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:/site" exec {PYTHON} "$@"\n')
    python.chmod(0o755)
    directory = write_byte_tokenizer(tmp_path / "model")
    spec = LmEvalSpec(model="stand-in", python="/python")
    engine = LmEvalModelEngine(spec, path=str(directory), log=tmp_path / "host.log", container=container)
    (physical,) = await engine.resolve([Request(kind=Kind.ROLLING, text="four")])
    assert isinstance(physical, PhysicalRequest)

    async def feed() -> AsyncIterator[PhysicalRequest]:
        yield physical

    async with engine:
        (answer,) = [answer async for answer in engine.run(feed())]
    assert isinstance(answer, Response)
    assert answer.logprob == -4.0
