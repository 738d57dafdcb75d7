"""Marks made while others are asked are those of the end; what is remembered is used for the very same only."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proctor.api.marking import Ahead, Memory
from proctor.api.recording import Recorded
from proctor.api.scoring import Scores, score_run
from proctor.api.targets import Target
from proctor.errors import HarnessError
from proctor.records import Answer, Instance, Kind, Recording, Request, Suite, canonical_json
from proctor.score.native import NativeReplay
from proctor.score.replay import Marks

from .conftest import Desk, Reply, Room, says


@dataclass
class Harness:
    """Stands for lm-eval's side: marks a document right if its answer is `yes`; counts the suites it was given."""

    given: list[str] = field(default_factory=list[str])
    polite: int = 0
    broken: bool = False

    def start(self, python: str | None) -> None:
        assert python is None

    def run(self, python: str | None, module: str, directory: Path, job: Mapping[str, Any], **_: object) -> Any:
        assert module == "proctor.catalog.lm_eval.replay"
        if self.broken:
            raise HarnessError("out of order")
        return {"version": "0.4.13", "suites": [self._mark(directory, n, s) for n, s in enumerate(job["suites"])]}

    def politely(self, *args: Any, **more: Any) -> Any:
        self.polite += 1
        return self.run(*args, **more)

    def _mark(self, directory: Path, number: int, suite: Mapping[str, Any]) -> Any:
        (leaf,) = suite["leaves"]
        self.given.append(leaf["task"])
        rows = [json.loads(line) for line in (directory / leaf["instances"]).read_text().splitlines()]
        right = {row[1]: row[3] == ["yes"] for row in rows}
        samples = [
            {"task": leaf["task"], "doc_id": d, "filter": "none", "target": "yes\u2028", "filtered_resps": ["x"]}
            | {"metrics": {"acc": float(good)}}
            for d, good in right.items()
        ]
        (directory / f"{number}.samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        value = sum(right.values()) / len(right) if right else None
        results = {leaf["task"]: {"acc,none": value, "acc_stderr,none": 0.1}} if right else {}
        raw = {"results": results, "higher_is_better": {leaf["task"]: {"acc": True}}, "n-shot": {}, "versions": {}}
        (directory / f"{number}.raw.json").write_text(json.dumps(raw))
        return {"empty": {} if right else {leaf["task"]: [["acc", "none", True]]}}


def suite_of(name: str, documents: int) -> tuple[Suite, Recording]:
    instances = []
    for n in range(documents):
        request = Request(kind=Kind.GENERATE, text=f"{name} {n}")
        instances.append(Instance(request=request, key=request.key, doc_id=n, index=0))
    recording = Recording(
        fingerprint=f"recording-{name}",
        source="lm_eval",
        source_version="0.4.13",
        task=name,
        task_version="1",
        num_fewshot=0,
        settings=canonical_json({"config": name}),
        instances=tuple(instances),
        documents="{}",
    )
    settings = canonical_json({"groups": {}, "python": None})
    suite = Suite(
        id=f"suite-{name}",
        source="lm_eval",
        names=(name,),
        num_fewshot=None,
        recordings=(recording.fingerprint,),
        settings=settings,
    )
    return suite, recording


@pytest.fixture
def desk(room: Room, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A run of two suites of lm-eval."""
    monkeypatch.setattr("proctor.api.marking.LOOK_S", 0.02)
    desk = Desk.open(room.run([{"native": room.task("t", ["a"])}]))
    pairs = [suite_of("one", 3), suite_of("two", 4)]
    for suite, recording in pairs:
        desk.store.write_recording(recording)
        desk.store.write_suite(suite)
    desk.recorded = Recorded(
        suites=tuple(s for s, _ in pairs),
        recordings={r.fingerprint: r for _, r in pairs},
        known=frozenset(s.id for s, _ in pairs),
    )
    return desk


def of_task(name: str, text: str) -> Reply:
    return lambda i: says(text)(i) if i.request.text.startswith(name) else None


def scored(desk: Desk, harness: Harness, memory: Memory | None = None) -> Scores:
    return score_run(desk.context, desk.store, desk.targets, desk.recorded, memory=memory, run=harness.run)


def ahead(desk: Desk, harness: Harness, memory: Memory, then: Callable[[list[str]], bool]) -> list[str]:
    """Mark in the background until `then` says of the suites marked so far that it is enough."""
    told: list[str] = []

    def ready(target: Target, name: str, marks: Marks) -> None:
        assert marks.values
        told.append(f"{target.id} {name}")

    async def work() -> None:
        worker = Ahead(store=desk.store, residents=harness, memory=memory, ready=ready)  # type: ignore[arg-type]
        async with asyncio.timeout(30), worker.working(desk.targets, desk.recorded):
            while not then(told):
                await asyncio.sleep(0.01)

    asyncio.run(work())
    return told


def test_marks_made_ahead_are_those_of_the_end(desk: Desk) -> None:
    desk.answer(of_task("one", "yes"))
    desk.answer(lambda i: says("no")(i) if i.request.text == "two 1" else None)
    harness, memory = Harness(), Memory(desk.context, desk.recorded)
    assert ahead(desk, harness, memory, lambda told: bool(told)) == ["m one"]
    assert (harness.given, harness.polite) == (["one"], 1)
    desk.answer(of_task("two", "yes"))
    found = scored(desk, harness, memory)
    assert harness.given == ["one", "two"]
    at_once = Harness()
    assert scored(desk, at_once).suites == found.suites
    assert at_once.given == ["one", "two"]
    assert [(r.task, r.value, r.n) for r in found.rows] == [("one", 1.0, 3), ("two", 0.75, 4)]


def test_a_suite_is_marked_ahead_when_its_last_answer_is_there(desk: Desk) -> None:
    desk.answer(lambda i: says("yes")(i) if i.doc_id else None)
    harness, memory = Harness(), Memory(desk.context, desk.recorded)

    def enough(told: list[str]) -> bool:
        if not told and not harness.given:
            desk_answers_in_a_thread(desk)
        return len(told) == 2

    assert ahead(desk, harness, memory, enough) == ["m one", "m two"]
    assert sorted(harness.given) == ["one", "two"]


def desk_answers_in_a_thread(desk: Desk) -> None:
    work = threading.Thread(target=desk.answer, args=(says("yes"),))
    work.start()
    work.join()


@pytest.fixture
def native(room: Room, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A run of two native tasks."""
    monkeypatch.setattr("proctor.api.marking.LOOK_S", 0.02)
    return Desk.open(room.run([{"native": [room.task("one", ["a", "b"]), room.task("two", ["c", "d"])]}]))


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The native tasks that are marked from now on."""
    names: list[str] = []
    mark = NativeReplay.mark_one

    def counted(self: NativeReplay, recording: Recording, answers: Mapping[str, Answer]) -> Marks:
        names.append(recording.task)
        return mark(self, recording, answers)

    monkeypatch.setattr(NativeReplay, "mark_one", counted)
    return names


def of_words(text: str, *words: str) -> Reply:
    return lambda i: says(text)(i) if any(word in i.request.text for word in words) else None


def test_native_tasks_are_marked_ahead(native: Desk, marked: list[str]) -> None:
    """Each for itself, also those of one entry."""
    harness, memory = Harness(), Memory(native.context, native.recorded)
    native.answer(of_words("yes", "Say a", "Say b", "Say c"))
    assert ahead(native, harness, memory, lambda told: bool(told)) == ["m one"]
    native.answer(of_words("no", "Say d"))
    found = scored(native, harness, memory)
    assert marked == ["one", "two"]
    assert [(r.task, r.value, r.n) for r in found.rows] == [("one", 1.0, 2), ("two", 0.5, 2)]
    assert native.score().suites == found.suites


def test_native_marks_of_other_answers_are_not_used(native: Desk, marked: list[str]) -> None:
    memory = Memory(native.context, native.recorded)
    native.answer(of_words("yes", "Say a", "Say b"))
    ahead(native, Harness(), memory, lambda told: bool(told))
    shutil.rmtree(native.store.path / "weights")
    native.answer(says("no"))
    found = scored(native, Harness(), memory)
    assert [(r.value, r.n) for r in found.rows] == [(0.0, 2), (0.0, 2)]
    assert marked == ["one", "one", "two"]


def test_what_fails_ahead_fails_at_the_end_and_not_before(desk: Desk) -> None:
    desk.answer(says("yes"))
    harness, memory = Harness(broken=True), Memory(desk.context, desk.recorded)
    assert ahead(desk, harness, memory, lambda _: harness.polite > 0) == []
    with pytest.raises(HarnessError, match="out of order"):
        scored(desk, harness, memory)
    harness.broken = False
    assert scored(desk, harness, memory).complete


def test_the_next_run_asks_nothing_that_was_said(desk: Desk) -> None:
    desk.answer(says("yes"))
    first = scored(desk, Harness(), Memory(desk.context, desk.recorded))
    idle = Harness(broken=True)
    assert scored(desk, idle, Memory(desk.context, desk.recorded)).suites == first.suites
    assert json.dumps([s.target for s in first.suites[0].samples]) == json.dumps(["yes\u2028"] * 3)


def test_other_answers_are_marked_again(desk: Desk) -> None:
    desk.answer(lambda i: says("yes")(i) if i.doc_id else None)
    scored(desk, Harness(), Memory(desk.context, desk.recorded))
    desk.answer(of_task("two", "no"))
    harness = Harness()
    found = scored(desk, harness, Memory(desk.context, desk.recorded))
    assert harness.given == ["two"]
    assert [(r.task, r.value, r.n) for r in found.rows] == [("one", 1.0, 2), ("two", 0.75, 4)]
    (file,) = (desk.context.directory.root / "marks").iterdir()
    assert len(json.loads(gzip.decompress(file.read_bytes()))["said"]) == 2  # the latest of each suite


def test_suites_whose_inputs_are_unknown_are_not_remembered(desk: Desk) -> None:
    desk.answer(says("yes"))
    desk.recorded = Recorded(
        suites=desk.recorded.suites, recordings=desk.recorded.recordings, known=frozenset({"suite-one"})
    )
    scored(desk, Harness(), Memory(desk.context, desk.recorded))
    harness = Harness()
    scored(desk, harness, Memory(desk.context, desk.recorded))
    assert harness.given == ["two"]


# Without the time that gzip notes: pytest's workers must name the same tests.
@pytest.mark.parametrize("damage", [b"", b"rubbish", gzip.compress(b'{"format": 1, "said": [{}]}', mtime=0)])
def test_a_damaged_memory_is_none(desk: Desk, damage: bytes) -> None:
    desk.answer(says("yes"))
    first = scored(desk, Harness(), Memory(desk.context, desk.recorded))
    (file,) = (desk.context.directory.root / "marks").iterdir()
    file.write_bytes(damage)
    harness = Harness()
    assert scored(desk, harness, Memory(desk.context, desk.recorded)).suites == first.suites
    assert harness.given == ["one", "two"]
