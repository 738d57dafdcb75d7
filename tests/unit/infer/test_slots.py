import asyncio

from proctor.infer.slots import SlotPool, shared

CONTEXT = tuple(range(100))


async def test_choices_of_one_long_context_take_turns_on_one_slot() -> None:
    pool = SlotPool(4)
    used: list[int] = []

    async def score(choice: int) -> None:
        async with pool.lease((*CONTEXT, 1000 + choice)) as slot:
            used.append(slot)
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
            assert slot not in held
            held.add(slot)
            most = max(most, len(held))
            await asyncio.sleep(0.002)
            held.discard(slot)

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
        assert slot == 0


async def _hold(pool: SlotPool) -> None:
    async with pool.lease((9,)):
        await asyncio.sleep(10)


def test_shared_prefix() -> None:
    assert shared((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared((), (1,)) == 0
