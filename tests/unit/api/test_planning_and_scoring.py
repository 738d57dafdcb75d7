"""From what was recorded and stored to what is owed, and to scores that say what they stand on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from proctor import api
from proctor.api.presenting import outcome_to_json, owed_words, plan_to_json, scores_to_json
from proctor.api.running import Outcome
from proctor.errors import ProctorError, ServerError, UsageError
from proctor.records import Answer, Boundary, Failure, Instance

from .conftest import Desk, Room, says

WORDS = ["a", "b", "c", "d"]


def refusing(word: str, *, retryable: bool) -> object:
    def reply(instance: Instance) -> Answer:
        if instance.request.text != f"Say {word}:":
            return says("yes")(instance)  # type: ignore[return-value]
        return Failure(key=instance.key, boundary=Boundary.REFUSED, message="no", retryable=retryable)

    return reply


# --- plans ---


def test_a_plan_is_a_difference_of_keys(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    assert desk.plan().owed == 4
    desk.answer(lambda i: says("yes")(i) if i.doc_id < 3 else None)
    plan = desk.plan()
    task = plan.models[0].tasks[0]
    assert (plan.owed, task.requests, task.answered, task.owed, task.failed) == (1, 4, 3, 1, 0)
    assert [s.items for s in plan.models[0].shards] == [((task.fingerprint, 3),)]
    desk.answer(says("yes"))
    assert desk.plan().owed == 0
    assert desk.plan().models[0].shards == ()


def test_tasks_that_share_requests_owe_them_once(room: Room) -> None:
    desk = Desk.open(room.run([{"native": [room.task("one", WORDS), room.task("two", ["c", "d", "e", "c"])]}]))
    model = desk.plan().models[0]
    assert [t.owed for t in model.tasks] == [4, 3]  # each task's own view
    assert model.shared == 2
    items = [i for s in model.shards for i in s.items]
    assert len(items) == len(set(items)) == 5


def test_every_model_owes_for_itself(room: Room) -> None:
    config = room.run([{"native": room.task("t", WORDS)}])
    (room.root / "other").mkdir()
    (room.root / "other" / "pytorch_model.bin").write_bytes(b"other weights")
    config = room.run(
        [{"native": "t.yaml"}], models={"m": {"path": "model"}, "o": {"path": "other"}}, launch={"workers": 3}
    )
    desk = Desk.open(config)
    desk.answer(says("yes"), target=1)
    plan = desk.plan()
    assert [m.owed for m in plan.models] == [4, 0]
    assert plan.workers == 3


def test_what_failed_for_good_is_owed_only_when_asked_for(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(refusing("b", retryable=False))  # type: ignore[arg-type]
    plan = desk.plan()
    assert (plan.owed, plan.models[0].tasks[0].failed) == (0, 1)
    again = desk.plan(retry_failed=True)
    assert again.owed == 1
    assert again.models[0].tasks[0].answered == 3


def test_what_a_retry_may_help_is_owed(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(refusing("b", retryable=True))  # type: ignore[arg-type]
    task = desk.plan().models[0].tasks[0]
    assert (task.owed, task.failed, task.answered) == (1, 0, 3)


def test_a_damaged_row_is_counted_and_owed_again(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(says("yes"))
    segment = next(p for p in desk.store.path.glob("weights/*/*.jsonl"))
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[-2] = lines[-2].replace(b"yes", b"YES")
    segment.write_bytes(b"".join(lines))
    plan = desk.plan()
    assert (plan.owed, plan.models[0].damaged) == (1, 1)
    assert plan_to_json(plan)["models"][0]["damaged"] == 1
    row = desk.score().rows[0]
    assert (row.n, row.n_expected, row.coverage.complete) == (3, 4, False)


def test_a_changed_task_is_planned_anew(room: Room) -> None:
    config = room.run([{"native": room.task("t", WORDS)}])
    assert api.plan(config).owed == 4
    room.run([{"native": "t.yaml", "limit": 2}])
    assert api.plan(config).owed == 2


def test_a_plan_as_json_is_json_and_has_no_single_requests(room: Room) -> None:
    value = plan_to_json(Desk.open(room.run([{"native": room.task("t", WORDS)}])).plan())
    assert json.loads(json.dumps(value)) == json.loads(json.dumps(value))
    assert value["models"][0]["owed"] == 4
    assert "items" not in json.dumps(value)


# --- scores ---


def test_a_score_names_its_coverage_engine_and_model(room: Room) -> None:
    desk = Desk.open(
        room.run([{"native": room.task("t", WORDS)}], models={"m": {"path": "model", "display_name": "M!"}})
    )
    desk.answer(lambda i: says("yes" if i.doc_id else "no")(i))
    scores = desk.score()
    (row,) = scores.rows
    assert (row.model, row.task, row.metric, row.value, row.n) == ("M!", "t", "exact_match", 0.75, 4)
    assert row.engines == ("fake 1 float32 tp1",)
    assert row.low is not None
    assert row.high is not None
    assert row.low < 0.75 < row.high
    assert scores.complete
    assert desk.store.read_scores(run="r")[0].rows == scores.suites[0].rows
    assert json.loads((desk.context.directory.report / "scores.json").read_text())[0]["value"] == 0.75


def test_a_gap_is_no_zero(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(refusing("b", retryable=False))  # type: ignore[arg-type]
    scores = desk.score()
    (row,) = scores.rows
    assert not scores.complete
    assert (row.coverage.requested, row.coverage.answered, row.coverage.failed) == (4, 3, 1)
    assert row.coverage.failures == (("refused", 1),)
    assert row.value != 0.75


def test_samples_have_what_was_asked_and_answered(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(says("yes"))
    value = scores_to_json(desk.score(), samples=True)
    assert [s["prompt"] for s in value["samples"]] == [f"Say {w}:" for w in WORDS]
    assert {s["responses"] for s in value["samples"]} == {("yes",)}
    assert "samples" not in scores_to_json(desk.score())


def test_marking_twice_is_the_same(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(says("yes"))
    first, second = desk.score(), desk.score()
    assert [asdict(r) for r in first.rows] == [asdict(r) for r in second.rows]


def test_marking_needs_a_recording_of_these_tasks(room: Room) -> None:
    config = room.run([{"native": room.task("t", WORDS)}])
    api.init(room.root / "elsewhere")
    with pytest.raises(ProctorError):
        api.score(config)
    Desk.open(config)
    api.score(config)
    room.run([{"native": "t.yaml", "limit": 1}])
    with pytest.raises(UsageError, match="have changed"):
        api.score(config)


# --- outcomes ---


def outcome(desk: Desk, *, errors: tuple[ProctorError, ...] = ()) -> Outcome:
    plan = desk.plan()
    return Outcome(run="r", scores=desk.score(), before=plan, after=plan, drained=False, errors=errors)


def test_an_outcome_is_complete_only_with_everything(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(lambda i: says("yes")(i) if i.doc_id else None)
    partly = outcome(desk, errors=(ServerError("it died", hint="look"),))
    assert not partly.complete
    assert owed_words(partly) == "1 requests are still owed"
    value = outcome_to_json(partly)
    assert (value["owed"], value["complete"]) == (1, False)
    assert value["errors"] == ["it died\n  → look"]
    desk.answer(says("yes"))
    assert outcome(desk).complete


def test_words_for_what_failed_for_good(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", WORDS)}]))
    desk.answer(refusing("b", retryable=False))  # type: ignore[arg-type]
    found = outcome(desk)
    assert not found.complete
    assert "1 requests failed for good" in owed_words(found)


@pytest.mark.slow
def test_a_whole_run_in_this_process(room: Room) -> None:
    config = room.run([{"native": room.task("t", WORDS)}])
    found = asyncio.run(api.run(config))
    assert found.complete, found.errors
    assert (found.before.owed, found.after.owed) == (4, 0)
    again = asyncio.run(api.run(config))
    assert again.before.owed == 0
    assert [r.value for r in again.scores.rows] == [r.value for r in found.scores.rows]
    assert Path(found.scores.rows[0].task) == Path("t")
