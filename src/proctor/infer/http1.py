"""HTTP/1.1 for small JSON questions by the thousand: kept connections, whole bodies, nothing else.

Parsed by httptools (llhttp). A general client spends several times the CPU on a request that this one does
(`design/http-client.md`). No redirects, no cookies, no proxies, no compression asked for. Plain or TLS.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import ipaddress
import re
import ssl
import zlib
from typing import Final, cast
from urllib.parse import quote, unquote, urlsplit

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserUpgrade,
    HttpResponseParser,
)

IDLE_S: Final = 3.0
"""A connection unused for so long is not used again: servers close theirs after five seconds or more."""
HEAD_LIMIT: Final = 256 * 1024
"""Bytes of all headers together."""
READ_BYTES: Final = 256 * 1024
_GZIP: Final = 32 + zlib.MAX_WBITS
_ERRNO: Final = re.compile(r"\[Errno (\d+)\]")


class Cut(ConnectionError):
    """The connection ended before the answer did."""


class NoHttp(Exception):
    """What came is no HTTP/1.x answer."""


class ConnectTimeout(TimeoutError):
    """No connection within the time for it."""


def refused(error: BaseException) -> bool:
    """Whether nobody listens there, at none of the host's addresses."""
    if isinstance(error, ConnectionRefusedError):
        return True
    # Several addresses: one error that quotes all.
    codes = _ERRNO.findall(str(error)) if isinstance(error, OSError) else []
    return bool(codes) and all(int(code) == errno.ECONNREFUSED for code in codes)


