"""HTTP/1.1 for small JSON questions by the thousand: kept connections, whole bodies, nothing else.

A general client spends four times the CPU on a request that this one does (`design/concurrency.md`). No redirects, no
cookies, no proxies, no compression asked for. Plain or TLS.
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

IDLE_S: Final = 3.0
"""A connection unused for so long is not used again: servers close theirs after five seconds or more."""
HEAD_LIMIT: Final = 256 * 1024
"""Bytes of a status line with its headers; and of one chunk's size line."""
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

    __slots__ = ("_head", "_lower", "body", "status")

    def __init__(self, status: int, head: bytes, lower: bytes, body: bytes) -> None:
        self.status = status
        self.body = body
        self._head = head
        self._lower = lower

    def header(self, name: str) -> str | None:
        """The first header of that (lower-case) name."""
        at = self._lower.find(b"\r\n" + name.encode("ascii") + b":")
        if at < 0:
            return None
        # Lower case changes no lengths.
        return _field(self._head[at:], self._head[at : at + len(name) + 3]).decode("latin-1")


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
    """One connection: one question at a time."""

    __slots__ = (
        "_answer",
        "_buffer",
        "_chunks",
        "_coded",
        "_head",
        "_held",
        "_missing",
        "_parts",
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
        self._coded = False
        self._transport = cast("asyncio.Transport", None)
        self._answer: asyncio.Future[HttpAnswer] | None = None
        self._held = b""
        self._head: tuple[int, bytes, bytes] | None = None
        self._parts: list[bytes] = []
        self._missing: int | None = 0
        self._chunks: _Chunks | None = None

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
        if self._head is not None and self._missing is None and self._chunks is None and exc is None:
            # Without a length the body ends where the connection does.
            self._finish(b"".join(self._parts))
            return
        what = "before the answer's end" if self._head or self._held else "without an answer"
        self._answer.set_exception(Cut(f"the server cut the connection {what}" + (f": {exc}" if exc else "")))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._answer is None or self._answer.done():
            # Nobody asked: a time-out, or a server that talks on its own.
            self._transport.abort()
            return
        data = bytes(self._buffer[:nbytes])
        try:
            if self._head is None:
                data = self._open(self._held + data if self._held else data)
                if self._head is None:
                    return
            self._read(data)
        except (ValueError, zlib.error, NoHttp) as error:
            self._answer.set_exception(error if isinstance(error, NoHttp) else NoHttp(f"a malformed answer: {error}"))
            self._transport.abort()

    def _open(self, data: bytes) -> bytes:
        """Read the headers, if they are whole; what follows them."""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > HEAD_LIMIT:
                    raise NoHttp("headers without an end")
                self._held = data
                return b""
            head = data[:end]
            data = data[end + 4 :]
            if head[:7] != b"HTTP/1." or not head[9:12].isdigit():
                raise NoHttp(f"not an HTTP/1 answer: {head[:80]!r}")
            status = int(head[9:12])
            if status >= 200:
                break
        lower = head.lower()
        self._held = b""
        self._head = (status, head, lower)
        self._coded = b"\r\ncontent-encoding:" in lower
        kept = _field(lower, b"\r\nconnection:")
        self.keeps = b"close" not in kept and (lower[7:8] == b"1" or b"keep-alive" in kept)
        coding, length = _field(lower, b"\r\ntransfer-encoding:"), _field(lower, b"\r\ncontent-length:")
        if coding:
            if coding != b"chunked":
                raise NoHttp(f"an answer in transfer-encoding {coding!r}, which was not asked for")
            self._missing, self._chunks = None, _Chunks()
        elif length:
            if not length.isdigit():
                raise NoHttp(f"a length of {length!r}")
            self._missing = int(length)
        elif status in (204, 304):
            self._missing = 0
        else:
            self._missing, self.keeps = None, False
        return data

    def _read(self, data: bytes) -> None:
        if self._chunks is not None:
            whole = self._chunks.feed(data)
            if whole is not None:
                self.keeps = self.keeps and not self._chunks.rest
                self._finish(whole)
            return
        if self._missing is None:
            self._parts.append(data)
            return
        missing = self._missing - len(data)
        if missing > 0:
            self._missing = missing
            self._parts.append(data)
            return
        if missing < 0:
            data, self.keeps = data[:missing], False
        if self._parts:
            self._parts.append(data)
            data = b"".join(self._parts)
        self._finish(data)

    def _finish(self, body: bytes) -> None:
        assert self._head is not None and self._answer is not None
        status, head, lower = self._head
        if self._coded:
            coding = _field(lower, b"\r\ncontent-encoding:")
            if coding in (b"gzip", b"x-gzip", b"deflate"):
                body = zlib.decompress(body, _GZIP)
            elif coding not in (b"", b"identity"):
                raise NoHttp(f"an answer in content-encoding {coding!r}, which was not asked for")
        answer, self._answer = self._answer, None
        self._head, self._chunks = None, None
        if self._parts:
            self._parts = []
        answer.set_result(HttpAnswer(status, head, lower, body))


class _Chunks:
    """A body in chunks (RFC 9112, 7.1)."""

    __slots__ = ("_left", "_parts", "_state", "rest")

    def __init__(self) -> None:
        self.rest = b""
        """Not read yet; after the end, what should not be there."""
        self._parts: list[bytes] = []
        self._left = 0
        self._state = "size"

    def feed(self, data: bytes) -> bytes | None:
        """The whole body once its end is there. Raises ValueError if this is no chunk."""
        self.rest = self.rest + data if self.rest else data
        while True:
            if self._state == "data":
                if len(self.rest) < self._left + 2:
                    return None
                if self.rest[self._left : self._left + 2] != b"\r\n":
                    raise ValueError("a chunk longer than it says")
                self._parts.append(self.rest[: self._left])
                self.rest, self._state = self.rest[self._left + 2 :], "size"
                continue
            end = self.rest.find(b"\r\n")
            if end < 0:
                if len(self.rest) > HEAD_LIMIT:
                    raise ValueError("a line without an end")
                return None
            line, self.rest = self.rest[:end], self.rest[end + 2 :]
            if self._state == "size":
                self._left = int(line.split(b";", 1)[0], 16)
                self._state = "data" if self._left else "trailer"
            elif not line:
                return b"".join(self._parts)


def _field(head: bytes, name: bytes) -> bytes:
    """The value of the first header that begins with `name`; nothing if there is none."""
    at = head.find(name)
    if at < 0:
        return b""
    start = at + len(name)
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else None].strip()


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
