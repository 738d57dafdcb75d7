"""kill -9 at seeded instants, and segments cut as a power failure would: nothing acknowledged is lost or asked again.

PROCTOR_CHAOS_KILLS and PROCTOR_CHAOS_CUTS say how many; `make chaos` runs all.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from .conftest import Lab, kill_tree, wait_for

KILLS = int(os.environ.get("PROCTOR_CHAOS_KILLS", "5"))
CUTS = int(os.environ.get("PROCTOR_CHAOS_CUTS", "2"))
WORDS = [f"word{i:03d}" for i in range(120)]
EXPECTED_ROWS = 2

pytestmark = pytest.mark.slow

TRACE = """
import os
_fsync = os.fsync
def fsync(fd):
    size, path = os.fstat(fd).st_size, os.readlink(f"/proc/self/fd/{fd}")
    _fsync(fd)
    with open(os.environ["FSYNC_TRACE"], "a") as trace:
        trace.write(f"{size} {path}\\n")
os.fsync = fsync
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, float | None, int]]:
    """The scores of a run that nothing happens to."""
    lab = Lab(root=tmp_path_factory.mktemp("undisturbed"), latency_s=0.0)
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    lab.run("run", str(config))
    scores = lab.scores(config)
    assert len(scores) == EXPECTED_ROWS
    return scores


def process_of(parent: subprocess.Popen[str], module: str) -> psutil.Process | None:
    """The first descendant that runs `module`."""
    try:
        for child in psutil.Process(parent.pid).children(recursive=True):
            line = child.cmdline()
            # The guard has the server's command line in its own arguments: the server itself has no child.
            if module in line and "proctor.processes.guard" not in line:
                return child
    except psutil.NoSuchProcess:
        return None
    return None


def strike(parent: subprocess.Popen[str], victim: str) -> None:
    """kill -9 of the victim; a victim that is not there yet or any more is no harm."""
    if victim == "parent":
        parent.kill()
    elif victim == "all":
        kill_tree(parent.pid)
    else:
        module = {"worker": "proctor.worker", "server": "proctor.testing.server"}[victim]
        process = process_of(parent, module)
        if process is not None:
            process.kill()


def gone(lab: Lab) -> bool:
    """No process of this lab is left."""
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(lab.root) in line and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            return False
    return True


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_any_instant(lab: Lab, seed: int, undisturbed: list[tuple[str, str, float | None, int]]) -> None:
    rng = random.Random(seed)
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    victim = rng.choice(["worker", "server", "parent", "all"])
    parent = lab.start("run", str(config))
    if seed % 5:
        after = rng.randrange(1, len(WORDS) - lab.in_flight)
        wait_for(lambda: sum(lab.asked().values()) >= after or parent.poll() is not None)
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 4))
    strike(parent, victim)
    acknowledged = lab.answered_words(WORDS)
    before = lab.asked()
    parent.communicate(timeout=400)
    wait_for(lambda: gone(lab))

    lab.run("run", str(config))

    assert lab.scores(config) == undisturbed
    after_all = lab.asked()
    again = {w for w in acknowledged if after_all[lab.digest(w)] != before[lab.digest(w)]}
    assert not again, f"{victim} killed: acknowledged, yet sent again: {sorted(again)}"
    assert all(after_all[lab.digest(w)] >= 1 for w in WORDS)


def newest_segment(lab: Lab) -> Path:
    segments = [p for p in lab.root.glob("store/weights/*/*") if ".jsonl" in p.name]
    return max(segments, key=lambda p: p.stat().st_mtime_ns)


@pytest.mark.parametrize("seed", range(CUTS))
def test_segment_cut_back(lab: Lab, seed: int, undisturbed: list[tuple[str, str, float | None, int]]) -> None:
    rng = random.Random(1000 + seed)
    hooks = lab.root / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(TRACE)
    trace = lab.root / "fsyncs"
    trace.touch()
    lab.environment = {"PYTHONPATH": str(hooks), "FSYNC_TRACE": str(trace)}
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    parent = lab.start("run", str(config))
    after = rng.randrange(10, len(WORDS) - lab.in_flight)
    wait_for(lambda: sum(lab.asked().values()) >= after)
    kill_tree(parent.pid)
    parent.communicate(timeout=400)
    wait_for(lambda: gone(lab))

    segment = newest_segment(lab)
    lines = segment.read_bytes().splitlines(keepends=True)
    if seed % 2:
        torn = True
        size = sum(map(len, lines[:-1])) + rng.randrange(1, len(lines[-1]))
    else:
        torn = False
        synced = [int(row.split(" ", 1)[0]) for row in trace.read_text().splitlines() if row.endswith(str(segment))]
        assert synced, "the segment was never fsynced"
        size = max(synced)
    os.truncate(segment, size)
    kept = lab.answered_words(WORDS)
    assert kept
    before = lab.asked()

    second = lab.run("run", str(config))

    assert lab.scores(config) == undisturbed
    after_all = lab.asked()
    assert not {w for w in kept if after_all[lab.digest(w)] != before[lab.digest(w)]}
    if torn:
        assert "damaged" in second.stderr
        lost = json.loads(lines[-1])["row"]
        assert lost
    assert all(after_all[lab.digest(w)] >= 1 for w in WORDS)
