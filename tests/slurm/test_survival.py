"""What a cluster does to jobs, at seeded instants: the scores stay the same, and no acknowledged answer is asked again.

PROCTOR_CHAOS_SLURM says how many seeds each kind gets; the kinds that Slurm's own delays make slow get a quarter.
`make chaos` runs them all; without it, a few kinds run once.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

from proctor.launch.slurm.records import QueueRecord

from ..integration.conftest import Lab
from .cluster import Cluster
from .lab import SERVER, WORKER, SlurmLab

SEEDS: Final = int(os.environ.get("PROCTOR_CHAOS_SLURM", "0"))
WORDS: Final = [f"word{i:03d}" for i in range(60)]
IN_FLIGHT: Final = 4

pytestmark = pytest.mark.timeout(1800)

Rows = list[tuple[str, str, float | None, int]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The scores of a run that nothing happens to."""
    lab = Lab(root=tmp_path_factory.mktemp("undisturbed"), latency_s=0.0)
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    lab.run("run", str(config))
    return lab.scores(config)


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> SlurmLab:
    """An empty lab on the plain cluster, slow enough to be struck."""
    return SlurmLab(root=tmp_path, cluster=slurm, latency_s=0.3, in_flight=IN_FLIGHT)


def seeds(*, cheap: bool = False, slow: bool = False) -> pytest.MarkDecorator:
    """The instants of one kind of damage."""
    number = max(1, SEEDS // 4 if slow else SEEDS)
    unless = pytest.mark.skipif(not SEEDS, reason="set PROCTOR_CHAOS_SLURM=N, as `make chaos` does")
    marks = [] if cheap else [pytest.mark.slow, unless]
    return pytest.mark.parametrize("seed", [pytest.param(seed, marks=marks) for seed in range(number)])


class Disturbed:
    """One run, what was acknowledged when it was struck, and what that may cost."""

    def __init__(self, lab: SlurmLab, seed: int, **launch: object) -> None:
        self.lab = lab
        self.seed = seed
        self.rng = random.Random(seed)
        self.config = lab.write_sweep(tasks=[lab.write_task("words", WORDS)], launch=launch)
        self.again = 0
        """So many requests may have been lost in flight."""
        self._known: dict[str, str] = {}
        self._asked: dict[str, int] = {}

    def start(self) -> None:
        """Submit, and wait for an instant at which both work is done and work is left; each fifth time for any."""
        self.lab.run("submit", str(self.config))
        if self.seed % 5 == 4:
            time.sleep(self.rng.uniform(0, 5))
            return
        after = self.rng.randrange(1, len(WORDS) // 2)
        self.lab.wait(lambda: sum(self.lab.asked_words(WORDS).values()) >= after)
        time.sleep(self.rng.uniform(0, 0.3))

    def note(self, lost_in_flight: int = 2 * IN_FLIGHT) -> None:
        """To be called after each strike: what is acknowledged by now is never asked again.

        A worker that is killed loses what its server is answering and what is on its way to the disk.
        """
        known = self.lab.acknowledged()
        asked = self.lab.asked()
        self._asked |= {d: asked[d] for d in known if d not in self._known}
        self._known = known | self._known
        self.again += lost_in_flight

    def at_work(self) -> list[QueueRecord]:
        """The elements that run, in order; waits for one."""
        self.lab.wait(self.lab.running)
        return sorted(self.lab.running(), key=lambda r: r.id)

    def victim(self) -> str:
        """A node on which a worker is at work."""
        return self.rng.choice(self.at_work()).nodes

    def finish(self, expected: Rows) -> None:
        """Let it end, submit what is still owed, and compare."""
        lab = self.lab
        self._end()
        for _ in range(3):
            if lab.scored() == expected:
                break
            lab.run("submit", str(self.config))
            self._end()
        assert expected in (lab.scored(), lab.scores(self.config)), lab.story()
        asked, now = lab.asked(), lab.acknowledged()
        repeated = {d: asked[d] - n for d, n in self._asked.items() if asked[d] != n}
        assert not repeated, f"acknowledged, yet asked again: {repeated}\n{lab.story()}"
        assert {d: now[d] for d in self._known} == self._known, "an acknowledged answer was replaced"
        twice = sum(n - 1 for n in lab.asked_words(WORDS).values())
        assert min(lab.asked_words(WORDS).values()) >= 1
        allowed = self.again + lab.answers().duplicates
        assert twice <= allowed, f"{twice} asked twice, {allowed} allowed\n{lab.story()}"

    def _end(self) -> None:
        """Wait for the end. What Slurm failed to start it holds, and may hold again: `submit` lets it go each time."""
        for _ in range(5):
            self.lab.wait(lambda: all(r.stuck for r in self.lab.workers()))
            if not self.lab.workers():
                break
            self.lab.run("submit", str(self.config))
        self.lab.wait_idle()


def kill_one(run: Disturbed, module: str) -> None:
    """SIGKILL; a process that is not there yet, or not any more, is no harm."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        run.rng.choice(run.lab.processes(module)).kill()


@seeds(cheap=True)
def test_a_worker_is_killed(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed)
    run.start()
    kill_one(run, WORKER)
    run.note()
    if seed == 0:
        lab.wait(lambda: len(lab.attempts()) + len(lab.workers()) < 2)
        assert "the worker left no word of its end" in lab.run("status", str(run.config)).stdout
    run.finish(undisturbed)


@seeds()
def test_a_server_is_killed(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed)
    run.start()
    kill_one(run, SERVER)
    run.note()
    run.finish(undisturbed)


@seeds(cheap=True)
def test_an_element_is_requeued(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed)
    run.start()
    element = run.rng.choice(run.at_work())
    lab.cluster.run("scontrol", "requeue", element.id)
    run.note()
    run.finish(undisturbed)
    assert any(a.restart for a in lab.attempts()), lab.story()


@seeds(cheap=True)
def test_all_is_cancelled_and_submitted_again(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed)
    run.start()
    if seed % 2:
        lab.run("cancel", str(run.config))
    else:
        lab.cluster.run("scancel", *{r.array for r in lab.workers()})
    run.note(4 * IN_FLIGHT)
    if seed % 3 == 0:
        lab.wait(lambda: not lab.workers())
    lab.run("submit", str(run.config))
    run.finish(undisturbed)


@seeds(cheap=True, slow=True)
def test_a_node_crashes(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed)
    run.start()
    node = run.victim()
    lab.cluster.crash_node(node)
    run.note()
    if seed % 2:
        time.sleep(run.rng.uniform(0, 5))
        lab.cluster.start_node(node)
    run.finish(undisturbed)


@seeds(slow=True)
def test_a_node_is_cut_off_and_comes_back(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    """Slurm gives the node up and starts the job again elsewhere: two copies work at the same time."""
    lab.latency_s = 1.0
    run = Disturbed(lab, seed)
    run.start()
    element = run.rng.choice(run.at_work())
    lab.cluster.isolate_node(element.nodes)
    run.note(0)
    lab.wait(lambda: all(r.restarts > element.restarts for r in lab.workers() if r.id == element.id))
    time.sleep(run.rng.uniform(0, 8))
    lab.cluster.rejoin_node(element.nodes, wait=False)
    # What the first copy has in flight when Slurm ends it was claimed by its successor meanwhile.
    run.note(4 * IN_FLIGHT)
    run.finish(undisturbed)


@seeds()
def test_a_higher_partition_takes_the_nodes(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed, partition="low")
    run.start()
    script = "#!/bin/sh\nsleep 1\n"
    lab.cluster.run(
        "sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--job-name=high", text=script
    )
    run.note(4 * IN_FLIGHT)
    run.finish(undisturbed)


@seeds()
def test_the_controller_restarts(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed)
    if seed % 4 < 2:
        run.start()
    else:
        # While it starts jobs: Slurm may hold some of them afterwards, for the next `submit` to release.
        lab.run("submit", str(run.config))
    if seed % 2:
        lab.cluster.restart_controller()
        run.note(0)
    else:
        lab.cluster.kill_controller()
        time.sleep(run.rng.uniform(0, 3))
        lab.cluster.start_controller()
        # It may have forgotten that jobs began: Slurm ends them then and starts them anew.
        run.note(4 * IN_FLIGHT)
    run.finish(undisturbed)


@contextlib.contextmanager
def small_disk(lab: SlurmLab) -> Iterator[Path]:
    """A store of eight megabytes. Nodes see what was mounted when they were booted."""
    store = lab.root / "store"
    store.mkdir()

    def boot_all() -> None:
        for node in lab.cluster.nodes:
            lab.cluster.crash_node(node)
        for node in lab.cluster.nodes:
            lab.cluster.start_node(node)

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(store)], check=True)
    try:
        boot_all()
        yield store
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)
        boot_all()


@seeds(slow=True)
def test_the_shared_directory_is_full_for_a_while(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    run = Disturbed(lab, seed)
    with small_disk(lab) as store:
        run.start()
        ballast = store / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(run.rng.uniform(0, 6))
        ballast.unlink()
        run.note(4 * IN_FLIGHT)
        run.finish(undisturbed)


def submit_for_a_minute(run: Disturbed) -> None:
    """Submit with a limit that is too short for what the planner expects of an unknown server."""
    run.lab.run("submit", str(run.config))
    (path,) = run.lab.root.glob("runs/run/assignments/*.json")
    text = path.read_text()
    assert "--time=00:10:00" in text
    path.write_text(text.replace("--time=00:10:00", "--time=00:01:00").replace("#SBATCH --hold\\n", ""))
    (job,) = {r.array for r in run.lab.workers()}
    run.lab.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    run.lab.cluster.run("scontrol", "release", job)


def time_limited(lab: SlurmLab, seed: int, *, latency_s: float, **launch: object) -> Disturbed:
    """One worker with one minute at a time."""
    lab.latency_s = latency_s
    terms = {"workers": 1, "signal_lead_s": 30, "sbatch": {"hold": True}}
    run = Disturbed(lab, seed, **terms | launch)
    submit_for_a_minute(run)
    return run


@seeds(cheap=True, slow=True)
def test_the_time_limit_is_reached_again_and_again(lab: SlurmLab, seed: int, undisturbed: Rows) -> None:
    """Each attempt must do something, stop in time, and see that the work goes on."""
    policy = ("auto", "successor")[seed % 2]
    run = time_limited(lab, seed, latency_s=10.0 if SEEDS else 4.0, requeue=policy)
    lab.wait_idle(1200)
    run.again += IN_FLIGHT  # what is slower than all before it is given up at the end
    assert lab.scored() == undisturbed, "the job that marks ran when all had ended"
    run.finish(undisturbed)
    stops = [a for a in lab.attempts() if a.ending in ("requeued", "succeeded_by")]
    assert len(stops) >= (3 if SEEDS else 1), lab.story()
    assert {a.ending for a in stops} == {"requeued" if policy == "auto" else "succeeded_by"}
    assert all(a.answered for a in stops), lab.story()


def test_all_processes_of_a_worker_stop_in_time_and_ask_nothing_twice(lab: SlurmLab) -> None:
    many = [f"word{i:04d}" for i in range(2400)]
    lab.latency_s, lab.in_flight, lab.client_processes = 0.1, 24, 3
    config = lab.write_sweep(tasks=[lab.write_task("words", many)], shards=24, launch={"workers": 1})
    lab.run("submit", str(config))
    lab.wait(lambda: len(list((lab.root / "store" / "weights").glob("*/*.jsonl*"))) == lab.client_processes)
    (element,) = lab.running()
    lab.cluster.run("scancel", "--batch", "--signal=USR1", element.id)
    lab.wait(lambda: len(lab.attempts()) == 1)
    (stopped,) = lab.attempts()
    assert stopped.ending == "requeued" and stopped.answered == len(lab.acknowledged()) < len(many), lab.story()
    lab.wait_idle()
    assert [n for *_, n in lab.scored()] == [len(many)] * 2, lab.story()
    assert set(lab.asked_words(many).values()) == {1}, "what was in flight was kept by each of them"


@seeds(slow=True)
def test_a_chain_ends_with_a_reason(lab: SlurmLab, seed: int) -> None:
    """Never requeued, as often as allowed, or without any progress: `status` says which, and what to do."""
    terms, ending, words = [
        ({"requeue": "never"}, "not_requeued", "`launch.requeue` is never"),
        ({"max_attempts": 1}, "attempts_spent", "the time was up 1 times"),
        ({}, "no_progress", "before anything was answered"),
    ][seed % 3]
    run = time_limited(lab, seed, latency_s=300.0 if ending == "no_progress" else 10.0, **terms)
    lab.wait_idle(1200)
    assert lab.endings() == {ending: 1}, lab.story()
    assert words in lab.attempts()[0].message
    shown = lab.run("status", str(run.config)).stdout
    assert ending in shown, shown
