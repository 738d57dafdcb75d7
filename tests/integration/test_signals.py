"""Ctrl-C and SIGTERM: once finishes what is in flight, twice stops at once; nothing acknowledged is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
import pytest

from .conftest import Lab, wait_for

WORDS = [f"word{i:03d}" for i in range(32)]
IN_FLIGHT = 4
RUN_AHEAD = IN_FLIGHT // 2 + 2
"""What the client has taken already, so that a freed slot finds a request waiting: it counts as in flight."""


def asking(lab: Lab, latency_s: float) -> tuple[str, subprocess.Popen[str]]:
    """A run that has sent some of its requests and not all of them."""
    lab.latency_s, lab.in_flight = latency_s, IN_FLIGHT
    config = str(lab.write_run(tasks=[lab.write_task("words", WORDS)]))
    process = lab.start("run", config)
    wait_for(lambda: sum(lab.asked().values()) > IN_FLIGHT or process.poll() is not None)
    return config, process


def left_behind(lab: Lab) -> list[str]:
    """The command lines of processes of this lab that still live."""
    found: list[str] = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(lab.root) in line and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("whole_group", [False, True], ids=["parent", "terminal"])
def test_once_drains(lab: Lab, number: signal.Signals, whole_group: bool) -> None:
    """A terminal sends Ctrl-C to the whole foreground group, kill to one process: the same happens."""
    if whole_group and number is signal.SIGTERM:
        pytest.skip("a terminal sends SIGINT")
    config, process = asking(lab, latency_s=0.4)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    at_signal = sum(lab.asked().values())
    out, err = process.communicate(timeout=600)

    assert process.returncode == 3, out + err
    assert "Traceback" not in out + err, err
    assert "exact_match" in out
    assert "requests are still owed" in err and "repeat the command" in err
    sent = lab.asked()
    # One round may have been sent while the signal was on its way.
    assert sum(sent.values()) <= at_signal + IN_FLIGHT + RUN_AHEAD < len(WORDS)
    kept = lab.answered_words(WORDS)
    assert {w for w in WORDS if sent[lab.digest(w)]} == kept, "what was in flight is finished and kept"
    assert not left_behind(lab)

    lab.run("run", config)
    assert all(lab.asked()[lab.digest(w)] == 1 for w in WORDS)


@pytest.mark.parametrize("pause_s", [0.0, 0.3], ids=["at once", "later"])
def test_twice_stops(lab: Lab, pause_s: float) -> None:
    """The second signal does not wait for answers that take long."""
    config, process = asking(lab, latency_s=0.5)
    wait_for(lambda: bool(lab.answered_words(WORDS)))
    acknowledged, before = lab.answered_words(WORDS), lab.asked()
    process.send_signal(signal.SIGINT)
    time.sleep(pause_s)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    out, err = process.communicate(timeout=600)

    assert process.returncode not in (0, None), out + err
    assert time.monotonic() - started < 300
    assert "Traceback" not in out + err, err
    wait_for(lambda: not left_behind(lab), timeout_s=60)
    assert acknowledged <= lab.answered_words(WORDS)

    lab.run("run", config)
    assert lab.answered_words(WORDS) == set(WORDS)
    assert all(lab.asked()[lab.digest(w)] == before[lab.digest(w)] for w in acknowledged)


def test_before_anything_is_asked(lab: Lab) -> None:
    """While the server still loads there is nothing to drain: the first signal ends the run."""
    lab.server_flags = ["--slow-start-s", "60"]
    config = str(lab.write_run(tasks=[lab.write_task("words", WORDS[:3])]))
    process = lab.start("run", config)
    wait_for(lambda: bool(list(lab.root.glob("runs/run/logs/*/command-0-1.log"))))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 3, out + err
    assert "Traceback" not in out + err, err
    assert "3 requests are still owed" in err
    assert not left_behind(lab) and not lab.asked()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_while_recording(lab: Lab, number: signal.Signals) -> None:
    """Before the workers exist a signal ends the command in order."""
    rows = lab.write_task("words", [f"word{i}" for i in range(30_000)])
    process = lab.start("run", str(lab.write_run(tasks=[rows])))
    wait_for(lambda: (lab.root / "runs" / "run" / "resolved.yaml").exists())
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode not in (0, None)
    assert "Traceback" not in out + err, err
    assert not left_behind(lab) and not lab.asked()
