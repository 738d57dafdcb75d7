"""A module in a child process: its result, its errors by class, its log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from proctor import errors
from proctor.processes.exchange import run_module


def module(directory: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that does `body` with `job` and `directory`; found through PYTHONPATH."""
    lines = ["import json, pathlib, sys", "directory = pathlib.Path(sys.argv[1])"]
    lines += ["job = json.loads((directory / 'job.json').read_text())", body]
    (directory / "childish.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(directory))
    return "childish"


def test_a_result_comes_back_and_leaves_no_log(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "print('noise'); (directory / 'result.json').write_text(json.dumps([job['n'] + 1]))"
    assert run_module(None, module(tmp_path, body, monkeypatch), tmp_path, {"n": 41}) == [42]
    assert list((own_cache / "logs").iterdir()) == []


def test_an_error_comes_back_as_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = "{'class': 'TaskError', 'message': 'task x is odd', 'hint': 'do y'}"
    body = f"(directory / 'error.json').write_text(json.dumps({report})); sys.exit(1)"
    with pytest.raises(errors.TaskError, match="task x is odd") as caught:
        run_module(None, module(tmp_path, body, monkeypatch), tmp_path, {})
    assert caught.value.hint == "do y"


def test_a_child_that_dies_leaves_its_last_words_and_its_log(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "print('last words', file=sys.stderr, flush=True); import os; os.kill(os.getpid(), 9)"
    with pytest.raises(errors.HarnessError, match=r"(?s)status 137.*last words") as caught:
        run_module(None, module(tmp_path, body, monkeypatch), tmp_path, {})
    (log,) = (own_cache / "logs").iterdir()
    assert str(log) in str(caught.value.hint)


def test_ending_without_a_result_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.HarnessError, match="status 0"):
        run_module(None, module(tmp_path, "pass", monkeypatch), tmp_path, {})


def test_the_interpreter_is_ours_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "(directory / 'result.json').write_text(json.dumps(sys.executable))"
    assert run_module(None, module(tmp_path, body, monkeypatch), tmp_path, {}) == sys.executable
