"""What the lm_eval source does before any lm-eval runs: finding it, naming what shapes a recording, failing well."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proctor.api.recording import harness
from proctor.catalog.lm_eval import fake
from proctor.catalog.lm_eval.location import PROVEN, locate
from proctor.catalog.lm_eval.source import LmEvalSource, entry_settings
from proctor.config.spec import LmEvalTask
from proctor.errors import MissingTool, TaskError
from proctor.records import Kind


def environment(root: Path, version: str | None) -> str:
    """Something that looks like a virtual environment with that version of lm-eval."""
    (root / "bin").mkdir(parents=True)
    (root / "pyvenv.cfg").write_text("home = /nowhere\n")
    python = root / "bin" / "python"
    python.write_text("#!/bin/sh\necho \"No module named 'lm_eval'\" >&2\nexit 1\n")
    python.chmod(0o755)
    if version is not None:
        (root / "lib" / "python3.11" / "site-packages" / f"lm_eval-{version}.dist-info").mkdir(parents=True)
    return str(python)


def test_an_environment_is_read_without_starting_its_interpreter(tmp_path: Path) -> None:
    found = locate(environment(tmp_path, PROVEN))
    assert found is not None
    assert found.version == PROVEN


def test_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingTool, match=r"0\.4\.9.*0\.4\.13"):
        locate(environment(tmp_path, "0.4.9"))


def test_an_environment_without_lm_eval_says_how_to_install_it(tmp_path: Path) -> None:
    python = environment(tmp_path, None)
    with pytest.raises(MissingTool) as caught:
        LmEvalSource(python).list()
    assert "lm-eval" in caught.value.message
    assert "pip install" in str(caught.value.hint)


def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingTool, match="no-python"):
        LmEvalSource(str(tmp_path / "no-python")).list()


def test_an_include_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    spec = LmEvalTask(
        lm_eval=("x",), include_path=(str(tmp_path / "none"),), python=environment(tmp_path / "e", PROVEN)
    )
    with pytest.raises(TaskError, match="none"):
        LmEvalSource().record(spec)


def test_relative_include_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry_settings(LmEvalTask(lm_eval=("x",), include_path=("my tasks",)))["include_path"] == [
        str(tmp_path / "my tasks")
    ]


def test_the_name_of_a_task_cannot_be_overridden() -> None:
    with pytest.raises(TaskError, match="task"):
        entry_settings(LmEvalTask(lm_eval=("x",), overrides={"task": "y"}))


def test_child_modules_need_nothing_of_ours(tmp_path: Path) -> None:
    # The harness's environment has none of our dependencies: only the package itself is on the path.
    link = tmp_path / "proctor"
    link.symlink_to(Path(fake.__file__).parents[2])
    modules = ["chat", "documents", "fake", "forks", "wire"]
    code = "\n".join(f"import proctor.catalog.lm_eval.{name}" for name in modules)
    env = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-S", "-c", code], env=env, check=True)


def test_made_up_answers_depend_on_the_question_only() -> None:
    keys = [f"{n:02x}" * 32 for n in range(40)]
    assert [fake.answer(Kind.GENERATE, k) for k in keys] == [fake.answer(Kind.GENERATE, k) for k in keys]
    pairs = [fake.answer(Kind.LOGLIKELIHOOD, k) for k in keys]
    assert len(set(pairs)) == len(keys)
    assert {greedy for _, greedy in pairs} == {True, False}  # type: ignore[misc]


def test_an_interpreter_without_lm_eval_outside_an_environment_is_told_so(tmp_path: Path) -> None:
    program = tmp_path / "some-python"
    program.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'lm_eval'\" >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(MissingTool, match="some-python has no lm-eval"):
        LmEvalSource(str(program)).list()
    with harness() as residents, pytest.raises(MissingTool, match="some-python has no lm-eval"):
        LmEvalSource(str(program), run=residents.run).list()


# --- what decides whether it is recorded again ---


def test_the_key_of_an_entry_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = environment(tmp_path / "one", PROVEN), environment(tmp_path / "two", PROVEN)
    spec = LmEvalTask(lm_eval=("x",), python=first)
    source = LmEvalSource()
    key = source.input_key(spec)
    assert key is not None
    assert source.input_key(spec) == key
    others = [
        source.input_key(spec.model_copy(update={"num_fewshot": 5})),
        source.input_key(spec.model_copy(update={"python": second})),
    ]
    monkeypatch.chdir(tmp_path)  # names may be files of the working directory
    others.append(source.input_key(spec))
    os.utime(tmp_path / "one" / "lib" / "python3.11" / "site-packages" / f"lm_eval-{PROVEN}.dist-info", (1, 1))
    others.append(source.input_key(spec))
    assert len({key, *others}) == 5
    assert None not in others


def test_an_interpreter_that_must_be_started_to_be_known_has_no_key(tmp_path: Path) -> None:
    program = tmp_path / "some-python"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    assert LmEvalSource().input_key(LmEvalTask(lm_eval=("x",), python=str(program))) is None


def test_added_tasks_are_listed_without_reading_lm_evals_own_again(tmp_path: Path) -> None:
    asked: list[tuple[bool, list[str]]] = []

    def run(_python: str | None, _module: str, _directory: Path, job: Mapping[str, Any], **_: object) -> Any:
        asked.append((job["own"], [Path(path).name for path in job["include_path"]]))
        row = [path.stem for place in job["include_path"] for path in sorted(Path(place).glob("*.yaml"))]
        return {
            "version": PROVEN,
            "metadata": str(tmp_path),
            "own": [["a", "task", "own/a.yaml", [], []], ["b", "task", "own/b.yaml", [], []]] if job["own"] else None,
            "added": [[name, "task", f"added/{name}.yaml", [], []] for name in row],
        }

    source = LmEvalSource(environment(tmp_path / "e", PROVEN), run=run)
    for name, tasks in (("first", "bc"), ("second", "d")):
        (tmp_path / name).mkdir()
        for task in tasks:
            (tmp_path / name / f"{task}.yaml").touch()

    def listed(*names: str) -> dict[str, str]:
        return {i.name: i.path for i in source.list(include=[str(tmp_path / n) for n in names])}

    first = {"a": "own/a.yaml", "b": "added/b.yaml", "c": "added/c.yaml"}
    assert listed("first") == listed("first") == first
    assert listed("second") == {"a": "own/a.yaml", "b": "own/b.yaml", "d": "added/d.yaml"}
    assert listed() == {"a": "own/a.yaml", "b": "own/b.yaml"}
    assert listed("first", "second") == {**first, "d": "added/d.yaml"}
    assert asked == [(True, ["first"]), (False, ["second"]), (False, ["first", "second"])]
    (tmp_path / "first" / "e.yaml").touch()
    assert listed("first") == {**first, "e": "added/e.yaml"}
