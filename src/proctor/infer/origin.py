"""HTTP to one inference server: aiohttp without whatever a question does not need.

No redirects, no cookies, no compression asked for, no timer for each request (`flights` sweeps over all), no limit on
connections (`routing` has windows), headers and URLs made once. What this costs is in `design/http-client.md`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import ipaddress
import json
import re
import ssl
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

import aiohttp
import orjson
from yarl import URL

IDLE_S: Final = 3.0
"""A connection unused for so long is not used again: servers close theirs after five seconds or more."""
CLOSE_S: Final = 1.0
"""How long connections may take to end: a server that does not read must not hold us."""
FAULTS: Final = (aiohttp.ClientError, OSError)
"""What asking may raise: nobody there, no connection in time, a connection cut, an answer that is no HTTP."""

MOST_TOLD: Final = 400
"""Characters: aiohttp quotes what came."""

_ERRNO: Final = re.compile(r"\[Errno (\d+)\]")


def dumped(value: Mapping[str, Any] | str) -> bytes:
    """JSON, whatever the text."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        # Half a character in a prompt: whether that can be asked is for the server to say.
        return json.dumps(value).encode("ascii")


class HttpAnswer:
    """A status, headers (names in any case) and a whole body."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class Origin:
    """One server's base URL and the connections to it. Made inside the event loop, ended by `aclose`.

    ValueError for a URL that is not http(s)://host..., for a proxy that is none, or for a key that no header can carry.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, connect_s: float = 10.0, proxy: str | None = None
    ) -> None:
        """`proxy`: the URL of an HTTP proxy that the server is asked through."""
        base = _checked(url)
        self._base = str(base.with_user(None)).rstrip("/")
        self._proxy = None if proxy is None else _checked(proxy, "an HTTP proxy")
        self._connect_s = connect_s
        self._urls: dict[str, URL] = {}
        headers = _headers(_authorization(api_key, base))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=IDLE_S,
                # aiohttp's own context is made on import and knows no later SSL_CERT_FILE.
                ssl=ssl.create_default_context() if base.scheme == "https" else True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_s),
        )

    async def post(self, path: str, body: bytes) -> HttpAnswer:
        """The answer to a POST of JSON. Raises FAULTS."""
        # aiohttp repeats no POST. Without `async with`: a body that was read to its end has given its connection back.
        response = await self._session.post(self._url(path), data=body, allow_redirects=False, proxy=self._proxy)
        return HttpAnswer(response.status, response.headers, await response.read())

    async def get(self, path: str, timeout_s: float) -> HttpAnswer:
        """The answer to a GET, within the time. Raises FAULTS."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=self._connect_s)
        response = await self._session.get(self._url(path), allow_redirects=False, proxy=self._proxy, timeout=timeout)
        return HttpAnswer(response.status, response.headers, await response.read())

    async def aclose(self) -> None:
        """End every connection."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._session.close(), CLOSE_S)

    def _url(self, path: str) -> URL:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(self._base + path)
        return url


def refused(error: BaseException) -> bool:
    """Whether nobody listens there, at none of the host's addresses."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, ConnectionRefusedError):
        return True
    # Several addresses: one error that quotes all.
    codes = _ERRNO.findall(str(error)) if isinstance(error, OSError) else []
    return bool(codes) and all(int(code) == errno.ECONNREFUSED for code in codes)


def told(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        # Its text has the proxy's URL, with the password.
        return f"the proxy answers HTTP {error.status} ({error.message})"
    return " ".join(f"{type(error).__name__}: {error}"[:MOST_TOLD].split())


def proxy_of(url: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY want for a URL. This machine is always reached directly.

    Raises ValueError for what is no URL.
    """
    target = _checked(url)
    host = target.host or ""
    if _is_loopback(host) or urllib.request.proxy_bypass(f"{host}:{target.port}"):
        return None
    proxy = urllib.request.getproxies().get(target.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _checked(text: str, what: str = "a server") -> URL:
    url = URL(text)
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"not a URL of {what}: {text!r}")
    return url


def _authorization(api_key: str | None, url: URL) -> str | None:
    if api_key:
        return f"Bearer {api_key}"
    if url.user is not None:
        pair = f"{url.user}:{url.password or ''}"
        return "Basic " + base64.b64encode(pair.encode("utf-8")).decode("ascii")
    return None


def _headers(authorization: str | None) -> dict[str, str]:
    # All that aiohttp would add: what it finds it does not make anew for each request.
    headers = {
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "User-Agent": "proctor",
        "Content-Type": "application/json",
    }
    if authorization is not None:
        if "\r" in authorization or "\n" in authorization:
            raise ValueError("an API key has no line breaks")
        headers["Authorization"] = authorization
    return headers
