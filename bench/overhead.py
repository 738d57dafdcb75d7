"""What a whole `proctor run` spends its time on: wall time by step, and the CPU of all its processes by stage.

20,000 generations of a native task from an endpoint that answers at once, so that all that is left is ours. The steps
are what the run itself says through its progress and its workers' events; the stages are stack samples (`bench.stages`)
of one more run, since sampling is not free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, cast

from bench.commands import write_run
from bench.documents import write_documents
from bench.machine import heading, machine, versions
from bench.mock_server import ROOT, started
from bench.spread import spread
from bench.stages import Stage, sample

STEPS: Final = (
    "start Python, import",
    "configuration",
    "record and plan",
    "start the worker",
    "ask and journal",
    "end the worker",
    "score",
    "print, end",
)


class Marks:
    """A Progress that notes when what began."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def note(self, name: str, at: float | None = None) -> None:
        self.at.setdefault(name, time.time() if at is None else at)

    def phase(self, name: str) -> None:
        self.note(name)

    def planned(self, plan: object) -> None:
        del plan
        self.note("planned")

    def events(self, events: list[Any]) -> None:
        for event in events:
            self.note(f"worker {event.phase}", event.time)


def one_run(config: str, began: float) -> None:
    """What `proctor run` does, with marks: the last line of what is printed is their JSON."""
    marks = Marks()
    marks.note("began", began)
    from proctor import api
    from proctor.cli.scores import show_scores
    from proctor.processes.garbage import collect_seldom

    collect_seldom()
    marks.note("imported")
    outcome = asyncio.run(api.run(config, progress=cast("Any", marks)))
    marks.note("scored")
    show_scores(outcome.scores, title=outcome.run)
    if not outcome.complete:
        raise SystemExit("the run is not complete")
    print(json.dumps(marks.at), flush=True)


def steps(at: dict[str, float], ended: float) -> dict[str, float]:
    """Seconds of each step, in order; they add up to the whole command."""
    begins = [
        at["began"],
        at["imported"],
        min(at["recording the tasks"], at.get("reading the models", at["planned"])),
        at["planned"],
        max(at["worker asking"], at["planned"]),
        at["worker done"],
        at["scoring"],
        at["scored"],
        ended,
    ]
    return {name: b - a for name, a, b in zip(STEPS, begins, begins[1:], strict=False)}


def prepare(directory: Path, url: str, options: argparse.Namespace) -> list[str]:
    """A run of its own in `directory`; what the interpreter is given to do it."""
    write_documents(directory, options.samples)
    path = write_run(directory, directory, url, chat=options.route == "chat", in_flight=options.in_flight)
    return ["-m", "bench.overhead", "--child", str(path)]


def walls(root: Path, url: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """The steps of each round, each with a new store."""
    out: list[dict[str, float]] = []
    for number in range(options.rounds):
        command = prepare(root / f"run-{number}", url, options)
        began = time.time()
        done = subprocess.run(
            [sys.executable, *command, "--began", str(began)], check=False, capture_output=True, text=True, cwd=ROOT
        )
        ended = time.time()
        if done.returncode:
            raise SystemExit(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")
        out.append(steps(json.loads(done.stdout.splitlines()[-1]), ended))
    return out


def cpu(root: Path, url: str, options: argparse.Namespace) -> list[Stage]:
    """The CPU of all processes of one run, by stage."""
    found, _ = sample([*prepare(root / "sampled", url, options), "--began", str(time.time())])
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--route", choices=("chat", "completions"), default="completions")
    parser.add_argument("--in-flight", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        one_run(options.child, options.began)
        return
    what, packages = machine(), versions("orjson", "pyarrow")
    print(heading(what, packages))
    print(f"{options.samples} {options.route}, {options.in_flight} in flight, a mock server that answers at once\n")
    with started() as mock, tempfile.TemporaryDirectory(prefix="proctor-bench-") as root:
        rounds = walls(Path(root), mock.url, options)
        total = [sum(one.values()) for one in rounds]
        print(f"{'whole command':24}{spread(total)} s, {options.rounds} rounds")
        for name in STEPS:
            shares = [one[name] / whole for one, whole in zip(rounds, total, strict=True)]
            print(f"{name:24}{spread([one[name] for one in rounds])!s:28} s  {spread(shares).median:6.1%}", flush=True)
        found = cpu(Path(root), mock.url, options)
    print(f"\n{'CPU of all processes':40}")
    for stage in found:
        print(f"  {stage.share:6.1%}  {stage.name}")
    if options.json:
        document = {
            "machine": what,
            "versions": packages,
            "samples": options.samples,
            "whole_s": spread(total).as_json(),
            "steps_s": {name: spread([one[name] for one in rounds]).as_json() for name in STEPS},
            "cpu_share": {s.name: round(s.share, 4) for s in found},
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
