"""A fake OpenAI-compatible server, without a model: `python -m proctor.testing.server`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from proctor.testing.openai_server import FakeServer
from proctor.testing.options import Faults, Latency, ServerOptions


def parse(arguments: Sequence[str] | None = None) -> tuple[ServerOptions, argparse.Namespace]:
    """Options from a command line: every field of ServerOptions, Latency and Faults under its own name."""
    parser = argparse.ArgumentParser(prog="python -m proctor.testing.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--node-rank", type=int, default=0, help="other than 0: part of a server, which serves nothing")
    parser.add_argument("--api-key-file", help="file that holds the key")
    parser.add_argument("--port-file", help="file that gets the port once the server listens")
    base = ServerOptions()
    simple = [f for f in fields(ServerOptions) if f.name not in ("latency", "faults", "defaults")]
    for group, value in ((simple, base), (fields(Latency), base.latency), (fields(Faults), base.faults)):
        for one in group:
            default = getattr(value, one.name)
            flag = "--" + one.name.replace("_", "-")
            if isinstance(default, bool):
                parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
            else:
                parser.add_argument(
                    flag,
                    type=float if isinstance(default, float) else int if isinstance(default, int) else str,
                    default=default,
                )
    parser.add_argument("--defaults", type=json.loads, default={}, help="JSON object")
    parsed = parser.parse_args(arguments)
    given = vars(parsed)
    if given["die_after"] is not None:
        given["die_after"] = int(given["die_after"])
    options = replace(
        base,
        defaults=parsed.defaults,
        latency=Latency(**{f.name: given[f.name] for f in fields(Latency)}),
        faults=Faults(**{f.name: given[f.name] for f in fields(Faults)}),
        **{f.name: given[f.name] for f in simple},
    )
    return options, parsed


async def serve(options: ServerOptions, *, host: str, port: int, port_file: str | None) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with FakeServer(options, host=host, port=port) as server:
        if port_file is not None:
            fresh = Path(f"{port_file}.{os.getpid()}")
            await asyncio.to_thread(fresh.write_text, server.url.rpartition(":")[2])
            await asyncio.to_thread(fresh.replace, port_file)
        sys.stdout.write(f"listening on {server.url}\n")
        sys.stdout.flush()
        await stop.wait()


async def follow(rank: int) -> None:
    """What runs on the further nodes of a server: nothing that answers, until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sys.stdout.write(f"node {rank} follows\n")
    sys.stdout.flush()
    await stop.wait()


def main() -> None:
    """The program."""
    options, parsed = parse()
    if parsed.api_key_file is not None:
        options = replace(options, api_key=Path(parsed.api_key_file).read_text(encoding="utf-8"))
    if parsed.node_rank:
        asyncio.run(follow(parsed.node_rank))
    else:
        asyncio.run(serve(options, host=parsed.host, port=parsed.port, port_file=parsed.port_file))


if __name__ == "__main__":
    main()
