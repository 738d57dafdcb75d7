"""Summaries of what is answered: exact, quick, and never believed when the files have changed."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from proctor.records import Boundary, Failure, Instance, Kind, Recording, Request, Response
from proctor.store import Owner, Store, completion

WEIGHTS, RESOLUTION = "f" * 64, "0123456789abcdef"


def recording(count: int) -> Recording:
    requests = [Request(kind=Kind.GENERATE, text=f"question {n}", arguments='{"max_gen_toks":8}') for n in range(count)]
    return Recording(
        fingerprint="a" * 64,
        source="native",
        source_version="1",
        task="t",
        task_version="1",
        num_fewshot=0,
        settings="{}",
        instances=tuple(Instance(request=r, key=r.key, doc_id=n, index=0) for n, r in enumerate(requests)),
        documents="[]",
    )


def answer(store: Store, instances: Iterable[Instance], *, failing: bool = False) -> None:
    async def work() -> None:
        async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as writer:
            for one in instances:
                if failing:
                    failure = Failure(key=one.key, boundary=Boundary.REFUSED, message="no", retryable=False)
                    await writer.append(failure)
                else:
                    found = Response(
                        key=one.key, physical_key=one.key, text="x", prompt_tokens=7, completion_tokens=3, created=1.0
                    )
                    await writer.append(found)

    asyncio.run(work())


def look(store: Store, *, measure: bool = False) -> tuple[list[int], list[int], completion.Completion]:
    outline = store.recording_outline("a" * 64)
    found = store.completion(WEIGHTS, RESOLUTION, {"a" * 64: outline}, measure=measure)
    bits = [np.flatnonzero(np.unpackbits(b["a" * 64], count=len(outline))) for b in (found.answered, found.failed)]
    return bits[0].tolist(), bits[1].tolist(), found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(completion, "KEEP_ROWS", 5)
    store = Store.open(tmp_path / "store")
    store.write_recording(recording(20))
    return store


def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories whose answers are opened from now on."""
    seen: list[Path] = []
    real = completion.Answers

    def counting(directory: Path, *args: object, **kwargs: object) -> object:
        seen.append(directory)
        return real(directory, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(completion, "Answers", counting)
    return seen


def test_a_finished_model_is_not_opened_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = recording(20).instances
    answer(store, instances[:12])
    answer(store, instances[12:14], failing=True)
    seen = opened(monkeypatch)
    first = look(store, measure=True)
    assert first[:2] == (list(range(12)), [12, 13])
    lengths = first[2].lengths["a" * 64]
    assert (lengths.answers, lengths.prompt_tokens, lengths.completion_tokens, lengths.caps) == (12, 84, 36, 96)
    again = look(store, measure=True)
    assert again[:2] == first[:2]
    assert again[2].lengths == first[2].lengths
    assert len(seen) == 1


def test_new_answers_compaction_and_missing_files_are_seen(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = recording(20).instances
    answer(store, instances[:10])
    seen = opened(monkeypatch)
    look(store)
    answer(store, instances[10:12])
    assert look(store)[0] == list(range(12))
    store.compact(WEIGHTS)
    assert look(store)[0] == list(range(12))
    assert len(seen) == 3
    for part in (store.path / "weights" / WEIGHTS).glob("part-*"):
        part.unlink()
    assert look(store)[0] == []


def test_a_damaged_or_foreign_summary_is_not_believed(store: Store) -> None:
    answer(store, recording(20).instances[:10])
    look(store)
    (path,) = (store.path / "weights" / WEIGHTS).glob("done-*.bits")
    whole = path.read_bytes()
    for bad in (whole[:-1], whole.replace(b'"damaged": 0', b'"damaged": 9'), b"", b"{}\n", b"[1]\n\0"):
        path.write_bytes(bad)
        found = look(store)
        assert found[0] == list(range(10))
        assert found[2].damaged == 0


def test_a_model_without_answers_costs_no_file(store: Store) -> None:
    assert look(store)[:2] == ([], [])
    assert not (store.path / "weights").exists()
