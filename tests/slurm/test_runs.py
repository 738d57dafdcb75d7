"""Runs from `prepare` to scores with one `submit`, and what `submit` does when it is repeated, refused or limited."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.api.sent import read_submissions
from proctor.cli import run as proctor
from proctor.launch.launcher import JobState
from proctor.worker.run_directory import RunDirectory

from ..integration.conftest import Lab, wait_for, write_model
from .cluster import Cluster
from .lab import WORKER, SlurmLab

FULL = "PROCTOR_CHAOS_SLURM" in os.environ
GGUF = os.environ.get("PROCTOR_TEST_GGUF", "")
CHECKPOINTS = 6 if FULL else 2
WORDS = [f"word{i:03d}" for i in range(8)]


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> SlurmLab:
    """An empty lab on the plain cluster."""
    return SlurmLab(root=tmp_path, cluster=slurm)


def write_models(root: Path) -> dict[str, Any]:
    """Two models and one training run, each with weights of its own."""
    for name in ("a", "b", *(f"train/step_{n}" for n in range(CHECKPOINTS))):
        (root / name).mkdir(parents=True)
        write_model(root / name, weights=name.encode().rjust(16, b"."))
    steps = {"pattern": "step_{step}"}
    return {
        "a": {"path": str(root / "a")},
        "b": {"path": str(root / "b")},
        "train": {"path": str(root / "train"), "checkpoints": steps},
    }


def write_tasks(lab: Lab, number: int = 4, words: list[str] = WORDS) -> list[Path]:
    kinds = ["generate", "multiple_choice"]
    return [lab.write_task(f"t{i}", [f"{w}-{i}" for w in words], output=kinds[i % 2]) for i in range(number)]


def test_a_sweep_equals_the_local_launcher(lab: SlurmLab) -> None:
    """Models and checkpoints over four tasks: prepare, one submit, and the scores are there when the queue is empty."""
    models = write_models(lab.root)
    # Each model answers differently: its weights are what the fake server is told.
    lab.server_flags = ["--weights", "{model}"]
    config = lab.write_sweep(tasks=write_tasks(lab), models=models, launch={"workers": 4}, gpus=1, shards=2)
    lab.run("prepare", str(config))
    sent = lab.run("submit", str(config))
    assert "sent:" in sent.stdout
    lab.wait_idle()
    print(lab.story())
    report = json.loads((lab.root / "runs" / "run" / "report" / "scores.json").read_text())
    assert len({(r["model"], r["label"]) for r in report}) == 2 + CHECKPOINTS
    assert lab.endings() == {"done": len(lab.attempts())}
    assert all(r["n"] == len(WORDS) for r in report)
    assert (lab.root / "runs" / "run" / "report" / "scores.json").exists()

    here = Lab(root=lab.root / "here", server_flags=lab.server_flags, latency_s=0.0)
    here.root.mkdir()
    local = here.write_run(tasks=write_tasks(here), models=models, launch={"type": "local", "max_workers": 2})
    here.run("run", str(local))
    assert scores_of(lab, config) == scores_of(here, local)


@pytest.mark.slow
@pytest.mark.skipif(not GGUF, reason="no embedded model: PROCTOR_TEST_GGUF is not set (`make test` sets it)")
def test_a_real_model_beside_a_fake_one_equals_the_local_launcher(lab: SlurmLab) -> None:
    """llama.cpp in one job, one request at a time so that batches cannot differ, a fake server in another."""
    write_model(lab.root / "fake")
    real = {"server": {"type": "llama.cpp", "threads": 1, "slots": 1}, "max_in_flight": 1}
    models: dict[str, Any] = {"fake": {"path": str(lab.root / "fake")}, "real": {"path": GGUF, "engine": real}}
    config = lab.write_sweep(tasks=write_tasks(lab, 2, WORDS[:4]), models=models, shards=1)
    lab.run("submit", str(config))
    lab.wait_idle()
    here = Lab(root=lab.root / "here", latency_s=0.0)
    here.root.mkdir()
    launch = {"type": "local", "max_workers": 1}
    local = here.write_run(tasks=write_tasks(here, 2, WORDS[:4]), models=models, launch=launch)
    here.run("run", str(local))
    rows = scores_of(lab, config)
    assert rows == scores_of(here, local)
    assert {(r[0], r[-1]) for r in rows} == {("fake", 4), ("real", 4)}
    report = json.loads((lab.root / "runs" / "run" / "report" / "scores.json").read_text())
    assert any(e.startswith("llama.cpp") for r in report for e in r["engines"])


def scores_of(lab: Lab, config: Path) -> list[tuple[Any, ...]]:
    rows = json.loads(lab.run("score", str(config), "--json").stdout)["rows"]
    return [(r["model"], r["label"], r["step"], r["task"], r["metric"], r["value"], r["n"]) for r in rows]


@dataclass(frozen=True)
class Said:
    """What a verb printed, and its exit code."""

    code: int
    out: str
    err: str


Verb = Callable[..., Said]


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Verb:
    """A verb in this process, which saves its start."""

    def call(*arguments: str | Path) -> Said:
        capsys.readouterr()
        code = proctor([str(a) for a in arguments])
        return Said(code, *capsys.readouterr())

    return call


HELD: dict[str, Any] = {"workers": 3, "sbatch": {"hold": True}}


def test_what_waits_is_not_sent_again(lab: SlurmLab, verb: Verb) -> None:
    """A rehearsal, a part, one model, the rest, nothing: by what the queue holds after each."""
    models = {k: v for k, v in write_models(lab.root).items() if k != "train"}
    config = lab.write_sweep(tasks=write_tasks(lab, 2), models=models, launch=HELD)

    rehearsal = verb("submit", config, "--dry-run")
    assert rehearsal.code == 0
    for line in ("#!/bin/bash", "#SBATCH --job-name=proctor-run-", "-m proctor.worker", "-m proctor score"):
        assert line in rehearsal.out
    assert lab.queue() == []

    unknown = verb("submit", config, "--model", "aa")
    assert unknown.code == 2
    assert "did you mean 'a'" in unknown.err
    assert lab.queue() == []

    assert verb("submit", config, "--limit", "1").code == 0
    assert len(lab.workers()) == 1
    assert verb("submit", config).code == 0
    assert len(lab.workers()) == 3
    again = verb("submit", config)
    assert "nothing to send" in again.out
    assert len(lab.workers()) == 3
    assert len(lab.queue()) == 4, "and one job that marks"

    assert "cancelled" in verb("cancel", config).out
    lab.wait_idle()
    assert verb("submit", config, "--model", "a").code == 0
    (path,) = (p for p in lab.root.glob("runs/run/assignments/*.json") if len(json.loads(p.read_text())["jobs"]) == 1)
    some = {r.array for r in lab.workers()}
    assert {r.name.rpartition("-")[2] for r in lab.workers()} == {path.stem}
    assert verb("submit", config).code == 0
    assert {r.array for r in lab.workers()} > some, "what waits for one model does not count for all"


PLAIN_REFUSALS = [
    ("launch.partition=gpuu", 2, "partition 'gpuu'", "sinfo"),
    ("launch.time_limit=1", 1, "time limit 00:01:00 is too short", "or more"),
    ("launch.partition=short", 1, "beyond MaxTime 00:05:00 of partition 'short'", "or less"),
    ("engine.server.gpus=5", 1, "at most 4 GPUs", "sinfo"),
    ("launch.gpu_type=h100", 1, "a100", "sinfo"),
    ("launch.cluster=generik", 2, "did you mean 'generic'", "proctor clusters"),
]


def test_refusals_name_the_limit_and_leave_nothing(lab: SlurmLab, verb: Verb) -> None:
    config = lab.write_sweep(tasks=write_tasks(lab, 1), gpus=1, launch=HELD)
    for override, code, words, command in PLAIN_REFUSALS:
        said = verb("submit", config, "--set", override)
        assert (said.code, lab.queue()) == (code, []), (override, said)
        assert words in said.err, said
        assert command in said.err, said
        assert "Traceback" not in said.err
        assert said.err.count("error:") == 1
    lab.cluster.kill_controller()
    said = verb("submit", config)
    assert (said.code, "the Slurm controller does not answer" in said.err) == (1, True), said
    assert "scontrol ping" in said.err
    lab.cluster.start_controller()
    assert lab.queue() == []
    assert not read_submissions(RunDirectory(lab.root / "runs" / "run"))


def test_more_elements_than_an_array_may_have(lab: SlurmLab, verb: Verb) -> None:
    """A cluster's limit of 1001 elements takes 1200 workers in two arrays; the profile's own limit in more."""
    config = lab.write_sweep(
        tasks=write_tasks(lab, 1, [f"w{i}" for i in range(1200)]), shards=1200, launch=HELD | {"workers": 1200}
    )
    said = verb("submit", config)
    assert said.code == 0, said
    arrays = {r.array for r in lab.workers()}
    assert (len(arrays), len(lab.workers())) == (2, 1200)
    first = [s.first for s in read_submissions(RunDirectory(lab.root / "runs" / "run")) if s.shape != "score"]
    assert first == [0, 600]
    verb("cancel", config)


ACCOUNTING_REFUSALS = [
    ("launch.account=nope", 2, "account 'nope'"),
    ("launch.qos=nope", 2, "qos 'nope'"),
]


def test_limits_of_accounting_are_filled_and_the_rest_is_owed(
    slurm_accounting: Cluster, tmp_path: Path, own_cache: Path, verb: Verb
) -> None:
    lab = SlurmLab(root=tmp_path, cluster=slurm_accounting)
    config = lab.write_sweep(tasks=write_tasks(lab, 1), launch=HELD | {"workers": 7}, shards=8)
    for override, code, words in ACCOUNTING_REFUSALS:
        said = verb("submit", config, "--set", override)
        assert (said.code, lab.queue()) == (code, []), said
        assert words in said.err
        assert "sacctmgr" in said.err
    for override, limit, number in (
        ("launch.qos=small", "QOSMaxSubmitJobPerUserLimit", 4),
        ("launch.account=limited", "AssocMaxSubmitJobLimit", 3),
    ):
        said = verb("submit", config, "--set", override)
        assert said.code == 3, said
        assert limit in said.err
        assert f"{7 - number} elements are not in the queue" in said.err
        assert "`proctor score` does it afterwards" in said.err, "no room for the job that marks"
        assert len(lab.queue()) == number
        still = verb("submit", config, "--set", override)
        assert (still.code, len(lab.queue())) == (3, number), still
        verb("cancel", config)
        lab.wait_idle()


def test_what_a_limit_keeps_out_is_sent_later(
    slurm_accounting: Cluster, tmp_path: Path, own_cache: Path, verb: Verb
) -> None:
    """With --retry-interval the command stays until all is in the queue, or nothing is owed."""
    lab = SlurmLab(root=tmp_path, cluster=slurm_accounting, latency_s=0.05)
    config = lab.write_sweep(tasks=write_tasks(lab, 1), launch={"workers": 5, "qos": "small"}, shards=8)
    said = verb("submit", config, "--retry-interval", "0.05", "--quiet")
    assert said.code == 0, said
    lab.wait_idle()
    assert {n for *_, n in lab.scores(config)} == {len(WORDS)}


def test_a_missing_piece_stops_the_worker_with_a_reason(lab: SlurmLab, verb: Verb) -> None:
    config = lab.write_sweep(tasks=write_tasks(lab, 1), launch=HELD | {"workers": 1})
    assert verb("submit", config).code == 0
    (lab.root / "model" / "tokenizer.json").unlink()
    (job,) = {r.array for r in lab.workers()}
    lab.cluster.run("scontrol", "release", job)
    lab.wait(lambda: not lab.workers())
    (attempt,) = lab.attempts()
    assert (attempt.ending, attempt.answered) == ("configuration", 0)
    assert "tokenizer.json' is missing" in attempt.message
    assert "proctor prepare" in (attempt.hint or "")
    assert not lab.asked()
    status = verb("status", config)
    assert "configuration" in status.out
    assert "tokenizer.json" in status.out
    (log,) = lab.root.glob("runs/run/logs/*_0.log")
    assert "Traceback" not in log.read_text()


SECRET = "s3cr3t-0123456789"


@contextmanager
def endpoint(lab: SlurmLab) -> Iterator[str]:
    """A fake server on the login node, where all nodes reach it, that wants a key."""
    conf = (lab.cluster.directory / "slurm.conf").read_text()
    found = re.search(r"SlurmctldHost=\S+\((.*)\)", conf)
    assert found is not None
    port = lab.root / "server.port"
    argv = [w for w in lab.server()["argv"] if w not in ("--port", "{port}")]
    words = ["--host", found[1], "--api-key", SECRET, "--port-file", str(port)]
    process = subprocess.Popen([*argv, *words], stdout=subprocess.DEVNULL)
    try:
        wait_for(port.exists)
        yield f"http://{found[1]}:{port.read_text()}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_no_secret_anywhere_and_hostile_names(lab: SlurmLab, verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a shell would take amiss, below a directory of that kind; the key is nobody's to see."""
    monkeypatch.setenv("SWEEP_KEY", SECRET)
    lab.root = lab.root / "in 'quotes' $(touch pwned) %j %A ünï"
    lab.root.mkdir()
    lab.latency_s = 0.3
    name = "it's $(touch pwned); %a"
    with endpoint(lab) as url:
        models: dict[str, Any] = {
            name: {"path": url, "served_model": "default", "api_key_env": "SWEEP_KEY", "tokenizer": str(lab.root / "t")}
        }
        write_model(lab.root / "t")
        config = lab.write_sweep(tasks=write_tasks(lab, 1), models=models, name="run", launch={"workers": 2})
        spec = yaml.safe_load(config.read_text())
        del spec["engine"]["server"]
        config.write_text(yaml.safe_dump(spec | {"name": "a $(run) 'of' 100%"}))
        said = verb("submit", config)
        assert said.code == 0, said
        lab.wait(lambda: lab.processes(WORKER))
        worker = lab.processes(WORKER)[0]
        environment, line = worker.environ(), worker.cmdline()
        shown = lab.cluster.run("scontrol", "show", "job", "-d")
        scripts = [lab.cluster.run("scontrol", "write", "batch_script", r.job, "-", check=False) for r in lab.workers()]
        lab.wait_idle()
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert environment["SWEEP_KEY"] == SECRET
    assert SECRET not in " ".join([*line, shown, *scripts, said.out, said.err])
    for path in lab.root.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
        assert path.name != "pwned"
    assert not Path("pwned").exists()
    (report,) = lab.root.glob("runs/*/report/scores.json")
    assert {r["n"] for r in json.loads(report.read_text())} == {len(WORDS)}


