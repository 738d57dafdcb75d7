"""Rows and stores for the store's tests."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proctor.records import Response
from proctor.store import Owner, Store


def _key(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def _response(name: object, text: str = "answer", **more: object) -> Response:
    return Response(key=_key(name), physical_key=_key(f"physical {name}"), text=text, **more)  # type: ignore[arg-type]


@pytest.fixture
def key() -> Callable[[object], str]:
    """The key that stands for a name."""
    return _key


@pytest.fixture
def response() -> Callable[..., Response]:
    """A response to the key of a name."""
    return _response


@pytest.fixture
def resolution() -> str:
    return "0123456789abcdef"


@pytest.fixture
def weights() -> str:
    return "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "a store with 'quotes' $(and) ünïcode")


@pytest.fixture
def directory(store: Store, weights: str) -> Path:
    """Where the rows of `weights` are."""
    return store.path / "weights" / weights


@pytest.fixture
def owner() -> Owner:
    return Owner.here(run="test")


@pytest.fixture
def dead_owner(owner: Owner) -> Owner:
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return dataclasses.replace(owner, pid=child.pid)


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Mounts something, and unmounts it after the test. Skips where mounting is not allowed."""
    made: list[Path] = []

    def do(point: Path, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(point)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
        if point not in made:
            made.append(point)

    yield do
    for point in reversed(made):
        subprocess.run(["umount", str(point)], check=True)
