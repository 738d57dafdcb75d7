"""Copies of weights on a node: shared, trusted only when whole, removed by the last who uses them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from proctor.config.clusters.settings import Staging
from proctor.worker import staging as module
from proctor.worker.assignment import Assignment, SlurmTerms
from proctor.worker.staging import NodeCopy, staged_weights

MODEL = "a 'model' $(of) ours"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tmp_path / "shared" / MODEL
    (model / "code").mkdir(parents=True)
    (model / "code" / "extra.py").write_text("x = 1")
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (model / "optimizer.pt").write_bytes(b"o" * 100)
    return model


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 0)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local disk"


def left(local: Path) -> list[str]:
    return sorted(p.name for p in local.rglob("*") if p.is_file())


async def test_a_copy_while_it_is_needed(model: Path, local: Path) -> None:
    said: list[str] = []
    settings = Staging(directory="$NODE_DISK", check_space=True)
    environ = {"NODE_DISK": str(local)}
    async with staged_weights(settings, str(model), say=said.append, environ=environ) as path:
        assert path is not None
        copy = Path(path)
        assert copy.name == MODEL
        assert copy.is_relative_to(local)
        assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
        assert not (copy / "model.safetensors").is_symlink()
        # What only training reads, and directories, are reached where they are.
        assert (copy / "optimizer.pt").resolve() == model / "optimizer.pt"
        assert (copy / "code" / "extra.py").read_text() == "x = 1"
    assert said == [f"the weights are read from {path}"]
    assert left(local) == []


async def test_jobs_on_one_node_share_a_copy_and_the_last_removes_it(model: Path, local: Path) -> None:
    settings = Staging(directory=str(local), check_space=True)
    async with staged_weights(settings, str(model), say=print) as first:
        assert first is not None
        inode = (Path(first) / "model.safetensors").stat().st_ino
        async with staged_weights(settings, str(model), say=print) as second:
            assert second == first
            assert (Path(second) / "model.safetensors").stat().st_ino == inode
        assert (Path(first) / "model.safetensors").exists()
    assert left(local) == []


async def test_who_comes_while_another_copies_waits_for_it(
    model: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    real = module._copy_file

    def slowly(source: Path, target: Path, stop: threading.Event) -> None:
        copied.append(source.name)
        stop.wait(0.2)
        real(source, target, stop)

    monkeypatch.setattr(module, "_copy_file", slowly)
    settings = Staging(directory=str(local), check_space=True)

    async def use() -> str | None:
        async with staged_weights(settings, str(model), say=print) as path:
            await asyncio.sleep(0.5)
            return path

    paths = await asyncio.gather(*(use() for _ in range(3)))
    assert len(set(paths)) == 1
    assert None not in paths
    assert copied == ["config.json", "model.safetensors"]
    assert left(local) == []


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from proctor.worker import staging
staging.SPARE = 0
real = staging._copy_file
def until(source, target, stop):
    if sys.argv[3] == "copying" and source.name.startswith("model"):
        target.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target, stop)
staging._copy_file = until
staging.NodeCopy.of(Path(sys.argv[1]), Path(sys.argv[2])).hold(check_space=True, stop=threading.Event())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["copying", "serving"])
def test_what_a_killed_job_left_is_trusted_only_if_it_is_whole(model: Path, local: Path, when: str) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(model), str(local), when], check=False)
    found = next(local.rglob("model.safetensors"))
    inode = found.stat().st_ino
    copy = NodeCopy.of(model, local)
    copy.hold(check_space=True, stop=threading.Event())
    assert (copy.path / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    if when == "serving":
        assert found.stat().st_ino == inode
    copy.release()
    assert left(local) == []


def test_a_copy_whose_contents_changed_is_replaced(model: Path, local: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(model), str(local), "serving"], check=False)
    found = next(local.rglob("model.safetensors"))
    size = found.stat().st_size
    found.write_bytes(b"x" * size)
    copy = NodeCopy.of(model, local)
    copy.hold(check_space=True, stop=threading.Event())
    assert (copy.path / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    copy.release()


def test_what_killed_jobs_left_of_other_models_is_removed(model: Path, local: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(model), str(local), "serving"], check=False)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"gguf")
    copy = NodeCopy.of(other, local)
    copy.hold(check_space=True, stop=threading.Event())
    assert copy.path.read_bytes() == b"gguf"
    assert not list(local.rglob("model.safetensors"))
    copy.release()
    assert left(local) == []


def test_all_parts_of_a_split_file(tmp_path: Path, local: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(bytes([part]))
    copy = NodeCopy.of(tmp_path / "m-00001-of-00002.gguf", local)
    copy.hold(check_space=True, stop=threading.Event())
    assert sorted(p.name for p in copy.path.parent.iterdir()) == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    copy.release()


@pytest.mark.parametrize(
    ("directory", "words"),
    [
        ("$NOT_SET/x", "names $NOT_SET, which is not set"),
        ("relative", "is no absolute path"),
        ("/proc/version/x", "Not a directory"),
    ],
)
async def test_what_keeps_them_from_being_copied_is_said_and_no_error(model: Path, directory: str, words: str) -> None:
    said: list[str] = []
    async with staged_weights(Staging(directory=directory, check_space=True), str(model), say=said.append) as path:
        assert path is None
    assert len(said) == 1
    assert said[0].startswith(f"the weights are read from {model}: ")
    assert words in said[0]


async def test_too_little_room(model: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 1 << 60)
    said: list[str] = []
    async with staged_weights(Staging(directory=str(local), check_space=True), str(model), say=said.append) as path:
        assert path is None
    assert "GB free" in said[0]
    assert left(local) == []
    async with staged_weights(Staging(directory=str(local), check_space=False), str(model), say=said.append) as path:
        assert path is not None


async def test_a_hub_id_stays_one(local: Path) -> None:
    said: list[str] = []
    async with staged_weights(Staging(directory=str(local), check_space=True), "org/name", say=said.append) as path:
        assert path is None
    assert "no local file" in said[0]


async def test_a_worker_that_is_stopped_while_it_copies_leaves_nothing(
    model: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def waits(source: Path, target: Path, stop: threading.Event) -> None:
        begun.set()
        assert stop.wait(60)
        raise InterruptedError("stopped")

    monkeypatch.setattr(module, "_copy_file", waits)

    async def use() -> None:
        async with staged_weights(Staging(directory=str(local), check_space=True), str(model), say=print):
            pytest.fail("it was stopped before")

    task = asyncio.create_task(use())
    await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(local) == []


def test_the_terms_survive_the_file(tmp_path: Path) -> None:
    terms = SlurmTerms(nodes_per_server=2, servers=3, staging=Staging(directory="$X", check_space=False))
    for slurm in (terms, SlurmTerms(), None):
        assignment = Assignment(shape="s", jobs=("a",), costs=(1.0,), slurm=slurm)
        assignment.write(tmp_path / "a.json")
        assert Assignment.read(tmp_path / "a.json") == assignment
