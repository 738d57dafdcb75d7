"""What has not changed is not recorded again; what has is noticed by every verb that reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from proctor import api
from proctor.api.context import RunContext
from proctor.api.recording import Recorded, kept, record, recorded, recorded_before
from proctor.catalog.native import NativeSource
from proctor.errors import StoreError, TaskError, UsageError
from proctor.store import Store

from .conftest import Desk, Room, says

WORDS = ["a", "b", "c", "d"]


class Bureau:
    """One configuration and its store; `record` as a run does it."""

    def __init__(self, config: Path) -> None:
        self.context = RunContext.open(config)
        self.store: Store = self.context.store(create=True)

    def record(self) -> Recorded:
        return record(self.context, self.store, known=kept(self.context, self.store))

    @property
    def known(self) -> list[bool]:
        return [one is not None for one in kept(self.context, self.store)]


@pytest.fixture
def bureau(room: Room) -> Bureau:
    return Bureau(room.run([{"native": room.task("t", WORDS)}]))


def never(*_: object) -> None:
    raise AssertionError("recorded again")


def test_what_is_unchanged_is_not_recorded_again(bureau: Bureau, room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bureau.known == [False]
    first = bureau.record()
    assert bureau.known == [True]
    (room.root / "t.jsonl").touch()
    monkeypatch.setattr(NativeSource, "make", never)
    second = bureau.record()
    assert second.suites == first.suites
    assert dict(second.recordings) == dict(first.recordings)


def test_without_what_is_known_everything_is_recorded_anew(bureau: Bureau, monkeypatch: pytest.MonkeyPatch) -> None:
    bureau.record()
    monkeypatch.setattr(NativeSource, "make", never)
    with pytest.raises(AssertionError, match="recorded again"):
        record(bureau.context, bureau.store)


@pytest.mark.parametrize("name", ["t.yaml", "t.jsonl"])
def test_an_edited_file_is_recorded_and_noticed(bureau: Bureau, room: Room, name: str) -> None:
    bureau.record()
    file = room.root / name
    file.write_text(file.read_text().replace("Say", "Cry").replace('"b"', '"x"'))
    assert bureau.known == [False]
    for verb in (api.status, api.score):
        with pytest.raises(UsageError, match=name) as caught:
            verb(bureau.context.config)
        assert "proctor prepare" in str(caught.value.hint)
    before = {s.id for s in recorded_suites_of(bureau)}
    api.plan(bureau.context.config)
    assert {s.id for s in recorded_suites_of(bureau)}.isdisjoint(before)


def recorded_suites_of(bureau: Bureau) -> tuple[object, ...]:
    ids = json.loads(bureau.context.directory.suites.read_text())["suites"]
    return tuple(bureau.store.read_suite(i) for i in ids)


def test_the_few_shot_file_counts_too(room: Room) -> None:
    (room.root / "shots.jsonl").write_text('{"word": "z"}\n')
    fewshot = {"num": 1, "path": "shots.jsonl"}
    bureau = Bureau(room.run([{"native": room.task("t", WORDS, fewshot=fewshot)}]))
    bureau.record()
    assert bureau.known == [True]
    (room.root / "shots.jsonl").write_text('{"word": "y"}\n')
    assert bureau.known == [False]


def test_only_the_entry_that_changed_is_recorded(room: Room) -> None:
    entries = [{"native": room.task("one", WORDS)}, {"native": room.task("two", ["e"])}]
    bureau = Bureau(room.run(entries))
    bureau.record()
    room.task("two", ["f"])
    assert bureau.known == [True, False]
    other = Bureau(room.run([entries[0] | {"limit": 2}, entries[1]]))
    assert other.known == [False, False]


def test_a_run_does_not_take_another_runs_recording_for_its_own(room: Room) -> None:
    mine = Bureau(room.run([{"native": room.task("t", WORDS)}]))
    mine.record()
    room.task("t", ["other"])
    theirs = Bureau(room.run([{"native": "t.yaml"}], name="theirs"))
    theirs.record()
    with pytest.raises(UsageError, match="changed since"):
        recorded(mine.context, mine.store)
    mine.record()
    assert recorded(mine.context, mine.store).suites == recorded(theirs.context, theirs.store).suites


def test_files_that_cannot_be_seen_from_here_stop_no_scoring(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(says("yes"))
    (room.root / "t.jsonl").unlink()
    assert api.score(desk.context.config).complete


@pytest.mark.parametrize("damage", ["lost recording", "lost suite", "rubbish", "other format"])
def test_what_the_store_does_not_hold_is_recorded_again(bureau: Bureau, damage: str) -> None:
    first = bureau.record()
    (file,) = (bureau.store.path / "inputs").iterdir()
    if damage == "lost recording":
        bureau.store.recording_path(first.suites[0].recordings[0]).unlink()
    elif damage == "lost suite":
        (bureau.store.path / "suites" / f"{first.suites[0].id}.json").unlink()
    elif damage == "rubbish":
        file.write_text('{"format": 1, "suites": []')
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))
    assert bureau.known == [False]
    assert bureau.record().suites == first.suites
    assert bureau.known == [True]


def test_a_data_set_of_a_hub_is_recorded_each_time(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    bureau = Bureau(room.run([{"native": room.task("t", WORDS, dataset={"hub": "org/name"})}]))
    (room.root / "t.jsonl").write_text('{"word": "a"}\n')
    monkeypatch.setattr("proctor.catalog.native.read_rows", read_rows_of_a_file(room))
    bureau.record()
    assert bureau.known == [False]


def read_rows_of_a_file(room: Room) -> object:
    from proctor.catalog.native_rows import read_file

    return lambda *_: read_file(room.root / "t.jsonl")


def test_other_stamps_with_the_same_content_are_remembered(bureau: Bureau, room: Room) -> None:
    bureau.record()
    (file,) = (bureau.store.path / "inputs").iterdir()
    before = file.read_text()
    os.utime(room.root / "t.yaml", (1, 1))
    assert bureau.known == [True]
    assert file.read_text() != before


def test_the_first_entry_that_fails_is_the_one_that_is_named(room: Room) -> None:
    bureau = Bureau(room.run([{"native": name} for name in (room.task("good", WORDS), "bad.yaml", "worse.yaml")]))
    with pytest.raises(TaskError, match=r"bad\.yaml"):
        bureau.record()


def test_recordings_are_read_when_they_are_needed(bureau: Bureau) -> None:
    bureau.record()
    again = bureau.record()
    (fingerprint,) = again.recordings
    bureau.store.recording_path(fingerprint).unlink()
    assert len(again.recordings) == 1
    with pytest.raises(StoreError):
        again.recordings[fingerprint]
    with pytest.raises(KeyError):
        again.recordings["0" * 64]


def test_what_is_recorded_only_for_want_of_knowledge_is_told_from_news(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run whose tasks are recorded each time must not start servers for that."""
    entries = [{"native": room.task("t", WORDS, dataset={"hub": "org/name"})}, {"native": room.task("u", WORDS)}]
    bureau = Bureau(room.run(entries))
    assert recorded_before(bureau.context, bureau.store, kept(bureau.context, bureau.store)) is None
    monkeypatch.setattr("proctor.catalog.native.read_rows", read_rows_of_a_file(room))
    found = bureau.record()
    assert bureau.known == [False, True]
    assert recorded_before(bureau.context, bureau.store, kept(bureau.context, bureau.store)) == found.suites
    room.task("u", ["other"])
    assert recorded_before(bureau.context, bureau.store, kept(bureau.context, bureau.store)) is None


