"""The inference client against others, side by side in one run, on a mock server that is not the bottleneck.

process: Proctor's worker with its journal (`bench.worker_path`), the bare loop of the HTTP library that it uses, and
the openai SDK, each a process of its own, in turns. commands: `proctor run` with one worker, with two, and with two
processes of one; lm-eval and Inspect from start to printed score, the peers at the best of --peer-in-flight. memory:
the worker's over --memory-requests. stages: where its CPU goes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from bench import commands
from bench.documents import write_documents
from bench.http_clients import Case, run_loop
from bench.machine import heading, machine, versions
from bench.mock_server import PEERS, ROOT, started
from bench.spread import ratio, spread
from bench.stages import stages

LIBRARY: Final = Case(client="aiohttp")
"""What Proctor asks with, with the same switched off: what is left is Proctor's own."""
PLAIN: Final = Case(client="aiohttp-plain")
"""The same library as its documentation shows it."""
PARTS: Final = ("process", "commands", "memory", "stages")
SDK_SHARE: Final = 10
"""The SDK is asked so many times fewer requests: its rate does not depend on how many there are."""
SWEEP_SHARE: Final = 5
"""The best concurrency of a peer is looked for on so many times fewer samples."""
WORKERS: Final = 2
"""Whole commands also with so many, who share the requests in flight: one process is one core's worth of asking."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every part is told."""

    url: str
    requests: int
    rounds: int
    command_rounds: int
    samples: int
    inspect_samples: int
    in_flight: Sequence[int]
    peer_in_flight: Sequence[int]
    memory_requests: int
    routes: Sequence[str]


def worker(
    setting: Setting, route: str, in_flight: int, requests: int, *, stacks: Path | None = None
) -> dict[str, Any]:
    """One run of Proctor's own path."""
    command = [sys.executable, "-m", "bench.worker_path", "--url", setting.url, "--route", route]
    command += ["--in-flight", str(in_flight), "--requests", str(requests)]
    command += ["--stacks", str(stacks)] if stacks else []
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"the worker ended with {done.returncode}: {done.stderr[-2000:]}")
    return cast("dict[str, Any]", json.loads(done.stdout))


def process(setting: Setting, say: Say) -> list[dict[str, Any]]:
    """One process of each, in turns, at every concurrency."""
    say(f"\nOne process, {setting.requests} requests, medians of {setting.rounds} (smallest to largest)")
    say(f"{'route':12}{'in flight':>10}  {'':8}{'requests/s':28}{'CPU ms/request'}")
    out: list[dict[str, Any]] = []
    here = Path(sys.executable)
    for route in setting.routes:
        for in_flight in setting.in_flight:
            cases: dict[str, Callable[[], dict[str, Any]]] = {
                "raw": partial(run_loop, LIBRARY, setting.url, route, in_flight, setting.requests, python=here),
                "plain": partial(run_loop, PLAIN, setting.url, route, in_flight, setting.requests, python=here),
                "Proctor": partial(worker, setting, route, in_flight, setting.requests),
                "openai": partial(
                    run_loop, Case(client="openai"), setting.url, route, in_flight, setting.requests // SDK_SHARE
                ),
            }
            runs = in_turns(cases, setting.rounds)
            out.append({"route": route, "in_flight": in_flight} | compared(runs))
            for name, found in runs.items():
                rate = spread([one["requests_per_s"] for one in found])
                cpu = spread([one["cpu_ms"] for one in found])
                say(f"{route:12}{in_flight:>10}  {name:8}{rate!s:28}{cpu}")
            for peer, label in (("raw", "raw loop"), ("plain", "plain loop"), ("openai", "openai SDK")):
                against = out[-1]["over"][peer]
                say(
                    f"{'':24}Proctor / {label}: {shown(against['rate'])}; more CPU, ms: {shown(against['cpu_more_ms'])}"
                )
    return out


