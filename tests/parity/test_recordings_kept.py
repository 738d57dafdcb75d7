"""lm-eval's tasks: what they read is found out, and only while all of it is as it was, they are not recorded again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from proctor import api
from proctor.api.context import RunContext
from proctor.api.recording import Recorded, harness, kept, record
from proctor.interpreters import module_command
from proctor.processes.resident import Residents

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1200), pytest.mark.xdist_group("recordings kept")]

NAMES = ("e2e_shuffled", "e2e_hellaswag_5", "e2e_group")
PATIENCE_S = 300.0


class Place:
    """Tasks and data that may be edited, and a run over them."""

    def __init__(self, commands: Any, root: Path) -> None:
        self._commands = commands
        self.root, self.tasks, self.data = root, root / "tasks", root / "data"
        shutil.copytree(commands.tasks, self.tasks)
        shutil.copytree(commands.tasks.parent / "data", self.data)
        for file in self.tasks.glob("*.yaml"):
            self.edit(file, str(commands.tasks.parent / "data"), str(self.data))

    def edit(self, file: Path, old: str, new: str) -> None:
        file.write_text(file.read_text().replace(old, new))

    def config(self, *names: str) -> Path:
        return self._commands.write_run(
            self.root,
            models={"tiny": {"path": str(self._commands.models / "tiny")}},
            tasks=[{"lm_eval": [name], "include_path": [str(self.tasks)]} for name in names],
            engine={"type": "fake"},
        )


@pytest.fixture
def place(commands: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, value in commands.environment.items():
        monkeypatch.setenv(name, value)
    return Place(commands, tmp_path)


def recorded(config: Path) -> Recorded:
    context = RunContext.open(config)
    store = context.store(create=True)
    with harness() as residents:
        return record(context, store, known=kept(context, store), run=residents.run)


def known(config: Path) -> list[bool]:
    context = RunContext.open(config)
    return [one is not None for one in kept(context, context.store(create=True))]


def test_every_file_behind_a_task_counts(place: Place) -> None:
    config = place.config(*NAMES)
    assert known(config) == [False] * 3
    first = recorded(config)
    assert known(config) == [True] * 3
    shuffled, five_shots, group = [True, False, False], [False, True, False], [False, False, True]
    edits: list[tuple[str, str, str, list[bool]]] = [
        ("tasks/e2e_code.py", "at load time", "when loading", shuffled),
        ("data/hellaswag.jsonl", "the", "thee", five_shots),
        ("data/colours_odd.jsonl", "picture", "image", group),
        # All share the directory of YAML files, where names are looked up.
        ("tasks/e2e_base.yaml", "version: 1.0", "version: 1.1", [True, True, True]),
        ("tasks/e2e_hellaswag.yaml", "num_fewshot: 0", "num_fewshot: 1", [True, True, True]),
    ]
    for name, old, new, changed in edits:
        file = place.root / name
        text, stat = file.read_text(), file.stat()
        assert old in text, name
        place.edit(file, old, new)
        assert known(config) == [not c for c in changed], name
        file.write_text(text)
        assert known(config) == [True] * 3, name
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (place.tasks / "e2e_new.yaml").write_text("task: e2e_new\n")
    assert known(config) == [False] * 3
    again = recorded(config)
    assert again.suites == first.suites
    assert known(config) == [True] * 3


def own_python(place: Place, body: str) -> Path:
    """A task whose documents go through `body`, which has `doc` and `here`, the directory of its file."""
    lines = ["import pathlib", "here = pathlib.Path(__file__).parent", body, "def same(dataset):"]
    lines += ["    return dataset.map(change)"]
    (place.tasks / "own.py").write_text("\n".join(lines) + "\n")
    text = (place.tasks / "e2e_shuffled.yaml").read_text()
    text = text.replace("task: e2e_shuffled", "task: own").replace("e2e_code.shuffle_choices", "own.same")
    (place.tasks / "own.yaml").write_text(text)
    return place.config("own")


def test_a_file_that_a_tasks_python_opens_counts(place: Place) -> None:
    extra = place.tasks / "extra.txt"
    extra.write_text("one")
    config = own_python(
        place, "def change(doc): return {'question': doc['question'] + (here / 'extra.txt').read_text()}"
    )
    first = recorded(config)
    assert known(config) == [True]
    extra.write_text("two")
    assert known(config) == [False]
    assert recorded(config).suites != first.suites


@pytest.mark.parametrize(
    "body",
    [
        "import os\ndef change(doc): return {'question': doc['question'] + os.environ.get('WHO', '')}",
        "import time\ndef change(doc): return {'question': doc['question'] + str(time.time() // 1e10)}",
        "import subprocess\ndef change(doc): return {'question': doc['question']}",
        "def change(doc): return {'question': doc['question'] + str((here / 'maybe').exists())}",
    ],
    ids=["environment", "clock", "another program", "a file that may come"],
)
def test_what_cannot_be_seen_is_recorded_each_time(place: Place, body: str) -> None:
    config = own_python(place, body)
    found = recorded(config)
    assert found.inputs == (None,)
    assert known(config) == [False]


def test_a_finished_run_starts_no_harness(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    config = place.config(*NAMES)
    first = asyncio.run(api.run(config))
    assert first.complete
    monkeypatch.setattr(Residents, "_of", never)
    again = asyncio.run(api.run(config))
    assert again.scores.suites == first.scores.suites


def never(*_: object) -> None:
    raise AssertionError("a harness was started")


def test_prepare_records_and_proves_in_one_process_and_a_run_uses_it(place: Place) -> None:
    config = place.config("e2e_group")
    assert [t.task for t in api.prepare(config)] == ["e2e_choice", "e2e_odd", "e2e_choice_2"]
    assert known(config) == [True]


def test_ctrl_c_while_recording_ends_everything(place: Place) -> None:
    started = place.root / "started"
    config = own_python(
        place,
        f"import time\npathlib.Path({str(started)!r}).touch()\ndef change(doc):\n    time.sleep(600)\n    return {{}}",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "proctor", "run", str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    eventually(lambda: started.exists() or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert b"Traceback" not in output, output.decode()
    eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))
    assert not (place.root / "runs" / "parity" / "suites.json").exists()


def test_a_data_set_made_by_a_function_is_recorded_each_time(place: Place) -> None:
    rows = "[{'question': 'q', 'choices': ['a', 'b', 'c'], 'gold': 0}] * 3"
    own_python(
        place,
        f"import datasets\ndef make(**_):\n    rows = datasets.Dataset.from_list({rows})\n"
        "    return {'test': rows, 'train': rows}\ndef change(doc): return {}",
    )
    place.edit(place.tasks / "own.yaml", "process_docs: !function own.same", "custom_dataset: !function own.make")
    config = place.config("own")
    assert recorded(config).inputs == (None,)
    assert known(config) == [False]


NOTICING = """
import lm_eval, datasets
from types import SimpleNamespace
from proctor.catalog.lm_eval.reads import Reads

