"""Messages between two of our processes: JSON objects, a line each, over a socket pair."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any, Final, Self

_LONGEST: Final = 1 << 24
"""Bytes of a message: far above any that is sent, far below what hurts."""


class Link:
    """One end. Sending never waits; who is not listened to any more is told by `receive`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> Self:
        """Take over one end of a pair."""
        return cls(*await asyncio.open_connection(sock=end, limit=_LONGEST))

    def send(self, message: Mapping[str, Any]) -> None:
        """Send an object; nothing happens if the other end is gone."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def flush(self) -> None:
        """Wait until what was sent is on its way."""
        try:
            await self._writer.drain()
        except OSError:
            return

    async def receive(self) -> dict[str, Any] | None:
        """The next object; None when the other end is gone."""
        try:
            line = await self._reader.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        """The other end receives what was sent, and then None."""
        self._writer.close()
