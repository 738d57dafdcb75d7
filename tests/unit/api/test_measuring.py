"""Rates and start-up from what workers said."""

from pathlib import Path

from proctor.api.measuring import measured, weight_bytes
from proctor.worker.events import Event


def event(phase: str, time: float, requests: int = 0, worker: str = "w") -> Event:
    return Event(
        worker=worker, model="m", phase=phase, time=time, requests=requests,
        prompt_tokens=10 * requests, completion_tokens=2 * requests,
    )  # fmt: skip


def test_only_time_at_work_counts_and_lives_are_added() -> None:
    life = [event("starting", 0), event("asking", 30), event("asking", 40, 5), event("waiting", 50, 9)]
    again = [event("starting", 500), event("asking", 510), event("draining", 512, 1), event("done", 514, 2)]
    found = measured([*life, event("done", 90, 9), *again])["m"]
    assert found.startups_s == [30, 10]
    assert [(b.seconds, b.requests) for b in found.busy] == [(20, 9), (4, 2)]
    assert (found.spent.seconds, found.spent.requests, found.spent.prompt_tokens) == (24, 11, 110)


def test_a_worker_that_never_asked_says_nothing() -> None:
    assert measured([event("starting", 0), event("failed", 5)]) == {}


def test_weights_are_counted_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_text("{}")
    assert weight_bytes(tmp_path) == 100
    assert weight_bytes(tmp_path / "model.safetensors") == 100
    assert weight_bytes(tmp_path / "gone") == 0
