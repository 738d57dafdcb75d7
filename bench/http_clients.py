"""Which HTTP client costs least: CPU a request and requests a second of bare loops against the same mock server.

Every case is a process of its own (`bench.loops`) under the peers' interpreter; the cases take turns, --rounds times.
The mock's own count shows that every request arrived. `protocol` is a hand-written client that can do nothing but
this: the floor of what Python pays for a request. `aiohttp` has everything switched off that Proctor switches off,
`aiohttp-plain` nothing. This module is not called `http`: that would hide Python's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from bench.load import server_stats
from bench.machine import heading, machine, versions
from bench.mock_server import PEERS, ROOT, started
from bench.spread import ratio, spread

SLOW: Final = {"httpx": 10}
"""Asked so many times fewer requests."""
ONLY: Final = {"httpx": (64,)}
"""With 1,024 in flight httpx does not end in reasonable time."""
PACKAGES: Final = ("aiohttp", "uvloop", "httpx", "pyreqwest", "primp", "wreq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    client: str
    uvloop: bool = False

    @property
    def name(self) -> str:
        return f"{self.client} + uvloop" if self.uvloop else self.client


CASES: Final = (
    Case(client="aiohttp-plain"),
    Case(client="aiohttp"),
    Case(client="aiohttp", uvloop=True),
    Case(client="pyreqwest"),
    Case(client="pyreqwest", uvloop=True),
    Case(client="wreq"),
    Case(client="wreq", uvloop=True),
    Case(client="primp"),
    Case(client="primp", uvloop=True),
    Case(client="httpx"),
    Case(client="protocol"),
    Case(client="protocol", uvloop=True),
)


def run_loop(
    case: Case, url: str, route: str, in_flight: int, requests: int, *, python: Path = PEERS
) -> dict[str, float]:
    """One run of a loop in a process of its own. Raises SystemExit if the mock counted another number of requests."""
    command = [str(python), "-m", "bench.loops", "--client", case.client, "--url", url, "--route", route]
    command += ["--in-flight", str(in_flight), "--requests", str(requests)]
    before = server_stats(url)["answered"]
    done = subprocess.run(
        command + (["--uvloop"] if case.uvloop else []),
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if not done.stdout:
        raise SystemExit(f"{case.name} ended with {done.returncode}: {done.stderr[-500:]}")
    arrived = server_stats(url)["answered"] - before - 2 * in_flight
    if arrived != requests:
        raise SystemExit(f"{case.name}: {arrived:.0f} requests arrived where {requests} were measured")
    # A client whose threads outlive the interpreter aborts it after all is measured: counted, for the choice.
    return cast("dict[str, float]", json.loads(done.stdout)) | {"aborted": float(done.returncode != 0)}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case at every concurrency, in turns."""
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    cases = [case for case in CASES if case.name in options.cases]
    with started() as mock:
        for number in range(options.rounds):
            for in_flight in options.in_flight:
                for case in cases if number % 2 == 0 else reversed(cases):
                    if in_flight in ONLY.get(case.client, (in_flight,)):
                        requests = options.requests // SLOW.get(case.client, 1)
                        found = run_loop(case, mock.url, options.route, in_flight, requests)
                        runs.setdefault((case.name, in_flight), []).append(found)
    return [row(name, in_flight, found, runs) for (name, in_flight), found in sorted(runs.items(), key=by_in_flight)]


def by_in_flight(item: tuple[tuple[str, int], object]) -> int:
    return item[0][1]


def row(
    name: str, in_flight: int, found: list[dict[str, float]], runs: dict[tuple[str, int], list[dict[str, float]]]
) -> dict[str, Any]:
    """One case at one concurrency, and its CPU over that of aiohttp in the same rounds."""
    cpu = [one["cpu_ms"] for one in found]
    rate = [one["requests_per_s"] for one in found]
    base = runs.get(("aiohttp", in_flight))
    return {
        "client": name,
        "in_flight": in_flight,
        "cpu_ms": spread(cpu).as_json(),
        "requests_per_s": spread(rate).as_json(),
        "aborts_at_exit": int(sum(one["aborted"] for one in found)),
        "cpu_over_aiohttp": ratio(cpu, [one["cpu_ms"] for one in base]).as_json() if base else None,
        "shown": [name, str(in_flight), str(spread(cpu)), str(spread(rate)), _aborts(found)],
    }


def _aborts(found: list[dict[str, float]]) -> str:
    count = int(sum(one["aborted"] for one in found))
    return f"{count} of {len(found)} aborted at exit" if count else ""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--route", choices=("chat", "completions"), default="chat")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    what, packages = machine(), versions(*PACKAGES, python=PEERS)
    rows = measure(options)
    print(heading(what, packages))
    print(f"{options.requests} requests, {options.rounds} rounds; medians (smallest to largest)\n")
    print(f"{'client':22}{'in flight':>10}  {'CPU ms/request':30}{'requests/s'}")
    for one in rows:
        name, in_flight, cpu, rate, aborts = one.pop("shown")
        print(f"{name:22}{in_flight:>10}  {cpu:30}{rate:34}{aborts}".rstrip())
    if options.json:
        document = {"machine": what, "versions": packages, "requests": options.requests, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
