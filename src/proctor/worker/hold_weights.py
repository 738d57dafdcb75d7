"""One node's part of `staging_steps`: copies the weights to the node's disk and holds the copy until SIGUSR1."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from typing import Final

from proctor.config.clusters.settings import Staging
from proctor.worker.staging import hold

SAYS: Final = "@PROCTOR_STAGED@ "
"""Begins the line in which a node says what came of it: {node, path} or {node, error}."""


def main(text: str) -> int:
    """Hold the copy that the orders (JSON) name; say on standard output where it is, or why there is none."""
    orders = json.loads(text)
    staging = Staging(directory=orders["directory"], check_space=orders["check_space"])
    stop = threading.Event()

    def asked(_number: int, _frame: object) -> None:
        stop.set()

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, asked)
    try:
        copy = hold(staging, orders["path"], os.environ, stop)
    except OSError as error:
        _say(error=str(error))
        return 1
    try:
        _say(path=str(copy.path))
        while not stop.wait(60.0):
            pass
    finally:
        copy.release()
    return 0


def _say(**what: str) -> None:
    # One write for each line: the lines of all nodes meet in one log.
    line = SAYS + json.dumps({"node": socket.gethostname(), **what}) + "\n"
    sys.stdout.buffer.write(b"\n" + line.encode())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
