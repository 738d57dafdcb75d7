"""Free TCP ports."""

from __future__ import annotations

import socket
from collections import OrderedDict
from typing import Final

_REMEMBERED: Final = 64
"""How many ports are not handed out twice: a server needs a while to bind the one it was given."""


class PortFinder:
    """Hands out ports that are free on one address, and not the same one twice in a row.

    Between the answer and the server's own bind somebody else may take the port: who starts a server checks
    that the one who listens is its own, and asks again if not.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._given: OrderedDict[int, None] = OrderedDict()

    def find(self) -> int:
        """A port that nobody listens on now. Raises OSError if there is none or the address is not ours."""
        held: list[socket.socket] = []
        try:
            while True:
                probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                held.append(probe)
                probe.bind((self._host, 0))
                port = int(probe.getsockname()[1])
                if port not in self._given:
                    break
        finally:
            for probe in held:
                probe.close()
        self._given[port] = None
        while len(self._given) > _REMEMBERED:
            self._given.popitem(last=False)
        return port
