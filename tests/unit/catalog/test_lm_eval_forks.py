"""Forks: as many at work as there are permits, whoever else forks, and however one of them ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os, pathlib, sys, time
from proctor.catalog.lm_eval.forks import in_processes, permits

root = pathlib.Path(sys.argv[1])
permits.share(2)

def work(name):
    def run(directory):
        (root / f"{name}.begun").touch()
        if name.startswith("dies"):
            os.kill(os.getpid(), 9)
        until = time.monotonic() + 60
        begun = [p.stem for p in root.glob("*.begun") if not p.stem.startswith("dies")]
        at_work = [name for name in begun if not (root / f"{name}.done").exists()]
        while len(at_work) < 2 and name.startswith("pair") and time.monotonic() < until:
            time.sleep(0.01)
            at_work = list(root.glob("pair*.begun"))
        nested = in_processes({f"{name}-inner": lambda _: 1}, directory, 1)
        (root / f"{name}.done").touch()
        return [len(at_work), sorted(nested)]
    return run

names = sys.argv[2].split(",")
jobs = [names[::2], names[1::2]]
pids = []
for mine in jobs:
    pid = os.fork()
    if pid == 0:
        errors = in_processes({n: work(n) for n in mine}, root, 8)
        (root / f"{'-'.join(mine)}.errors").write_text(",".join(sorted(errors)))
        os._exit(0)
    pids.append(pid)
for pid in pids:
    os.waitpid(pid, 0)
"""


def run(root: Path, *names: str) -> None:
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", CODE, str(root), ",".join(names)], env=env, check=True, timeout=300)


def at_work(root: Path, names: list[str]) -> list[int]:
    return [int((root / f"{n}.json").read_text().strip("[ ").split(",")[0]) for n in names]


def test_two_jobs_share_the_permits_of_their_host(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(8)]
    run(tmp_path, *names)
    assert max(at_work(tmp_path, names)) <= 2


def test_permits_are_used_side_by_side(tmp_path: Path) -> None:
    run(tmp_path, "pair0", "pair1")
    assert max(at_work(tmp_path, ["pair0", "pair1"])) == 2


def test_a_fork_that_is_killed_takes_no_permit_along(tmp_path: Path) -> None:
    """More die than there are permits; the others still get theirs."""
    dying = [f"dies{n}" for n in range(4)]
    run(tmp_path, *dying, "a", "b")
    assert (tmp_path / "dies0-dies2-a.errors").read_text() == "dies0,dies2"
    assert (tmp_path / "a.done").exists()
    assert (tmp_path / "b.done").exists()
