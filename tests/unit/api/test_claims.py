"""Who holds claims, and what it takes to give back those of a dead attempt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from proctor import api
from proctor.api import claiming as module
from proctor.api.context import RunContext
from proctor.cli import cli as command
from proctor.errors import MissingTool, ProctorError, UnknownName, Unreachable, UsageError
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.store import Ledger, Owner, Store
from proctor.store.owner import user_name

from .conftest import Room

WEIGHTS = "ab" * 32


class Slurm:
    """A scheduler that says of each attempt what it was told to say."""

    cluster = "here"

    def __init__(self) -> None:
        self.words: dict[str, bool | None] = {}
        self.attempts = SimpleNamespace(failure=None)
        self.users: list[str] = []

    def is_live(self, job: str, array_task: str, restart: int, user: str = "") -> bool | None:
        self.users.append(user)
        return self.words.get(job)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm()
    monkeypatch.setattr(module.SlurmScheduler, "connect", lambda: slurm)
    return slurm


@pytest.fixture
def config(room: Room) -> Path:
    return room.run([{"native": room.task("t", ["a"])}])


@pytest.fixture
def store(config: Path) -> Store:
    store = RunContext.open(config).store(create=True)
    (store.path / "weights" / WEIGHTS).mkdir(parents=True)
    return store


def job(number: str, *, user: str = "ada", task: str = "3") -> Owner:
    """An attempt on another machine of the cluster."""
    here = Owner.here(run="theirs", cluster="here", job=number, array_task=task, restart=1)
    return replace(here, host="node7", machine="m", boot="another", user=user)


def hold(store: Store, owner: Owner, *keys: str) -> None:
    ledger = Ledger(store.claims_directory(WEIGHTS), owner, alive=lambda _: None)
    assert asyncio.run(ledger.claim([k * 64 for k in keys])).seq is not None


def free(store: Store, *keys: str) -> set[str]:
    """Which of the keys anybody could claim now."""
    ledger = Ledger(store.claims_directory(WEIGHTS), Owner.here(), alive=lambda _: None)
    return {k[0] for k in asyncio.run(ledger.unclaimed([k * 64 for k in keys]))}


def test_everybody_who_holds_something_is_listed(config: Path, store: Store, slurm: Slurm) -> None:
    hold(store, job("11"), "a", "b")
    hold(store, job("12", user="bob"), "c")
    hold(store, Owner.here(run="mine"), "d")
    slurm.words = {"11": True, "12": None}
    found = api.claims(config)
    assert [(c.attempt, c.user, c.requests, c.alive) for c in found[:2]] == [
        ("11_3.1", "ada", 2, True),
        ("12_3.1", "bob", 1, None),
    ]
    assert (found[2].user, found[2].alive) == (user_name(), True)
    assert found[2].attempt.startswith(found[2].host + ":")
    assert slurm.users == ["ada", "bob"]


def test_a_dead_attempts_claims_are_given_back_and_nothing_is_removed(config: Path, store: Store, slurm: Slurm) -> None:
    hold(store, job("11"), "a")
    hold(store, job("11"), "b")
    hold(store, job("11", task="4"), "c")
    before = sorted(p.name for p in store.claims_directory(WEIGHTS).iterdir())
    assert free(store, "a", "b", "c") == set()
    done = CliRunner().invoke(command, ["claims", str(config), "--void", "11_3.1"])
    assert done.exit_code == 0, done.output
    assert done.output.count("11_3.1 of ada on node7, run theirs: 1 requests of abababababab; void now") == 2
    assert free(store, "a", "b", "c") == {"a", "b"}
    assert set(before) < {p.name for p in store.claims_directory(WEIGHTS).iterdir()}
    (left,) = json.loads(CliRunner().invoke(command, ["claims", str(config), "--json"]).output)
    assert left["attempt"] == "11_4.1"


def test_an_attempt_that_runs_keeps_its_claims(config: Path, store: Store, slurm: Slurm) -> None:
    hold(store, job("11"), "a")
    hold(store, Owner.here(run="mine"), "b")
    slurm.words = {"11": True}
    for attempt in ("11_3.1", api.claims(config)[1].attempt):
        with pytest.raises(UsageError, match="runs: its claims stay"):
            api.void_claims(config, attempt)
    assert free(store, "a", "b") == set()
    with pytest.raises(UnknownName, match=r"did you mean '11_3\.1'"):
        api.void_claims(config, "11_3.0")


def test_a_scheduler_that_does_not_answer_proves_nothing(
    config: Path, store: Store, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(store, job("11"), "a")
    slurm.attempts.failure = Unreachable("the Slurm controller does not answer")
    with pytest.raises(Unreachable):
        api.void_claims(config, "11_3.1")

    def missing() -> SlurmScheduler:
        raise MissingTool("no program 'scontrol'")

    monkeypatch.setattr(module.SlurmScheduler, "connect", missing)
    with pytest.raises(ProctorError, match="Slurm cannot be asked from here"):
        api.void_claims(config, "11_3.1")
    assert free(store, "a") == set()


def test_claims_of_earlier_versions_have_no_user(config: Path, store: Store, slurm: Slurm) -> None:
    hold(store, job("11"), "a")
    (path,) = store.claims_directory(WEIGHTS).glob("*.claim")
    head, _, keys = path.read_bytes().partition(b"\n")
    value = json.loads(head)
    del value["owner"]["user"]
    path.write_bytes(json.dumps(value).encode() + b"\n" + keys)
    (found,) = api.claims(config)
    assert (found.user, found.attempt) == ("", "11_3.1")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nothing of a surrounding job."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_JOB_ID", raising=False)
        yield
