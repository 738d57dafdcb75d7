"""`prepare` over lm-eval's tasks: all at once, all that is wrong is named, and what marking needs is remembered."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor import api
from proctor.errors import UsageError

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

CODE = '''
import json
import pathlib
import time

from lm_eval.api.task import ConfigurableTask

HERE = pathlib.Path(__file__).parent


def meet(who, where):
    """Return when both have come here: only side by side can they."""
    (HERE / f"{where}-{who}").touch()
    until = time.monotonic() + 120
    while len(list(HERE.glob(f"{where}-*"))) < 2:
        assert time.monotonic() < until, f"{who} is alone at {where}"
        time.sleep(0.02)


def one_is_built(dataset):
    meet("one", "built")
    return dataset


def two_is_built(dataset):
    meet("two", "built")
    return dataset


def one_is_marked(doc, results):
    meet("one", "marked")
    return {"acc": 1.0}


def two_is_marked(doc, results):
    meet("two", "marked")
    return {"acc": 1.0}


def fails(dataset):
    raise ValueError("no colours to-day")


def of_the_clock(doc, results):
    return {"acc": float(time.monotonic_ns())}


class NeedsData(ConfigurableTask):
    """Marks an answer by how many documents there are."""

    VERSION = 1
    DATASET_PATH = "json"

    def __init__(self, config=None):
        files = {"test": str(HERE / "colours.jsonl")}
        super().__init__(config={"metadata": {"version": 1}, "dataset_kwargs": {"data_files": files},
                                 "test_split": "test", "doc_to_text": "Q: {{question}}\\nA:", "doc_to_target": "gold",
                                 "doc_to_choice": "choices", "output_type": "multiple_choice"})

    def process_results(self, doc, results):
        return {"acc": float(len(self.dataset["test"]))}
'''
BASE: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}],
    "metadata": {"version": 1},
}


class Bench:
    """Tasks made for one test."""

    def __init__(self, commands: Any, root: Path) -> None:
        self.root, self._commands = root, commands
        self.tasks = root / "its tasks"
        self.tasks.mkdir()
        (self.tasks / "own.py").write_text(CODE)
        rng = random.Random(1)
        rows = [{"question": f"Which {n}?", "choices": ["red", "blue"], "gold": rng.randrange(2)} for n in range(6)]
        (self.tasks / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(self, name: str, **functions: str) -> str:
        data = {"data_files": {"test": str(self.tasks / "colours.jsonl")}}
        text = yaml.safe_dump(BASE | {"task": name, "dataset_kwargs": data})
        text += "".join(f"{key}: !function own.{function}\n" for key, function in functions.items())
        (self.tasks / f"{name}.yaml").write_text(text)
        return name

    def group(self, name: str, *members: str) -> str:
        (self.tasks / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": list(members)}))
        return name

    def python_task(self, name: str, cls: str) -> str:
        (self.tasks / f"{name}.yaml").write_text(f"task: {name}\nclass: !function own.{cls}\n")
        return name

    def config(self, *entries: str | list[str]) -> Path:
        return self._commands.write_run(
            self.root,
            models={"tiny": {"path": str(self._commands.models / "tiny")}},
            tasks=[{"lm_eval": entry, "include_path": [str(self.tasks)]} for entry in entries],
            engine={"type": "fake"},
        )


def two_cores(_: int) -> set[int]:
    return {0, 1}


@pytest.fixture
def bench(commands: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name, value in commands.environment.items():
        monkeypatch.setenv(name, value)
    # Two at a time on a machine with one core as well.
    monkeypatch.setattr("os.sched_getaffinity", two_cores)
    return Bench(commands, tmp_path)


def test_the_tasks_of_one_suite_are_recorded_and_proven_side_by_side(bench: Bench) -> None:
    one = bench.task("one", process_docs="one_is_built", process_results="one_is_marked")
    two = bench.task("two", process_docs="two_is_built", process_results="two_is_marked")
    prepared = api.prepare(bench.config(bench.group("both", one, two)))
    assert [(t.task, t.requests, t.labels) for t in prepared] == [("one", 12, ()), ("two", 12, ())]


def test_every_task_that_is_wrong_is_named(bench: Bench) -> None:
    names = [bench.task("good"), bench.task("broken", process_docs="fails")]
    members = [bench.task(f"clock_{n}", process_results="of_the_clock") for n in range(2)]
    config = bench.config(names, ["unknown_a", "unknown_b"], bench.group("clocks", *members, bench.task("fine")))
    with pytest.raises(UsageError) as caught:
        api.prepare(config)
    said = str(caught.value)
    for words in ("'broken'", "no colours to-day", "'unknown_a'", "'unknown_b'", "task 'clock_0'", "task 'clock_1'"):
        assert words in said, said
    assert "'good'" not in said
    assert "'fine'" not in said
    assert said.count("no colours to-day") == 1


def test_a_task_that_is_marked_with_its_data_is_marked_so(bench: Bench) -> None:
    config = bench.config(bench.python_task("needs", "NeedsData"))
    (task,) = api.prepare(config)
    assert task.labels == ("dataset",)
    outcome = asyncio.run(api.run(config))
    (row,) = outcome.scores.rows
    assert (row.metric, row.value) == ("acc", 6.0)
