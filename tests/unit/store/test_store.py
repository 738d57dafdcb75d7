"""Opening, recordings, suites, identities, scores and the summary."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proctor.errors import StoreError
from proctor.records import (
    Coverage,
    Instance,
    Kind,
    Message,
    Recording,
    Request,
    Response,
    SampleScore,
    ScoreRow,
    Suite,
    digest,
)
from proctor.store import Owner, ScoredSuite, Store


def recording(count: int = 50, documents: str = "[]") -> Recording:
    requests = [
        Request(kind=Kind.LOGLIKELIHOOD, text=f"question {n} ünï\n", continuation=" answer") for n in range(count)
    ]
    requests.append(
        Request(
            kind=Kind.GENERATE,
            messages=(Message(role="user", content="hi \ud800"),),
            arguments='{"until":[]}',
            sample_index=2,
        )
    )
    instances = tuple(
        Instance(request=r, key=r.key, doc_id=n // 4, index=n % 4, repeat=n % 2) for n, r in enumerate(requests)
    )
    fields = {
        "source": "native",
        "source_version": "1",
        "task": "colours",
        "task_version": "2",
        "settings": '{"limit":5}',
    }
    return Recording(
        **fields,
        fingerprint=Recording.compute_fingerprint(**fields, keys=[i.key for i in instances]),
        num_fewshot=3,
        instances=instances,
        documents=documents,
        labels=("tokenizer",),
    )


# --- opening ---


def test_open_twice(tmp_path: Path) -> None:
    Store.open(tmp_path / "a" / "b")
    assert Store.open(tmp_path / "a" / "b", create=False).weights() == []
    assert json.loads((tmp_path / "a" / "b" / "store.json").read_text()) == {"format": "proctor-store", "version": 1}


def test_two_processes_may_make_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is first, between our look at the marker and our look at the directory."""
    (tmp_path / ".store.json.abc.tmp").write_text("{")
    monkeypatch.setattr(Path, "exists", lambda self, real=Path.exists: self.name != "store.json" and real(self))
    Store.open(tmp_path)
    assert Store.open(tmp_path).weights() == []


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        Store.open(tmp_path / "x", create=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("create", [True, False])
def test_not_a_store(tmp_path: Path, create: bool) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match=r"not a store|no store"):
        Store.open(tmp_path, create=create)
    with pytest.raises(StoreError, match=r"not a store|no store|cannot open"):
        Store.open(tmp_path / "thesis.tex", create=create)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "marker", ["", "{}", "[]", "nonsense", '{"format":"other","version":1}', '{"format":"proctor-store","version":"1"}']
)
def test_a_marker_that_says_nothing(tmp_path: Path, marker: str) -> None:
    (tmp_path / "store.json").write_text(marker)
    with pytest.raises(StoreError, match="not a store"):
        Store.open(tmp_path)


