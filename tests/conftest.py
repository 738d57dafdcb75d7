"""Fixtures of the whole tree."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

# In CI the same examples every time: a new one that fails belongs to whoever runs the tests next, not to a merge.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "default")

Family = Callable[[], list[psutil.Process]]

HOSTILE_NAMES = [
    "two words",
    "quote'and\"double",
    "$(touch pwned)",
    "`id`;&&|",
    "new\nline",
    "ünïcødé-模型-🦊",
    "-leading-dash",
    "per%cent #hash",
]


ORDER = ("unit", "contract", "slurm", "docs", "integration", "parity")
"""What tells most for its time comes first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, so that a machine that is too slow for all of them has run what matters most."""
    here = Path(__file__).parent

    def stage(item: pytest.Item) -> tuple[int, bool]:
        area = item.path.relative_to(here).parts[0]
        return ORDER.index(area) if area in ORDER else len(ORDER), item.get_closest_marker("slow") is not None

    items.sort(key=stage)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """PROCTOR_TEST_UNTIL (Unix time): where whoever runs the tests is stopped then, what has not begun is skipped."""
    until = float(os.environ.get("PROCTOR_TEST_UNTIL", "inf"))
    if time.time() > until:
        pytest.skip("the time for the tests was up before this one began (PROCTOR_TEST_UNTIL)")


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """PROCTOR_TEST_END (Unix time): no test goes on after it, so that the others' results are printed."""
    end = os.environ.get("PROCTOR_TEST_END")
    if end is not None:
        own = item.get_closest_marker("timeout")
        usual = float(own.args[0]) if own is not None and own.args else float(item.config.getini("timeout") or 600)
        item.add_marker(pytest.mark.timeout(max(30.0, min(usual, float(end) - time.time()))), append=False)
    return (yield)


@pytest.fixture(params=HOSTILE_NAMES, ids=lambda n: n.encode("unicode_escape").decode())
def hostile_name(request: pytest.FixtureRequest) -> str:
    """A name that breaks what was put together by hand."""
    return str(request.param)


@pytest.fixture
def descendants() -> Family:
    """The processes below this one that have been started since the test began: a cluster may be up beside it."""
    before = set(psutil.Process().children())

    def family() -> list[psutil.Process]:
        new = [child for child in psutil.Process().children() if child not in before]
        return [*new, *(process for child in new for process in child.children(recursive=True))]

    return family


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a Proctor cache of its own, unless it asks for the shared one."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PROCTOR_CACHE", str(directory))
    return directory
