"""The HTTP client against servers that answer in every form the protocol allows, and in some that it does not."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from proctor.infer import origin as origins
from proctor.infer.origin import HttpAnswer, Origin, refused, told

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\nContent-Type: application/json\r\n\r\n{"a": 1}'
SMALL = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n5;x=y\r\n": 1}\r\n0\r\nX-Late: 1\r\n\r\n'
ZIPPED = gzip.compress(b'{"a": 1}')


class Script:
    """Answers each question with the next of its answers, in pieces of `step` bytes; None: closes the connection."""

    def __init__(self, answers: Sequence[bytes | None], step: int = 1 << 20, *, closes: bool = False) -> None:
        self.asked: list[bytes] = []
        self.connections = 0
        self._answers = iter(answers)
        self._step = step
        self._closes = closes
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
                self.asked.append(head + await reader.readexactly(int(length or 0)))
                answer = next(self._answers)
                if answer is None:
                    break
                for start in range(0, len(answer), self._step):
                    writer.write(answer[start : start + self._step])
                    await writer.drain()
                    if self._step < 100:
                        await asyncio.sleep(0)
                if self._closes:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port; at the end every connection is closed, on both sides."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*tasks)


@asynccontextmanager
async def scripted(
    *answers: bytes | None, step: int = 1 << 20, closes: bool = False
) -> AsyncIterator[tuple[Origin, Script]]:
    script = Script(answers, step, closes=closes)
    async with listening(script.serve) as script.port:
        async with aclosing(Origin(f"http://127.0.0.1:{script.port}/base/", api_key="secret")) as origin:
            yield origin, script


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "answer",
    [
        OK,
        CHUNKED,
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(ZIPPED), ZIPPED),
        b"HTTP/1.1 200\r\nContent-Length: 8\r\n\r\n" + b'{"a": 1}',
    ],
    ids=["length", "chunks", "continue", "gzip", "no reason"],
)
async def test_the_forms_of_a_whole_answer(answer: bytes, step: int) -> None:
    async with scripted(answer, answer, step=step) as (origin, script):
        for _ in range(2):
            found = await origin.post("/v1/completions", b"{}")
            assert (found.status, found.body) == (200, b'{"a": 1}')
    assert script.connections == 1


async def test_what_is_sent() -> None:
    async with scripted(OK, OK) as (origin, script):
        await origin.post("/v1/completions", b'{"prompt": "x"}')
        await origin.get("/health", 5.0)
    post, get = script.asked
    lines = post.split(b"\r\n")
    assert lines[0] == b"POST /base/v1/completions HTTP/1.1"
    assert f"Host: 127.0.0.1:{script.port}".encode() in lines
    assert b"Authorization: Bearer secret" in lines
    assert b"Accept-Encoding: identity" in lines
    assert b"Content-Length: 15" in lines
    assert lines[-2:] == [b"", b'{"prompt": "x"}']
    assert get.startswith(b"GET /base/health HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "answer", [b'HTTP/1.1 200 OK\r\n\r\n{"a": 1}', b'HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}']
)
async def test_a_body_that_ends_with_the_connection(answer: bytes) -> None:
    async with scripted(answer, answer, closes=True) as (origin, script):
        for _ in range(2):
            assert (await origin.post("/", b"")).body == b'{"a": 1}'
    assert script.connections == 2


async def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    async with scripted(closing, closing.replace(b": close", b":Close"), OK) as (origin, script):
        for _ in range(3):
            assert (await origin.post("/", b"")).body == b'{"a": 1}'
    assert script.connections == 3


async def test_an_old_connection_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origins, "IDLE_S", 0.01)
    async with scripted(OK, OK) as (origin, script):
        await origin.post("/", b"")
        await asyncio.sleep(0.02)
        await origin.post("/", b"")
    assert script.connections == 2


async def test_more_than_was_announced_is_not_taken_for_the_next_answer() -> None:
    async with scripted(SMALL + b"garbage", OK) as (origin, script):
        with pytest.raises(aiohttp.ClientError) as caught:
            await origin.post("/", b"")
        assert told(caught.value).startswith("ClientResponseError: 400, message=")
        assert "\n" not in told(caught.value)
        assert (await origin.post("/", b"")).body == b'{"a": 1}'
    assert script.connections == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, aiohttp.ServerDisconnectedError),
        (OK[:30], aiohttp.ServerDisconnectedError),
        (OK[:-3], aiohttp.ClientPayloadError),
        (CHUNKED[:60], aiohttp.ClientPayloadError),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", aiohttp.ClientError),
        (OK.replace(b"8", b"eight"), aiohttp.ClientError),
        (OK.replace(b"8", b"-8"), aiohttp.ClientError),
        (CHUNKED.replace(b"5;", b"4;"), aiohttp.ClientError),
        (CHUNKED.replace(b"5;", b"zz"), aiohttp.ClientError),
        (OK.replace(b"Content-Type", b"Content-Encoding: br\r\nX"), aiohttp.ClientError),
        (OK.replace(b"Content-Type", b"Content-Encoding: gzip\r\nX"), aiohttp.ClientError),
    ],
)
async def test_an_answer_that_is_none(answer: bytes | None, error: type[Exception]) -> None:
    async with scripted(answer, closes=True) as (origin, _):
        with pytest.raises(error):
            await origin.post("/", b"")


async def test_headers() -> None:
    limited = b"HTTP/1.1 429 Slow down\r\nRETRY-AFTER:  1.5 \r\nContent-Length: 0\r\n\r\n"
    async with scripted(limited) as (origin, _):
        found = await origin.post("/", b"")
    assert found.status == 429
    assert (found.headers.get("retry-after"), found.headers.get("location")) == ("1.5", None)


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for host in ("127.0.0.1", "localhost"):
            async with aclosing(Origin(f"http://{host}:{taken.getsockname()[1]}")) as origin:
                with pytest.raises(OSError) as caught:
                    await origin.post("/", b"")
            assert refused(caught.value), host
    assert not refused(ConnectionResetError("cut"))
    assert refused(OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] Connect call failed"))
    assert not refused(OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 113] No route"))


async def test_a_connection_that_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", never)
    async with aclosing(Origin("http://127.0.0.1:9", connect_s=0.05)) as origin:
        with pytest.raises(TimeoutError):
            await origin.post("/", b"")


async def test_an_abandoned_question_takes_its_connection_with_it() -> None:
    async with scripted(OK, OK) as (origin, script):
        asking = asyncio.create_task(origin.post("/", b""))
        while not script.asked:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await origin.post("/", b"")).body == b'{"a": 1}'
    assert script.connections == 2


async def test_many_at_once_share_no_connection_and_keep_their_answers() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0]))
                await asyncio.sleep(0.001 * (len(body) % 3))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    async with listening(echo) as port, aclosing(Origin(f"http://127.0.0.1:{port}")) as origin:
        bodies = [b"x" * (37 * n) for n in range(200)]
        ask: Callable[[bytes], asyncio.Task[HttpAnswer]] = lambda b: asyncio.create_task(origin.post("/", b))  # noqa: E731
        for _ in range(2):
            assert [(await task).body for task in [ask(b) for b in bodies]] == bodies


@pytest.mark.parametrize("url", ["ftp://host", "host:80", "http://", "http://host:port"])
async def test_no_url_of_a_server(url: str) -> None:
    with pytest.raises(ValueError):
        Origin(url)


async def test_a_key_that_no_header_can_carry() -> None:
    with pytest.raises(ValueError, match="line breaks"):
        Origin("http://h", api_key="a\r\nX: b")


async def test_a_name_and_password_in_the_url() -> None:
    async with scripted(OK) as (_, script):
        async with aclosing(Origin(f"http://me:p%40ss@127.0.0.1:{script.port}")) as origin:
            await origin.post("/", b"")
    assert b"Authorization: Basic bWU6cEBzcw==\r\n" in script.asked[0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_tls_and_a_certificate_that_nobody_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    options = ["-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", *options, "-newkey", "rsa:2048", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000
    script = Script([OK, large, CHUNKED])
    async with listening(script.serve, context) as port:
        async with aclosing(Origin(f"https://127.0.0.1:{port}")) as stranger:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await stranger.post("/", b"{}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with aclosing(Origin(f"https://127.0.0.1:{port}")) as origin:
            assert (await origin.post("/", b"{}")).body == b'{"a": 1}'
            assert len((await origin.post("/", b"x" * 300_000)).body) == 1_000_000
            assert (await origin.post("/", b"{}")).body == b'{"a": 1}'
            assert script.connections == 1