def test_a_newer_format(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format":"proctor-store","version":99}')
    with pytest.raises(StoreError, match=r"format 99, this Proctor reads up to 1\n.*newer Proctor"):
        Store.open(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", ".hidden", "a b", "x" * 129, "a\n"])
def test_names_are_never_paths(store: Store, name: str, resolution: str) -> None:
    for use in (
        store.has_recording,
        store.read_recording,
        store.recorded_requests,
        store.recording_keys,
        store.read_suite,
        store.read_identity,
        lambda name: store.answers(name, resolution),
        store.compact,
    ):
        with pytest.raises(StoreError, match="cannot be a"):
            use(name)


# --- recordings and suites ---


@pytest.mark.parametrize("documents", ["[]", "", "é" * 3_000_000])
@pytest.mark.parametrize("count", [0, 50])
def test_a_recording_comes_back(store: Store, count: int, documents: str) -> None:
    made = recording(count, documents)
    assert not store.has_recording(made.fingerprint)
    store.write_recording(made)
    assert store.has_recording(made.fingerprint)
    assert store.read_recording(made.fingerprint) == made
    assert store.recording_keys(made.fingerprint) == [i.key for i in made.instances]
    assert asked(store, made.fingerprint) == [(i.key, i.request) for i in made.instances]


def asked(store: Store, fingerprint: str) -> list[tuple[str, Request]]:
    found = store.recorded_requests(fingerprint)
    return [(found.key(n), found.request(n)) for n in range(len(found))]


def test_requests_of_several_row_groups(store: Store) -> None:
    made = recording(40_000, "é" * 3_000_000)
    store.write_recording(made)
    found = store.recorded_requests(made.fingerprint)
    assert len(found) == 40_001
    assert [found.request(n) for n in (0, 20_000, 39_999, 40_000)] == [
        made.instances[n].request for n in (0, 20_000, 39_999, 40_000)
    ]
    assert found.size < 40_001 * 200


def test_requests_of_a_recording_from_before_they_had_a_checksum(store: Store) -> None:
    made = recording()
    store.write_recording(made)
    (path,) = (store.path / "requests").iterdir()
    table = pq.read_table(path)
    meta = json.loads(table.schema.metadata[b"proctor"])
    del meta["head"]["asked"]
    meta["check"] = digest(meta["head"])
    pq.write_table(table.replace_schema_metadata({b"proctor": json.dumps(meta)}), path)
    assert asked(store, made.fingerprint) == [(i.key, i.request) for i in made.instances]
    # The whole is still verified.
    changed = table.set_column(table.schema.get_field_index("doc_id"), "doc_id", pa.array([9] * len(table)))
    pq.write_table(changed.replace_schema_metadata({b"proctor": json.dumps(meta)}), path)
    with pytest.raises(StoreError, match="do not agree"):
        store.recorded_requests(made.fingerprint)


def test_requests_that_were_changed(store: Store) -> None:
    made = recording()
    store.write_recording(made)
    (path,) = (store.path / "requests").iterdir()
    table = pq.read_table(path)
    texts = table.column("request").to_pylist()
    texts[:2] = texts[1::-1]
    changed = table.set_column(table.schema.get_field_index("request"), "request", pa.array(texts, pa.large_string()))
    pq.write_table(changed, path)
    with pytest.raises(StoreError, match="its requests do not agree"):
        store.recorded_requests(made.fingerprint)


def test_a_recording_without_requests(store: Store) -> None:
    made = dataclasses.replace(recording(), instances=(), documents='["only"]')
    store.write_recording(made)
    assert store.read_recording(made.fingerprint) == made
    assert store.recording_keys(made.fingerprint) == []
    assert asked(store, made.fingerprint) == []


def test_a_recording_is_immutable_unless_it_is_damaged(store: Store) -> None:
    made = recording()
    store.write_recording(made)
    (path,) = (store.path / "requests").iterdir()
    before = path.stat()
    store.write_recording(dataclasses.replace(made, documents="other"))
    assert path.stat() == before
    path.write_bytes(path.read_bytes()[:-10])
    for use in (store.read_recording, store.recorded_requests, store.recording_keys):
        with pytest.raises(StoreError, match=r"is damaged(.|\n)*proctor prepare"):
            use(made.fingerprint)
    store.write_recording(made)
    assert store.read_recording(made.fingerprint) == made


def test_a_flipped_byte_in_a_recording_is_found(store: Store) -> None:
    made = recording(200)
    store.write_recording(made)
    (path,) = (store.path / "requests").iterdir()
    data = path.read_bytes()
    found = 0
    for at in range(8, len(data) - 8, 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            assert store.read_recording(made.fingerprint) == made
        except StoreError:
            found += 1
        with contextlib.suppress(StoreError):
            assert asked(store, made.fingerprint) == [(i.key, i.request) for i in made.instances]
    assert found > 10


def test_a_missing_recording(store: Store) -> None:
    for use in (store.read_recording, store.recorded_requests, store.recording_keys):
        with pytest.raises(StoreError, match="No such file"):
            use("0" * 64)


def test_suites(store: Store) -> None:
    assert store.suites() == []
    made = Suite(
        id="b" * 64, source="lm_eval", names=("mmlu", "ünï"), num_fewshot=None, recordings=("1", "2"), settings="{}"
    )
    store.write_suite(made)
    store.write_suite(dataclasses.replace(made, id="a" * 64, num_fewshot=0))
    assert store.suites() == ["a" * 64, "b" * 64]
    assert store.read_suite(made.id) == made
    (store.path / "suites" / f"{made.id}.json").write_text('{"id": 1}')
    with pytest.raises(StoreError, match="is damaged"):
        store.read_suite(made.id)


def test_identity(store: Store, weights: str) -> None:
    assert store.read_identity(weights) is None
    store.write_identity(weights, {"files": ["a"], "dtype": "float32"})
    store.write_identity(weights, {"files": ["b"]})
    assert store.read_identity(weights) == {"files": ["a"], "dtype": "float32"}
    assert store.weights() == [weights]


# --- scores ---


def score(value: float | None, **more: object) -> ScoreRow:
    fields: dict[str, object] = {
        "model": "Möd'el $(x)", "label": "main", "step": None, "task": "t", "metric": "acc", "filter": "none",
        "value": value, "stderr": None, "low": None, "high": None, "n": 3, "n_expected": 4, "num_fewshot": 0,
        "higher_is_better": True, "engines": ("e1", "e2"),
        "coverage": Coverage(requested=4, answered=3, failed=1, failures=(("server", 1),)),
    }  # fmt: skip
    return ScoreRow(**fields | more)  # type: ignore[arg-type]


def sample(doc_id: int) -> SampleScore:
    return SampleScore(
        task="t",
        doc_id=doc_id,
        filter="none",
        prompt="p\n",
        target="x",
        responses=("r", ""),
        extracted=(),
        metrics=(("acc", 1.0), ("f1", None)),
        keys=("a" * 64,),
    )


def scored(value: float | None, suite: str = "s1", **more: object) -> ScoredSuite:
    rows = (score(value), score(math.inf, metric="ppl", step=5, is_group=True))
    fields: dict[str, object] = {"model": "Möd'el $(x)", "label": "main", "suite": suite, "rows": rows}
    return ScoredSuite(**fields | {"samples": (sample(1), sample(2))} | more)  # type: ignore[arg-type]


def test_the_latest_scores_of_each_suite_count(store: Store) -> None:
    assert store.read_scores() == []
    store.write_scores("run", [scored(0.5), scored(0.25, "s2"), scored(0.1, "s3", label="step 5")])
    store.write_scores("other run", [scored(0.75)])
    store.write_scores("run", [scored(None), scored(1.0, "s2", rows=(), samples=())])
    read = store.read_scores()
    assert [(s.run, s.suite, s.label) for s in read] == [
        ("run", "s3", "step 5"),
        ("other run", "s1", "main"),
        ("run", "s1", "main"),
        ("run", "s2", "main"),
    ]
    assert [s.rows for s in read] == [scored(0.1).rows, scored(0.75).rows, scored(None).rows, ()]
    assert all(s.samples == () for s in read)
    with_samples = store.read_scores(run="run", samples=True)
    assert [s.samples for s in with_samples] == [(sample(1), sample(2)), (sample(1), sample(2)), ()]
    assert len(list((store.path / "scores").iterdir())) == 6


def test_a_lone_surrogate_does_not_stop_scoring(store: Store) -> None:
    odd = dataclasses.replace(sample(1), responses=("a\ud800b",))
    store.write_scores("run", [scored(1.0, samples=(odd,))])
    assert store.read_scores(samples=True)[0].samples[0].responses == ("a\\ud800b",)


def test_damaged_scores(store: Store) -> None:
    store.write_scores("run", [scored(1.0)])
    (part,) = (store.path / "scores").glob("part-*")
    part.write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"is damaged(.|\n)*proctor score"):
        store.read_scores()


# --- the whole ---


def test_summary(
    store: Store,
    weights: str,
    resolution: str,
    owner: Owner,
    response: Callable[..., Response],
    key: Callable[[object], str],
) -> None:
    async def fill() -> None:
        async with store.writer(weights, resolution, owner=owner) as writer:
            await writer.append_many([response(n) for n in range(10)])
        store.compact(weights)
        async with store.writer(weights, "f" * 16, owner=owner) as writer:
            await writer.append_many([response(n) for n in range(8, 12)])
            await writer.alias(key("x"), response(1).physical_key)
            (row,) = store.summary()
            assert (row.weights, row.responses, row.aliases, row.failures, row.duplicates) == (weights, 12, 1, 0, 2)
            assert (row.parts, row.segments, row.open_segments, row.damage) == (1, 1, 1, ())
            assert row.bytes > 1000

    assert store.summary() == []
    asyncio.run(fill())