def in_turns(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Each case once a round, every other round backwards: what the machine does meanwhile meets all of them."""
    runs: dict[str, list[Any]] = {name: [] for name in cases}
    for number in range(rounds):
        names = list(cases) if number % 2 == 0 else list(reversed(cases))
        for name in names:
            runs[name].append(cases[name]())
    return runs


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Spreads of all, and Proctor's paired ratios and difference."""
    rates = {name: [one["requests_per_s"] for one in found] for name, found in runs.items()}
    cpu = {name: [one["cpu_ms"] for one in found] for name, found in runs.items()}
    return {
        "requests_per_s": {name: spread(values).as_json() for name, values in rates.items()},
        "cpu_ms": {name: spread(values).as_json() for name, values in cpu.items()},
        "over": {
            name: {
                "rate": ratio(rates["Proctor"], rates[name]).as_json(),
                "cpu_more_ms": spread([a - b for a, b in zip(cpu["Proctor"], cpu[name], strict=True)]).as_json(),
            }
            for name in runs
            if name != "Proctor"
        },
    }


def shown(value: dict[str, float]) -> str:
    return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A whole command at the concurrency that suits it."""

    run: Callable[[], commands.Run]
    in_flight: int
    peer_of: Sequence[str] = ()
    """Those whose samples/s are set against its own."""


def whole_commands(setting: Setting, say: Say) -> dict[str, Any]:
    """Proctor, lm-eval and Inspect from start to printed score."""
    say(f"\nWhole commands, {setting.samples} samples (Inspect {setting.inspect_samples})")
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        cases = prepared(Path(name), setting, say)
        runs: dict[str, list[commands.Run]] = in_turns({n: c.run for n, c in cases.items()}, setting.command_rounds)
    out: dict[str, Any] = {"samples": setting.samples, "inspect_samples": setting.inspect_samples}
    for name, case in cases.items():
        rate, cpu = [r.samples_per_s for r in runs[name]], [r.cpu_ms for r in runs[name]]
        found: dict[str, Any] = {
            "in_flight": case.in_flight,
            "samples_per_s": spread(rate).as_json(),
            "cpu_ms_per_sample": spread(cpu).as_json(),
            "runs": [asdict(r) for r in runs[name]],
        }
        say(f"{name:30} {case.in_flight:>5} in flight  {spread(rate)} samples/s; CPU {spread(cpu)} ms a sample")
        for one in case.peer_of:
            ours = runs[one]
            faster = ratio([r.samples_per_s for r in ours], rate).as_json()
            cheaper = ratio(cpu, [r.cpu_ms for r in ours]).as_json()
            found[f"against {one}"] = {"proctor_faster": faster, "proctor_cheaper": cheaper}
            say(f"{'':30} {one}: {shown(faster)} times the samples/s, {shown(cheaper)} times less CPU")
        out[name] = found
    return out


def prepared(root: Path, setting: Setting, say: Say) -> dict[str, Command]:
    """The commands, peers at their best concurrency, which is sought first on fewer samples."""
    full, part, few = root / "full", root / "part", root / "few"
    write_documents(full, setting.samples)
    write_documents(part, setting.samples // SWEEP_SHARE)
    few_documents = write_documents(few, setting.inspect_samples)
    fewer_documents = write_documents(few / "sought", setting.inspect_samples // SWEEP_SHARE)
    most = max(setting.in_flight)
    cases: dict[str, Command] = {}
    for route in setting.routes:
        chat = route == "chat"
        ours: dict[str, dict[str, int]] = {
            f"Proctor {route}": {},
            f"Proctor {route}, {WORKERS} workers": {"workers": WORKERS},
            f"Proctor {route}, {WORKERS} processes": {"processes": WORKERS},
        }
        run = partial(commands.proctor, full, setting.url, samples=setting.samples, chat=chat, in_flight=most)
        cases |= {name: Command(run=partial(run, **more), in_flight=most) for name, more in ours.items()}
        ask = partial(commands.lm_eval, url=setting.url, chat=chat)
        best = at_best(partial(ask, part, samples=setting.samples // SWEEP_SHARE), setting.peer_in_flight, say)
        cases[f"lm-eval {route}"] = Command(
            run=partial(ask, full, samples=setting.samples, in_flight=best),
            in_flight=best,
            peer_of=tuple(ours),
        )
    if "chat" in setting.routes:
        ask = partial(commands.inspect, url=setting.url)
        samples = setting.inspect_samples // SWEEP_SHARE
        best = at_best(partial(ask, fewer_documents, samples=samples), setting.peer_in_flight, say)
        cases["Inspect chat"] = Command(
            run=partial(ask, few_documents, samples=setting.inspect_samples, in_flight=best),
            in_flight=best,
            peer_of=("Proctor chat",),
        )
    return cases


def at_best(ask: Callable[..., commands.Run], in_flight: Sequence[int], say: Say) -> int:
    """The concurrency at which the whole command was quickest."""
    seconds = {n: ask(in_flight=n).seconds for n in in_flight}
    say("  sought: " + ", ".join(f"{n} in flight {s:.1f} s" for n, s in seconds.items()))
    return min(in_flight, key=lambda n: seconds[n])


def memory(setting: Setting, say: Say) -> dict[str, Any]:
    """The worker's resident memory while it asks very many requests."""
    found = worker(setting, "completions", max(setting.in_flight), setting.memory_requests)
    samples = cast("list[float]", found["rss_mb"])
    say(f"\nResident MB of the worker over {setting.memory_requests} requests, at each twentieth of the time:")
    say(" ".join(f"{mb:.0f}" for mb in samples))
    say(f"{found['requests_per_s']:.0f} requests/s, {found['cpu_ms']:.3f} ms of CPU a request")
    return found


def by_stage(setting: Setting, say: Say) -> dict[str, Any]:
    """Where the worker's CPU goes, at the middle concurrency."""
    middle = sorted(setting.in_flight)[len(setting.in_flight) // 2]
    out: dict[str, Any] = {}
    for route in setting.routes:
        with tempfile.TemporaryDirectory(prefix="proctor-bench-") as directory:
            path = Path(directory) / "stacks"
            found = worker(setting, route, middle, setting.requests, stacks=path)
            parts = stages(path.read_text(encoding="utf-8").splitlines())
        say(f"\nCPU of the worker by stage, {route}, {middle} in flight, {found['cpu_ms']:.3f} ms a request")
        for part in parts:
            say(f"  {part.share:6.1%}  {1000 * part.share * found['cpu_ms']:5.0f} µs  {part.name}")
        out[route] = {"cpu_ms": found["cpu_ms"], "stages": {p.name: round(p.share, 4) for p in parts}}
    return out


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=10_000, help="of one process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=20_000, help="of a whole command")
    parser.add_argument("--inspect-samples", type=int, default=1_000)
    parser.add_argument("--command-rounds", type=int, default=5)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--peer-in-flight", type=int, nargs="+", default=[64, 256], help="tried for whole commands")
    parser.add_argument("--routes", nargs="+", choices=("chat", "completions"), default=["chat", "completions"])
    parser.add_argument("--memory-requests", type=int, default=200_000)
    parser.add_argument("--latency-ms", type=float, default=20.0, help="of the mock server")
    parser.add_argument("--json", type=Path, help="write the numbers here; parts that are not run are kept")
    parser.add_argument("--text", type=Path, help="write the table here too")
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print."""
    options = parsed()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    what = machine()
    packages = versions("aiohttp", "orjson") | versions("openai", "inspect-ai", python=PEERS)
    packages |= versions("lm-eval", python=commands.LM_EVAL)
    say(heading(what, packages))
    say(f"mock server with {options.latency_ms:g} ms of latency; Proctor in flight up to the number given")
    results: dict[str, Any] = {"machine": what, "versions": packages, "latency_ms": options.latency_ms}
    if options.json and options.json.exists():
        before = cast("dict[str, Any]", json.loads(options.json.read_text(encoding="utf-8")))
        results |= {part: before[part] for part in PARTS if part in before}
    measures: dict[str, Callable[[Setting, Say], Any]] = {
        "process": process,
        "commands": whole_commands,
        "memory": memory,
        "stages": by_stage,
    }
    with started(options.latency_ms) as mock:
        setting = Setting(
            url=mock.url,
            **{name: getattr(options, name) for name in Setting.__slots__ if name != "url"},
        )
        for part in options.parts:
            found = measures[part](setting, say)
            # Another day's part must not pass for this one's.
            results[part] = {"date": what["date"], "load_before": what["load_before"], "found": found}
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            if options.text:
                options.text.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
