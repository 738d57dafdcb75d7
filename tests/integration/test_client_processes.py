"""Several processes that ask the servers of one worker: what they share, and what the end of one of them costs."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import Lab, start_server, wait_for

WORDS = [f"word{i:04d}" for i in range(1800)]
"""More than one process claims ahead."""
IN_FLIGHT = 30
PROCESSES = 3
MODULE = "proctor.worker.client_process"
INCOMPLETE = 3
HEADER = 1500
"""Bytes of a segment in which nothing is answered."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run_of(lab: Lab, *, models: dict[str, Any] | None = None, server: bool = True) -> Path:
    """A run whose shards are many, asked by three processes."""
    engine: dict[str, Any] = {"max_in_flight": IN_FLIGHT, "client_processes": PROCESSES}
    return lab.write_run(
        tasks=[lab.write_task("words", WORDS)],
        models=models,
        engine=engine | ({"server": lab.server()} if server else {}),
        plan={"strategy": "workers", "num_worker": 18, "min_task_size": 1},
    )


def clients_of(parent: subprocess.Popen[str]) -> list[psutil.Process]:
    """The client processes below `parent`, without their guards."""
    found: list[psutil.Process] = []
    for process in psutil.Process(parent.pid).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if MODULE in line and not any(word.endswith("guard.py") for word in line):
            found.append(process)
    return found


def events(lab: Lab) -> list[dict[str, Any]]:
    """What the only worker said; its clients say it through the worker."""
    (path,) = lab.root.glob("runs/*/events/*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def segments(lab: Lab) -> dict[int, int]:
    """Responses by the pid of the process that wrote them down."""
    found: Counter[int] = Counter()
    for path in lab.root.glob("store/weights/*/*.jsonl*"):
        rows = [json.loads(line)["row"] for line in path.read_text().splitlines()]
        pid = next(r["owner"]["pid"] for r in rows if r["type"] == "segment")
        found[pid] += sum(r["type"] == "response" for r in rows)
    return dict(found)


def begun(lab: Lab) -> tuple[Path, subprocess.Popen[str]]:
    """A run in which every client process is there, and more than one process has answers already."""
    lab.latency_s = 0.2
    config = run_of(lab)
    parent = lab.start("run", str(config))
    wait_for(lambda: len(clients_of(parent)) == PROCESSES - 1)

    def at_work() -> bool:
        sizes: list[int] = []
        for path in lab.root.glob("store/weights/*/*.jsonl*"):
            with contextlib.suppress(FileNotFoundError):  # it is sealed at this moment
                sizes.append(path.stat().st_size)
        return sum(size > HEADER for size in sizes) > 1

    wait_for(at_work)
    return config, parent


def finish(process: subprocess.Popen[str], code: int = 0) -> None:
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, out + err
    assert "Traceback" not in err


def asked(lab: Lab, words: Sequence[str] = WORDS) -> Counter[str]:
    """How often each word was sent."""
    sent = lab.asked()
    return Counter({w: sent[lab.digest(w)] for w in words})


def test_each_question_is_asked_once_by_one_of_them(lab: Lab) -> None:
    lab.latency_s = 0.2
    config = run_of(lab)
    lab.run("run", str(config))
    assert asked(lab) == dict.fromkeys(WORDS, 1)
    assert [n for *_, n in lab.scores(config)] == [len(WORDS)] * 2
    by_process = segments(lab)
    assert len(by_process) > 1 and sum(by_process.values()) == len(WORDS), "each has a journal of its own"
    said = events(lab)
    assert said[-1]["phase"] == "done" and said[-1]["requests"] == len(WORDS), "the worker speaks for all of them"


def test_they_share_what_may_be_in_flight(lab: Lab) -> None:
    lab.latency_s = 0.2
    with start_server(lab) as url:
        config = run_of(lab, models={"m": {"path": url, "served_model": "default"}}, server=False)
        lab.run("run", str(config))
        with urllib.request.urlopen(f"{url}/__stats") as answer:
            stats = json.load(answer)
    assert IN_FLIGHT // PROCESSES < stats["max_in_flight"] <= IN_FLIGHT
    assert asked(lab) == dict.fromkeys(WORDS, 1)


@pytest.mark.parametrize("seed", range(2))
def test_one_that_is_killed_costs_nothing_that_was_acknowledged(lab: Lab, seed: int) -> None:
    rng = random.Random(seed)
    config, parent = begun(lab)
    time.sleep(rng.uniform(0, 0.5))
    rng.choice(clients_of(parent)).kill()
    acknowledged = lab.answered_words(WORDS)
    before = asked(lab)
    finish(parent)
    after = asked(lab)
    assert all(after[w] >= 1 for w in WORDS)
    assert [w for w in acknowledged if after[w] != before[w]] == []
    assert sum(after.values()) <= len(WORDS) + IN_FLIGHT, "at most what one process had in flight was asked again"
    assert [n for *_, n in lab.scores(config)] == [len(WORDS)] * 2
    assert any("ended with status 137, this one goes on" in e["message"] for e in events(lab))


def test_a_server_that_dies_is_started_again_for_all(lab: Lab) -> None:
    config, parent = begun(lab)
    servers = [
        p
        for p in psutil.Process(parent.pid).children(recursive=True)
        if "proctor.testing.server" in p.cmdline() and not any(w.endswith("guard.py") for w in p.cmdline())
    ]
    assert len(servers) == 1
    servers[0].kill()
    finish(parent)
    assert [n for *_, n in lab.scores(config)] == [len(WORDS)] * 2
    assert not [e for e in events(lab) if "goes on" in e["message"]], "none of them gave up"


def test_one_signal_lets_all_of_them_keep_what_is_in_flight(lab: Lab) -> None:
    config, parent = begun(lab)
    parent.send_signal(signal.SIGINT)
    finish(parent, INCOMPLETE)
    sent = {w for w, n in asked(lab).items() if n}
    assert IN_FLIGHT <= len(sent) < len(WORDS)
    assert lab.answered_words(WORDS) == sent
    lab.run("run", str(config))
    assert asked(lab) == dict.fromkeys(WORDS, 1)


def test_two_signals_end_all_of_them(lab: Lab) -> None:
    lab.latency_s = 500.0
    parent = lab.start("run", str(run_of(lab)))
    wait_for(lambda: len(clients_of(parent)) == PROCESSES - 1)
    clients = clients_of(parent)
    wait_for(lambda: sum(lab.asked().values()) >= PROCESSES)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.5)
    parent.send_signal(signal.SIGINT)
    finish(parent, INCOMPLETE)
    assert not [c for c in clients if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_worker_takes_them_along(lab: Lab) -> None:
    config, parent = begun(lab)
    clients = clients_of(parent)
    parent.kill()
    parent.communicate()
    wait_for(lambda: not [c for c in clients if c.is_running() and c.status() != psutil.STATUS_ZOMBIE], 60)
    acknowledged, before = lab.answered_words(WORDS), asked(lab)
    lab.run("run", str(config))
    after = asked(lab)
    assert [w for w in acknowledged if after[w] != before[w]] == []
    assert [n for *_, n in lab.scores(config)] == [len(WORDS)] * 2
