"""Where the CPU of a Python program goes, by stage: stack samples of py-spy, each given to the innermost stage on it.

`python -m bench.stages -- -m bench.worker_path --url URL` runs the program under the py-spy of .venvs/peers, with its
children, and prints each stage's share and its busiest functions. Sampling costs the program almost nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.mock_server import PEERS

STAGES: Final[tuple[tuple[str, str], ...]] = (
    ("journal", r"proctor/store/(writer|rows|durable)\.py"),
    ("claims, recording, index", r"proctor/store/"),
    (
        "HTTP library",
        r"proctor/infer/origin\.py|site-packages/(aiohttp|yarl|multidict|propcache|aiosignal|frozenlist|attr|pyreqwest|wreq)/",
    ),
    ("client: routing, limits, retries", r"proctor/infer/(client|routing|concurrency|flights|outcome|turns)\w*\.py"),
    ("resolve, tokenise", r"proctor/infer/(resolve|profiles|tokenizer|chat_template|server_tokenizer)\w*\.py"),
    ("engine: bodies, answers", r"proctor/infer/"),
    ("worker: feed, session, events", r"proctor/(worker/(?!__main__)|processes/)"),
    ("record, catalog", r"proctor/catalog/"),
    ("plan", r"proctor/(plan|api/(planning|measuring|foreseeing))"),
    ("score, replay", r"proctor/(score|stats)/|proctor/api/scoring"),
    ("keys", r"proctor/records\.py"),
    ("report, print", r"proctor/(report|cli)/|site-packages/rich/"),
    ("configuration", r"proctor/(config|api)/"),
    ("benchmark itself", r"bench/(documents|mock_server)\.py"),
    ("imports", r"<frozen importlib"),
)
"""Name and what a frame of it looks like; frames of others (asyncio, json) count for whoever called them. A program's
own main function is no stage: it is on the stack of every turn of the event loop."""
REST: Final = "event loop and the rest"
RATE: Final = 200
BUSIEST: Final = 6

_IDLE: Final = re.compile(r"_worker \(.*thread\.py")
"""A thread of a pool that waits for work: the sampler takes it for a running one."""
_FRAME: Final = re.compile(r"(?P<name>.*) \((?P<file>.*?)(?::\d+)?\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    share: float
    busiest: tuple[tuple[str, float], ...]
    """Functions on top of the stack within the stage, and their share of everything."""


def stage_of(frames: Sequence[str]) -> str:
    """The stage of the innermost frame that belongs to one; `frames` from the outermost in."""
    for frame in reversed(frames):
        for name, pattern in STAGES:
            if re.search(pattern, frame):
                return name
    return REST


def stages(lines: Iterable[str]) -> list[Stage]:
    """From py-spy's raw format (`outer;...;inner COUNT`), the largest first."""
    whole: Counter[str] = Counter()
    tops: dict[str, Counter[str]] = {}
    for line in lines:
        stack, _, count = line.rstrip().rpartition(" ")
        frames = [f for f in stack.split(";") if not f.startswith(("thread", "process"))]
        if not frames or not count.isdigit() or _IDLE.match(frames[-1]):
            continue
        name = stage_of(frames)
        whole[name] += int(count)
        tops.setdefault(name, Counter())[_function(frames[-1])] += int(count)
    total = max(whole.total(), 1)
    return [
        Stage(
            name=name,
            share=count / total,
            busiest=tuple((f, n / total) for f, n in tops[name].most_common(BUSIEST)),
        )
        for name, count in whole.most_common()
    ]


def _function(frame: str) -> str:
    found = _FRAME.fullmatch(frame)
    return f"{found['name']} ({Path(found['file']).name})" if found else frame


def sample(command: Sequence[str], *, children: bool = True, rate: int = RATE) -> tuple[list[Stage], str]:
    """Run a Python command line (without the interpreter) under the sampler; its stages and what it printed."""
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as directory:
        out = Path(directory) / "stacks"
        spy = [str(PEERS.with_name("py-spy")), "record", "--format", "raw", "--rate", str(rate), "--output", str(out)]
        spy += ["--full-filenames", "--nolineno", *(["--subprocesses"] if children else []), "--", sys.executable]
        done = subprocess.run([*spy, *command], check=False, capture_output=True, text=True)
        if not out.exists() or done.returncode:
            raise SystemExit(f"py-spy ended with {done.returncode}: {done.stderr[-1000:]}")
        return stages(out.read_text(encoding="utf-8").splitlines()), done.stdout


@contextlib.contextmanager
def sampled(out: Path | None, *, rate: int = RATE) -> Generator[None]:
    """Sample this very process while the block runs, into `out`; without a file, do nothing."""
    if out is None:
        yield
        return
    spy = [str(PEERS.with_name("py-spy")), "record", "--format", "raw", "--rate", str(rate), "--output", str(out)]
    spy += ["--full-filenames", "--nolineno", "--pid", str(os.getpid())]
    process = subprocess.Popen(spy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it says that it samples
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def main() -> None:
    """Parse, sample, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rate", type=int, default=RATE, help="samples a second")
    parser.add_argument("command", nargs="+", help="after --: what the interpreter is given")
    options = parser.parse_args()
    found, printed = sample(options.command, rate=options.rate)
    print(printed.rstrip())
    for stage in found:
        print(f"{stage.share:6.1%}  {stage.name}")
        for name, share in stage.busiest:
            print(f"          {share:6.1%}  {name}")


if __name__ == "__main__":
    main()
