"""A session over a real store: what is asked, what is kept, and how it ends."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import replace

import pytest

from proctor.config.spec import FakeEngine as FakeSpec
from proctor.errors import ProbeError, ServerError, StoreFull
from proctor.infer.engine import PhysicalRequest
from proctor.infer.fake import FakeEngine
from proctor.records import Answer, Boundary, Failure, Request, Response
from proctor.worker.events import read_events
from proctor.worker.session import ENGINE_BREAKS, Session

from .conftest import Bench, BreakingEngine, Kept, question

REQUESTS = [question(f"q{n}") for n in range(40)]


class FailingEngine(FakeEngine):
    """Has no answer to some texts."""

    def __init__(self, failing: set[str], *, retryable: bool = False) -> None:
        super().__init__()
        self._failing = failing
        self._retryable = retryable

    def _answer(self, request: PhysicalRequest) -> Answer:  # type: ignore[override]
        answer = super()._answer(request)
        if request.request.text not in self._failing:
            return answer
        return Failure(
            key=request.key,
            physical_key=request.physical_key,
            boundary=Boundary.REFUSED,
            message="no",
            retryable=self._retryable,
            created=answer.created,
        )


class DeafEngine(FakeEngine):
    """Cannot render some texts."""

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        found = await super().resolve(requests)
        return [
            Failure(key=r.key, boundary=Boundary.RENDER, message="no", retryable=False) if r.text == "q3" else f
            for r, f in zip(requests, found, strict=True)
        ]


class AliasingEngine(FakeEngine):
    """Asks the same thing for every text of two."""

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        same = [replace(r, text=f"q{int(r.text[1:]) // 2}") for r in requests]
        found = await super().resolve(same)
        return [replace(f, key=r.key, request=r) for f, r in zip(found, requests, strict=True)]


def responses(bench: Bench, requests: Sequence[Request] = REQUESTS) -> list[Response]:
    found = bench.answers().read([r.key for r in requests])
    return [a for a in found.values() if isinstance(a, Response)]


async def live_claims(bench: Bench) -> int:
    return len(await bench.ledger().live())


async def test_everything_is_asked_once_and_then_nothing(bench: Bench) -> None:
    shards = bench.shards(REQUESTS)
    first = FakeEngine()
    outcome = await bench.work(shards, first)
    assert (outcome.answered, outcome.failed, outcome.drained) == (40, 0, False)
    assert Counter(first.asked) == {k: 1 for k in first.asked}
    assert len(responses(bench)) == 40
    second = FakeEngine()
    await bench.work(shards, second)
    assert second.asked == []
    assert await live_claims(bench) == 0


@pytest.mark.parametrize("after", [0, 1, 9, 10, 25, 39])
async def test_an_engine_that_breaks_is_asked_only_the_rest(bench: Bench, after: int) -> None:
    engine = BreakingEngine(after=[after])
    server = Kept()
    outcome = await bench.work(bench.shards(REQUESTS, size=15), engine, server=server)
    assert outcome.answered == 40
    assert len(responses(bench)) == 40
    again = {k: n for k, n in Counter(engine.asked).items() if n > 1}
    # The one it was lost on, and nothing that had been answered.
    assert len(again) == 1
    assert server.ensured >= 1
    assert bench.answers().duplicates == 0


async def test_an_engine_that_breaks_without_an_answer_is_given_up(bench: Bench) -> None:
    engine = BreakingEngine(after=[5] + [0] * 10)
    with pytest.raises(ServerError, match="is lost"):
        await bench.work(bench.shards(REQUESTS), engine, server=Kept())
    assert len(responses(bench)) == 5
    assert engine.asked.count(engine.asked[5]) == ENGINE_BREAKS
    assert await live_claims(bench) == 0, "nobody must wait for what we will not ask"


async def test_progress_renews_the_patience(bench: Bench) -> None:
    engine = BreakingEngine(after=[1] * 12)
    assert (await bench.work(bench.shards(REQUESTS), engine, server=Kept())).answered == 40


async def test_without_a_server_a_lost_engine_ends_the_session(bench: Bench) -> None:
    with pytest.raises(ServerError):
        await bench.work(bench.shards(REQUESTS), BreakingEngine(after=[7]))
    assert len(responses(bench)) == 7


async def test_a_failed_probe_is_not_retried(bench: Bench) -> None:
    class Wrong(FakeEngine):
        runs = 0

        async def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[Answer]:
            self.runs += 1
            raise ProbeError("shifted")
            yield  # pragma: no cover

    engine = Wrong()
    with pytest.raises(ProbeError):
        await bench.work(bench.shards(REQUESTS), engine, server=Kept())
    assert engine.runs == 1


async def test_an_engine_that_forgets_requests_is_an_error(bench: Bench) -> None:
    class Forgetful(FakeEngine):
        async def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[Answer]:
            async for answer in super().run(requests):
                if answer.key != REQUESTS[3].key:
                    yield answer

    with pytest.raises(ServerError, match="1 requests unanswered"):
        await bench.work(bench.shards(REQUESTS), Forgetful())
    assert len(responses(bench)) == 39


async def test_a_full_disk_ends_the_session_with_its_error(bench: Bench) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def meanwhile(session: Session) -> None:
        bench.writers[-1]._fsync = full  # pyright: ignore[reportPrivateUsage]

    engine = FakeEngine(FakeSpec(latency_s=0.01))
    with pytest.raises(StoreFull):
        await bench.work(bench.shards(REQUESTS), engine, server=Kept(), meanwhile=meanwhile)
    assert await live_claims(bench) == 0
    again = FakeEngine()
    assert (await bench.work(bench.shards(REQUESTS), again)).answered == len(again.asked)
    assert len(responses(bench)) == 40


async def test_draining_keeps_what_is_in_flight_and_takes_nothing_new(bench: Bench) -> None:
    requests = [question(f"d{n}") for n in range(400)]
    engine = FakeEngine(FakeSpec(latency_s=0.1))

    def meanwhile(session: Session) -> None:
        if engine.asked:
            session.drain()
        else:
            asyncio.get_running_loop().call_later(0.005, meanwhile, session)

    outcome = await bench.work(bench.shards(requests, size=400), engine, meanwhile=meanwhile)
    assert outcome.drained
    assert 0 < outcome.answered == len(engine.asked) < 130
    assert len(responses(bench, requests)) == outcome.answered
    assert await live_claims(bench) == 0


async def test_draining_before_the_start_asks_nothing(bench: Bench) -> None:
    engine = FakeEngine()
    outcome = await bench.work(bench.shards(REQUESTS), engine, meanwhile=Session.drain)
    assert outcome.drained
    assert engine.asked == []


async def test_one_physical_request_for_two_logical_ones(bench: Bench) -> None:
    requests = [question(f"t{n}") for n in range(20)]
    engine = AliasingEngine()
    outcome = await bench.work(bench.shards(requests, size=7), engine)
    assert outcome.answered == len(engine.asked) == 10
    found = bench.answers().read([r.key for r in requests])
    assert len(found) == 20
    texts = [a.text for a in found.values() if isinstance(a, Response)]
    assert texts[0::2] == texts[1::2]
    assert read_events(bench.log)[0][-1].aliases == 10


async def test_a_twin_of_a_failure_fails_too(bench: Bench) -> None:
    class Both(FailingEngine, AliasingEngine):
        pass

    requests = [question(f"t{n}") for n in range(4)]
    engine = Both({"t0"})
    await bench.work(bench.shards(requests), engine)
    assert bench.answers().failed([r.key for r in requests]) == [requests[0].key, requests[1].key]


async def test_answers_of_another_resolution_are_taken_over(bench: Bench) -> None:
    shards = bench.shards(REQUESTS)
    engine = FakeEngine()
    await bench.work(shards, engine)
    other = replace(bench, resolution="fedcba9876543210")
    again = FakeEngine()
    await other.work(shards, again)
    assert again.asked == []
    assert not other.answers().owed([r.key for r in REQUESTS])


async def test_a_request_that_cannot_be_rendered_is_recorded_and_not_asked(bench: Bench) -> None:
    engine = DeafEngine()
    outcome = await bench.work(bench.shards(REQUESTS), engine)
    assert (outcome.answered, outcome.failed) == (39, 1)
    failure = bench.answers().failure(REQUESTS[3].key)
    assert failure is not None
    assert failure.boundary is Boundary.RENDER
    assert await live_claims(bench) == 0


async def test_what_failed_for_good_is_asked_only_on_request(bench: Bench) -> None:
    shards = bench.shards(REQUESTS)
    await bench.work(shards, FailingEngine({"q1", "q2"}))
    well = FakeEngine()
    await bench.work(shards, well)
    assert well.asked == []
    await bench.work(shards, well, retry_failed=True)
    assert len(well.asked) == 2
    assert len(responses(bench)) == 40


async def test_what_may_be_retried_is_owed_again_but_not_in_the_same_session(bench: Bench) -> None:
    engine = FailingEngine({"q1"}, retryable=True)
    shards = bench.shards(REQUESTS)
    assert (await bench.work(shards, engine)).failed == 1
    assert max(Counter(engine.asked).values()) == 1
    well = FakeEngine()
    await bench.work(shards, well)
    assert len(well.asked) == 1


async def test_two_sessions_at_once_share_the_work(bench: Bench) -> None:
    shards = bench.shards(REQUESTS, size=4)
    one, two = (FakeEngine(FakeSpec(latency_s=0.01)) for _ in range(2))
    outcomes = await asyncio.gather(bench.work(shards, one), bench.work(shards, two))
    assert sum(o.answered for o in outcomes) == 40
    assert set(Counter(one.asked + two.asked).values()) == {1}


async def test_two_sessions_that_retry_ask_a_hopeless_request_once(bench: Bench) -> None:
    shards = bench.shards(REQUESTS[:4], size=4)
    await bench.work(shards, FailingEngine({"q1"}))
    one, two = FailingEngine({"q1"}), FailingEngine({"q1"})
    await asyncio.gather(bench.work(shards, one, retry_failed=True), bench.work(shards, two, retry_failed=True))
    assert len(one.asked + two.asked) == 1


async def test_whoever_waits_takes_over_what_another_gives_up(bench: Bench) -> None:
    shards = bench.shards(REQUESTS, size=40)
    breaking = BreakingEngine(after=[5])
    well = FakeEngine()

    async def later() -> None:
        while not breaking.asked:
            await asyncio.sleep(0.001)
        await bench.work(shards, well)

    results = await asyncio.gather(bench.work(shards, breaking), later(), return_exceptions=True)
    assert isinstance(results[0], ServerError)
    assert results[1] is None
    assert len(responses(bench)) == 40
    answered = set(breaking.asked[:5])
    assert not answered & set(well.asked)


async def test_a_session_that_waits_can_be_drained(bench: Bench) -> None:
    shards = bench.shards(REQUESTS, size=40)
    claim = await bench.ledger().claim([r.key for r in REQUESTS])
    engine = FakeEngine()

    def meanwhile(session: Session) -> None:
        asyncio.get_running_loop().call_later(0.1, session.drain)

    outcome = await asyncio.wait_for(bench.work(shards, engine, meanwhile=meanwhile), 5)
    assert outcome.drained
    assert engine.asked == []
    assert claim.seq in await bench.ledger().live(), "the other's claim is not ours to end"


async def test_a_cancelled_session_gives_its_claims_back(bench: Bench) -> None:
    engine = FakeEngine(FakeSpec(latency_s=5))
    task = asyncio.create_task(bench.work(bench.shards(REQUESTS), engine))
    while not engine.asked:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await live_claims(bench) == 0