class HttpAnswer:
    """A status, headers and a whole body."""

    __slots__ = ("_headers", "body", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.body = body
        self._headers = headers

    def header(self, name: str) -> str | None:
        """The first header of that (lower-case) name."""
        value = self._headers.get(name)
        return None if value is None else value.strip()


class Origin:
    """One server's base URL and the connections to it.

    ValueError for a URL that is not http(s)://host..., or a key that no header can carry.
    """

    def __init__(self, url: str, *, api_key: str | None = None, connect_s: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not a URL of a server: {url!r}")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._named = self._host != "localhost" and not _is_address(self._host)
        self._port = parts.port or (443 if self._tls else 80)
        self._connect_s = connect_s
        self._prefix = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
        self._fields = _fields(self._host_field(parts.port), _authorization(api_key, parts.username, parts.password))
        self._heads: dict[str, bytes] = {}
        self._free: list[_Connection] = []
        self._busy: set[_Connection] = set()
        # A fresh buffer for each read, as asyncio's streams have it, costs more CPU than all the rest.
        self._buffer = memoryview(bytearray(READ_BYTES))

    async def post(self, path: str, body: bytes) -> HttpAnswer:
        """The answer to a POST of JSON. Raises OSError (Cut, ConnectTimeout among them) or NoHttp."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._head("POST", path) + b"Content-Type: application/json\r\nContent-Length: "
        return await self._ask(b"%b%d\r\n\r\n%b" % (head, len(body), body))

    async def get(self, path: str, timeout_s: float) -> HttpAnswer:
        """The answer to a GET. Raises as `post`, and TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await self._ask(self._head("GET", path) + b"\r\n")

    def close(self) -> None:
        """End every connection at once."""
        for connection in (*self._free, *self._busy):
            connection.abort()
        self._free.clear()

    async def _ask(self, message: bytes) -> HttpAnswer:
        connection = self._kept() or await self._connect()
        answer = self._loop.create_future()
        connection.send(message, answer)
        self._busy.add(connection)
        try:
            found = await answer
        except BaseException:
            connection.abort()
            raise
        finally:
            self._busy.discard(connection)
        if connection.keeps:
            connection.since = self._loop.time()
            self._free.append(connection)
        else:
            connection.abort()
        return found

    def _kept(self) -> _Connection | None:
        while self._free:
            connection = self._free.pop()
            if not connection.lost and self._loop.time() - connection.since < IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await self._opened()
        except TimeoutError as error:
            raise ConnectTimeout(f"no connection within {self._connect_s:g} s") from error
        return connection

    async def _opened(self) -> tuple[asyncio.BaseTransport, _Connection]:
        def protocol() -> _Connection:
            return _Connection(self._buffer)

        loop = self._loop
        if self._named and isinstance(loop, asyncio.BaseEventLoop):
            return await loop.create_connection(
                protocol, self._host, self._port, ssl=self._tls, happy_eyeballs_delay=0.25
            )
        # One address needs no race, which costs two tasks; uvloop does not know it.
        return await loop.create_connection(protocol, self._host, self._port, ssl=self._tls)

    def _head(self, method: str, path: str) -> bytes:
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n".encode("ascii") + self._fields

    def _host_field(self, port: int | None) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host.encode("idna").decode("ascii")
        return host if port is None else f"{host}:{port}"


class _Connection(asyncio.BufferedProtocol):
    """One connection: one question at a time. The answer is parsed by llhttp, which calls the methods `on_...`."""

    __slots__ = (
        "_answer",
        "_body",
        "_buffer",
        "_headers",
        "_heads",
        "_open",
        "_parser",
        "_status",
        "_transport",
        "keeps",
        "lost",
        "since",
    )

    def __init__(self, buffer: memoryview) -> None:
        """`buffer` is read into and emptied at once: connections of one loop may share it."""
        self.keeps = False
        """Whether it may be used again, after an answer."""
        self.lost = False
        self.since = 0.0
        self._buffer = buffer
        self._transport = cast("asyncio.Transport", None)
        self._answer: asyncio.Future[HttpAnswer] | None = None
        self._parser = HttpResponseParser(self)
        self._status = 0
        self._headers: dict[str, str] = {}
        self._heads = 0
        self._body: list[bytes] = []
        self._open = False

    def send(self, message: bytes, answer: asyncio.Future[HttpAnswer]) -> None:
        self._answer = answer
        self.keeps = False
        if self.lost:
            answer.set_exception(Cut("the server closed the connection"))
        else:
            self._transport.write(message)

    def abort(self) -> None:
        self._answer = None
        if not self.lost:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self.keeps = True, False
        if self._answer is None or self._answer.done():
            return
        if self._open and exc is None:
            # Without a length the body ends where the connection does.
            self._finish()
            self.keeps = False
            return
        what = "before the answer's end" if self._heads else "without an answer"
        self._answer.set_exception(Cut(f"the server cut the connection {what}" + (f": {exc}" if exc else "")))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._answer is None or self._answer.done():
            # Nobody asked: a time-out, or a server that talks on its own.
            self._transport.abort()
            return
        answer = self._answer
        try:
            self._parser.feed_data(self._buffer[:nbytes])
        except (HttpParserError, HttpParserUpgrade, zlib.error, NoHttp) as error:
            self.keeps = False
            self._transport.abort()
            # What follows a whole answer spoils the connection, not the answer.
            if not answer.done():
                said = error.__cause__ or error.__context__ if isinstance(error, HttpParserCallbackError) else error
                answer.set_exception(said if isinstance(said, NoHttp) else NoHttp(f"a malformed answer: {said}"))

    def on_message_begin(self) -> None:
        """An answer begins; nobody asked for a second one."""
        self._headers, self._body, self._heads, self._open = {}, [], 1, False
        if self._answer is None or self._answer.done():
            self.keeps = False
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._heads += len(name) + len(value)
        if self._heads > HEAD_LIMIT:
            raise NoHttp("headers without an end")
        self._headers.setdefault(name.lower().decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        headers = self._headers
        coding = headers.get("transfer-encoding", "").strip().lower()
        if coding not in ("", "chunked"):
            raise NoHttp(f"an answer in transfer-encoding {coding!r}, which was not asked for")
        self._open = not coding and "content-length" not in headers and self._status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._status >= 200:
            self._finish()

    def _finish(self) -> None:
        answer = self._answer
        if answer is None or answer.done():
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        coding = self._headers.get("content-encoding", "").strip().lower()
        if coding in ("gzip", "x-gzip", "deflate"):
            body = zlib.decompress(body, _GZIP)
        elif coding not in ("", "identity"):
            raise NoHttp(f"an answer in content-encoding {coding!r}, which was not asked for")
        self.keeps = not self.lost and self._parser.should_keep_alive()
        self._answer = None
        answer.set_result(HttpAnswer(self._status, self._headers, body))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _authorization(api_key: str | None, user: str | None, password: str | None) -> str | None:
    if api_key:
        return f"Bearer {api_key}"
    if user is not None:
        pair = f"{unquote(user)}:{unquote(password or '')}"
        return "Basic " + base64.b64encode(pair.encode("utf-8")).decode("ascii")
    return None


def _fields(host: str, authorization: str | None) -> bytes:
    lines = [f"Host: {host}", "Accept: */*", "Accept-Encoding: identity", "User-Agent: proctor"]
    if authorization is not None:
        if "\r" in authorization or "\n" in authorization:
            raise ValueError("an API key has no line breaks")
        lines.append(f"Authorization: {authorization}")
    return "".join(f"{line}\r\n" for line in lines).encode("utf-8")
