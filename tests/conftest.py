"""Fixtures of the whole tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# In CI the same examples every time: a new one that fails belongs to whoever runs the tests next, not to a merge.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "default")

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


@pytest.fixture(params=HOSTILE_NAMES, ids=lambda n: n.encode("unicode_escape").decode())
def hostile_name(request: pytest.FixtureRequest) -> str:
    """A name that breaks what was put together by hand."""
    return str(request.param)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a Proctor cache of its own, unless it asks for the shared one."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PROCTOR_CACHE", str(directory))
    return directory