def test_prepare_names_everything_that_is_wrong_and_keeps_what_is_not(room: Room) -> None:
    (room.root / "torn.yaml").write_text("task: torn\nversion: 1\n")
    config = room.run(
        [
            {"native": [room.task("good", WORDS)]},
            {"native": ["none.yaml", "torn.yaml"]},
            {"native": [room.task("one", WORDS, prompt="{{nobody}}"), room.task("two", WORDS, prompt="{{nothing}}")]},
            {"native": [room.task("no_data", WORDS, dataset={"path": "gone.jsonl"})]},
        ]
    )
    with pytest.raises(UsageError) as caught:
        api.prepare(config)
    said = str(caught.value)
    assert all(name in said for name in ("none.yaml", "torn.yaml", "nobody", "nothing", "gone.jsonl")), said
    bureau = Bureau(config)
    assert not bureau.context.directory.suites.exists()
    assert bureau.known == [True, False, False, False]


def test_what_prepare_finds_that_marking_needs_is_kept(bureau: Bureau) -> None:
    (fingerprint,) = bureau.record().recordings
    bureau.store.label_recording(fingerprint, ["dataset"])
    assert bureau.store.read_recording(fingerprint).labels == ("dataset",)
    assert bureau.store.recording_outline(fingerprint).labels == ("dataset",)
    again = record(bureau.context, bureau.store)  # made anew, and remembered nevertheless
    assert again.recordings[fingerprint].labels == ("dataset",)
