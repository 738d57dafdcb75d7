"""Endpoints behind an HTTP proxy: whom the environment sends through one, and what then goes there."""

from __future__ import annotations

import asyncio
import base64
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from proctor.config.spec import EndpointServer
from proctor.errors import ServerError
from proctor.infer.client import Client, Reply
from proctor.infer.origin import Origin, proxy_of, told
from proctor.infer.server import Backend, ServedModel
from proctor.infer.servers.endpoint import Endpoint
from proctor.testing import FakeServer, ServerOptions

VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class ForwardProxy:
    """Sends whatever it is asked to one port of this machine, whatever host was named."""

    def __init__(self, target: int, *, password: str | None = None) -> None:
        self.heads: list[bytes] = []
        self._target = target
        self._password = password

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if self._password is not None and base64.b64encode(self._password.encode()) not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        if head.startswith(b"CONNECT "):
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            method, target, rest = head.split(b" ", 2)
            back.write(b" ".join((method, b"/" + target.split(b"/", 3)[3], rest)))
        await asyncio.gather(pumped(reader, back), pumped(there, writer))


async def pumped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def proxying(target: int, *, password: str | None = None) -> AsyncIterator[tuple[str, ForwardProxy]]:
    """Its host and port, and what it saw."""
    proxy = ForwardProxy(target, password=password)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await proxy.serve(reader, writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://models.example", None),
        ({"HTTP_PROXY": "http://p:3128"}, "http://models.example:8000/v1", "http://p:3128"),
        ({"http_proxy": "p:3128"}, "http://10.1.2.3:8000", "http://p:3128"),
        ({"HTTP_PROXY": "http://p:3128"}, "https://models.example", None),
        ({"HTTPS_PROXY": "http://u:s@p:3128"}, "https://models.example", "http://u:s@p:3128"),
        ({"HTTP_PROXY": "http://p:3128"}, "http://127.0.0.1:8000", None),
        ({"HTTP_PROXY": "http://p:3128"}, "http://[::1]:8000", None),
        ({"HTTP_PROXY": "http://p:3128"}, "http://localhost:8000", None),
        ({"HTTP_PROXY": "http://p:3128", "NO_PROXY": "other,.example"}, "http://models.example:8000", None),
        ({"HTTP_PROXY": "http://p:3128", "NO_PROXY": "models.example:8000"}, "http://models.example:8000", None),
        ({"HTTP_PROXY": "http://p:3128", "no_proxy": "*"}, "http://models.example:8000", None),
    ],
)
def test_whom_the_environment_sends_through_a_proxy(
    environment: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == proxy


async def test_first_look_and_questions_of_an_endpoint_go_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(served_model="m", api_key="secret")
    async with FakeServer(options) as server, proxying(int(server.url.rpartition(":")[2])) as (address, proxy):
        monkeypatch.setenv("HTTP_PROXY", f"http://me:p%40ss@{address}")
        model = ServedModel(path="http://models.example:8000/v1", name="m")
        async with Endpoint(EndpointServer(), model, api_key="secret") as endpoint:
            looked = len(proxy.heads)
            assert looked
            async with Client(lambda: endpoint.backends) as client:
                reply = await client.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert isinstance(reply, Reply)
    asked = proxy.heads[looked]
    assert asked.startswith(b"POST http://models.example:8000/v1/completions HTTP/1.1\r\n")
    assert b"\r\nHost: models.example:8000\r\n" in asked
    assert b"\r\nAuthorization: Bearer secret\r\n" in asked
    assert all(b"Proxy-Authorization: Basic " + base64.b64encode(b"me:p@ss") in head for head in proxy.heads)
    assert "p%40ss" not in repr(endpoint.backends)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_tls_goes_through_a_tunnel_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=models.example", "-newkey", "rsa:2048"]
    command += ["-addext", "subjectAltName=DNS:models.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n{}"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        async with (
            proxying(server.sockets[0].getsockname()[1], password="me:secret") as (address, proxy),
            aclosing(Origin("https://models.example", proxy=f"http://me:secret@{address}", api_key="key")) as origin,
        ):
            for _ in range(3):
                assert (await origin.post("/v1/completions", b"{}")).body == b"{}"
            await origin.aclose()
    (head,) = proxy.heads
    assert head.startswith(b"CONNECT models.example:443 HTTP/1.1\r\n")
    assert b"Bearer" not in head


async def test_a_proxy_that_refuses_us_is_a_fault_that_does_not_tell_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with proxying(9, password="me:right") as (address, _):
        for scheme in ("http", "https"):
            proxy = f"http://me:wrong@{address}"
            async with aclosing(Origin(f"{scheme}://models.example", proxy=proxy)) as origin:
                if scheme == "http":
                    assert (await origin.post("/v1/completions", b"{}")).status == 407
                    continue
                with pytest.raises(aiohttp.ClientError) as caught:
                    await origin.post("/v1/completions", b"{}")
                assert told(caught.value) == "the proxy answers HTTP 407 (Proxy Authentication Required)"

        monkeypatch.setenv("HTTPS_PROXY", f"http://me:wrong@{address}")
        with pytest.raises(ServerError, match="the proxy answers HTTP 407") as refused:
            async with Endpoint(EndpointServer(), ServedModel(path="https://models.example", name="m")):
                pass
        assert "wrong" not in str(refused.value)


@pytest.mark.parametrize("proxy", ["socks5://p:1080", "http://", "p:3128"])
async def test_a_proxy_that_is_none(proxy: str) -> None:
    with pytest.raises(ValueError, match="HTTP proxy"):
        Origin("http://models.example", proxy=proxy)


def test_a_backend_is_asked_directly_unless_it_says_otherwise() -> None:
    assert Backend(url="http://node7:8000").proxy is None
