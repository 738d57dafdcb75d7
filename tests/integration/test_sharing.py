"""What two runs, two workers or two tasks have in common is asked once; the server's journal is the evidence."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from proctor.testing import prompt_digest

from .conftest import Lab, kill_tree, wait_for

MANY = 60
SHARED = [f"shared{i:03d}" for i in range(MANY)]
LEFT = [f"left{i:03d}" for i in range(MANY)]
RIGHT = [f"right{i:03d}" for i in range(MANY)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def times(lab: Lab, words: list[str]) -> dict[str, int]:
    """How often each word was sent, where that is not once."""
    asked = lab.asked()
    return {w: asked[lab.digest(w)] for w in words if asked[lab.digest(w)] != 1}


def two_runs(lab: Lab, *, workers: int = 1, seed: int = 0) -> tuple[Path, Path]:
    """Two configurations whose tasks have half of their words in common, in different orders."""
    rng = random.Random(seed)
    configs: list[Path] = []
    for name, own in (("left", LEFT), ("right", RIGHT)):
        words = SHARED + own
        rng.shuffle(words)
        task = lab.write_task(name, words)
        configs.append(lab.write_run(tasks=[task], name=f"run {name}", launch={"workers": workers}))
    return configs[0], configs[1]


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err


def test_one_after_the_other(lab: Lab) -> None:
    left, right = two_runs(lab)
    lab.run("run", str(left))
    assert sum(lab.asked().values()) == 2 * MANY
    lab.run("run", str(right))
    assert times(lab, SHARED + LEFT + RIGHT) == {}
    assert sum(lab.asked().values()) == 3 * MANY
    # Either alone would have had the same scores.
    assert [n for *_, n in lab.scores(right)] == [2 * MANY, 2 * MANY]


@pytest.mark.parametrize(("seed", "workers", "latency_s"), [(0, 1, 0.0), (1, 1, 0.05), (2, 2, 0.01), (3, 2, 0.1)])
def test_at_the_same_time(lab: Lab, seed: int, workers: int, latency_s: float) -> None:
    lab.latency_s = latency_s
    left, right = two_runs(lab, workers=workers, seed=seed)
    first = lab.start("run", str(left))
    time.sleep(random.Random(seed).uniform(0, 0.5))
    second = lab.start("run", str(right))
    finish(first)
    finish(second)
    assert times(lab, SHARED + LEFT + RIGHT) == {}
    assert sum(lab.asked().values()) == 3 * MANY
    for config in (left, right):
        assert [n for *_, n in lab.scores(config)] == [2 * MANY, 2 * MANY]


def test_the_same_run_twice_at_the_same_time(lab: Lab) -> None:
    task = lab.write_task("words", SHARED)
    configs = [lab.write_run(tasks=[task], name=name) for name in ("one", "two", "three")]
    for process in [lab.start("run", str(c)) for c in configs]:
        finish(process)
    assert times(lab, SHARED) == {}


def test_one_configuration_started_twice(lab: Lab) -> None:
    """Both write the same run directory; the answers are none the worse for it."""
    config = lab.write_run(tasks=[lab.write_task("words", SHARED)])
    for process in [lab.start("run", str(config)) for _ in range(2)]:
        finish(process)
    assert times(lab, SHARED) == {}


def test_two_tasks_of_one_run(lab: Lab) -> None:
    tasks = [lab.write_task("left", SHARED + LEFT), lab.write_task("right", RIGHT + SHARED)]
    config = lab.write_run(tasks=tasks, launch={"workers": 2})
    lab.run("run", str(config))
    assert times(lab, SHARED + LEFT + RIGHT) == {}
    assert [n for *_, n in lab.scores(config)] == [2 * MANY] * 4


def test_one_document_twice_in_one_task(lab: Lab) -> None:
    config = lab.write_run(tasks=[lab.write_task("words", SHARED + SHARED)])
    lab.run("run", str(config))
    assert times(lab, SHARED) == {}
    assert [n for *_, n in lab.scores(config)] == [2 * MANY, 2 * MANY]


@pytest.mark.parametrize(
    ("method", "ends"), [("echo", (": a", ": b")), ("next-token", (":", ": "))], ids=["echo", "next-token"]
)
def test_choices_of_two_runs(lab: Lab, method: str, ends: tuple[str, str]) -> None:
    """Log-likelihoods, with the server's probe beside them: twice, for two servers."""
    words = SHARED[:20]
    task = lab.write_task("choice", words, output="multiple_choice")
    for name in ("one", "two"):
        engine = {"type": "openai", "server": lab.server(), "loglikelihood": method}
        lab.run("run", str(lab.write_run(tasks=[task], name=name, engine=engine)))
    asked = lab.asked()
    prompts = [prompt_digest(list(f"Say {w}{end}".encode())) for w in words for end in ends]
    assert [asked[p] for p in prompts] == [1] * len(prompts)


@pytest.mark.parametrize("seed", range(3))
def test_one_of_two_is_killed(lab: Lab, seed: int) -> None:
    rng = random.Random(seed)
    lab.latency_s = 0.05
    left, right = two_runs(lab, seed=seed, workers=1 + seed % 2)
    first = lab.start("run", str(left))
    wait_for(lambda: sum(lab.asked().values()) >= 1)
    second = lab.start("run", str(right))
    at = rng.randrange(10, 80)
    wait_for(lambda: sum(lab.asked().values()) >= at)
    kill_tree(first.pid)
    first.communicate(timeout=600)
    acknowledged = lab.answered_words(SHARED + LEFT)
    before = lab.asked()
    finish(second)
    after = lab.asked()
    assert all(after[lab.digest(w)] >= 1 for w in SHARED + RIGHT)
    assert not [w for w in acknowledged if after[lab.digest(w)] > before[lab.digest(w)]]
    # What each of its workers had in flight and on its way to the disk is asked again, and nothing else.
    assert len(times(lab, SHARED + RIGHT)) <= 2 * lab.in_flight * (1 + seed % 2)
    lab.run("run", str(left))
    assert [n for *_, n in lab.scores(left)] == [2 * MANY, 2 * MANY]
    assert len(times(lab, SHARED + LEFT + RIGHT)) <= 2 * lab.in_flight * (1 + seed % 2)