COMMIT, OTHER = "a" * 40, "b" * 40

def noticed(files=None, repo=None, commit=None, revision=None):
    reads = Reads([])
    config = SimpleNamespace(data_files=files)
    reads.builder(SimpleNamespace(config=config, repo_id=repo, hash=commit, dataset_name="name"))
    report = reads.report()
    return report["hubs"], report["unknown"], [path for path, _ in report["files"]]

hub = f"hf://datasets/org/name@{COMMIT}/data/test.parquet"
assert noticed({"test": [hub, hub]}) == ([["org/name", COMMIT, False]], [], [])
assert noticed({"test": [f"hf://datasets/name@{OTHER}/x"]})[0] == [["name", OTHER, False]]
assert noticed({"test": ["/data/a.json"], "train": ["file:///data/b.json"]})[2] == ["/data/a.json", "/data/b.json"]
assert noticed({"test": ["https://elsewhere/a.json"]}) == ([], ["https://elsewhere/a.json"], [])
assert noticed(None, "org/name", COMMIT) == ([["org/name", COMMIT, False]], [], [])  # prepared before, read offline
assert noticed(None, "org/name", "0123456789abcdef")[1] == ["where the data of 'name' is from"]
assert noticed(None)[1] == ["where the data of 'name' is from"]

import socket
reads = Reads([])
with socket.socket() as one:
    one.settimeout(0.01)
    try:
        one.connect(("127.0.0.1", 9))
    except OSError:
        pass
assert reads.report()["unknown"] == ["the network"]
"""


def test_where_data_sets_come_from_is_noticed(commands: Any) -> None:
    command = module_command(commands.python, "unused")
    done = subprocess.run([commands.python, "-c", NOTICING], env=dict(command.env), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


SEEDING = """
import sys
from proctor.catalog.lm_eval import session

session.seed_torch(5)
session.seed_torch(7)
assert "torch" not in sys.modules
import torch
late = torch.rand(3)
torch.manual_seed(7)
assert torch.equal(late, torch.rand(3))
session.seed_torch(9)
late = torch.rand(3)
torch.manual_seed(9)
assert torch.equal(late, torch.rand(3))
"""


def test_torch_is_seeded_when_it_is_imported(commands: Any) -> None:
    command = module_command(commands.python, "unused")
    done = subprocess.run([commands.python, "-c", SEEDING], env=dict(command.env), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
