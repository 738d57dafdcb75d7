"""SIGINT once finishes and keeps what is in flight; twice stops; the same command then asks only the rest."""

from __future__ import annotations

import signal
import subprocess

import pytest

from .conftest import Lab, wait_for

WORDS = [f"word{i:03d}" for i in range(60)]
INCOMPLETE = 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_one_signal_drains(lab: Lab, number: signal.Signals) -> None:
    lab.latency_s = 0.2
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    process = lab.start("run", str(config))
    wait_for(lambda: sum(lab.asked().values()) >= 10)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == INCOMPLETE, out + err
    assert "Traceback" not in err
    asked = set(lab.asked())
    assert 10 <= len(asked) < len(WORDS)
    assert len(lab.answered_words(WORDS)) == len(asked), "what was in flight was kept"

    lab.run("run", str(config))
    assert lab.asked() == {lab.digest(w): 1 for w in WORDS}


def test_two_signals_stop_at_once(lab: Lab) -> None:
    lab.latency_s = 500.0
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    process = lab.start("run", str(config))
    wait_for(lambda: sum(lab.asked().values()) >= 1)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == INCOMPLETE, out + err
    assert "Traceback" not in err