def test_the_run_does_not_wait_for_an_element_that_does_not_start(lab: SlurmLab) -> None:
    """Three of four do everything; a fourth that starts while they are at work takes a share."""
    words = [f"word{i:03d}" for i in range(90)]
    lab.latency_s = 1.0
    config = lab.write_sweep(tasks=write_tasks(lab, 1, words), launch=HELD | {"workers": 4}, shards=30)
    lab.run("submit", str(config))
    (job,) = {r.array for r in lab.workers()}
    for index in range(3):
        lab.cluster.run("scontrol", "release", f"{job}_{index}")
    lab.wait(lambda: len(lab.workers()) == 1)
    assert [(r.array_task, r.stands) for r in lab.workers()] == [("3", JobState.PENDING)]
    assert len(lab.attempts()) == 3
    assert sum(a.answered for a in lab.attempts()) == len(words)
    assert all(a.answered for a in lab.attempts()), lab.story()
    lab.cluster.run("scontrol", "release", f"{job}_3")
    lab.wait_idle()
    assert [a.answered for a in lab.attempts()][-1] == 0
    assert {n for *_, n in lab.scored()} == {len(words)}


def test_a_late_worker_takes_a_share(lab: SlurmLab) -> None:
    words = [f"word{i:03d}" for i in range(120)]
    lab.latency_s = 1.0
    config = lab.write_sweep(tasks=write_tasks(lab, 1, words), launch={"workers": 2}, shards=40)
    block = "#!/bin/sh\nsleep 600\n"
    flags = ["--parsable", "-w", "n2,n3,n4", "--exclusive", "-o", "/dev/null"]
    blocker = lab.cluster.run("sbatch", *flags, text=block).strip()
    lab.run("submit", str(config))
    lab.wait(lambda: sum(lab.asked().values()) > 10)
    lab.cluster.run("scancel", blocker)
    released = time.time()
    lab.wait_idle()
    first, late = sorted(lab.attempts(), key=lambda a: a.started)
    assert late.started > released - 1
    assert first.answered + late.answered == len(words)
    assert late.answered >= len(words) // 10, lab.story()
