import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from proctor.infer.slots import SlotPool, shared
from proctor.records import Kind, Request
from proctor.testing import FakeServer, ServerOptions

from .asking import bodies, respond

CONTEXT = tuple(range(100))


async def test_choices_of_one_long_context_take_turns_on_one_slot() -> None:
    pool = SlotPool(4)
    used: list[int] = []

    async def score(choice: int) -> None:
        async with pool.lease((*CONTEXT, 1000 + choice)) as slot:
            used.append(slot.number)
            await asyncio.sleep(0.001)

    await asyncio.gather(*(score(c) for c in range(4)))
    assert len(set(used)) == 1


async def test_different_passages_spread_over_all_slots_and_wait_for_a_free_one() -> None:
    pool = SlotPool(3)
    held: set[int] = set()
    most = 0

    async def score(start: int) -> None:
        nonlocal most
        async with pool.lease(range(start, start + 100)) as slot:
            assert slot.number not in held
            held.add(slot.number)
            most = max(most, len(held))
            await asyncio.sleep(0.002)
            held.discard(slot.number)

    await asyncio.gather(*(score(n * 1000) for n in range(10)))
    assert most == 3


async def test_a_cancelled_wait_gives_its_place_back() -> None:
    pool = SlotPool(1)
    async with pool.lease((1, 2)):
        waiting = asyncio.create_task(_hold(pool))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(1), pool.lease((3,)) as slot:
        assert slot.number == 0


async def _hold(pool: SlotPool) -> None:
    async with pool.lease((9,)):
        await asyncio.sleep(10)


def test_shared_prefix() -> None:
    assert shared((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared((), (1,)) == 0


async def test_several_servers_have_as_many_slots_each() -> None:
    pool = SlotPool(2, servers=3)
    async with AsyncExitStack() as held:
        slots = [await held.enter_async_context(pool.lease((n, n))) for n in range(6)]
    assert [s.number for s in slots] == [0, 0, 0, 1, 1, 1]
    assert len({id(s.near) for s in slots}) == 6


async def test_the_steps_of_a_passage_go_to_one_server(connect: Any, tmp_path: Path) -> None:
    """Another one would compute the whole prefix anew."""
    logs = [tmp_path / str(n) for n in range(2)]
    requests = [
        Request(kind=Kind.LOGLIKELIHOOD, text=f"{n} is said to be", continuation=" a number") for n in "12345678"
    ]
    async with AsyncExitStack() as stack:
        options = [ServerOptions(echo="ignored", native=True, bodies=str(log)) for log in logs]
        servers = [await stack.enter_async_context(FakeServer(one)) for one in options]
        engine = await stack.enter_async_context(connect(lambda: [s.backend for s in servers]))
        await respond(engine, requests)
    asked = [[b for b in bodies(log) if "id_slot" in b] for log in logs]
    assert sum(map(len, asked)) == len(requests) * len(" a number")
    one, two = ({b["prompt"][0] for b in some} for some in asked)
    assert one and two and not one & two, "each passage at one of them"
