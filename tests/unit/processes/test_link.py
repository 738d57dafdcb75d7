"""Messages between two processes: whole, in order, and an end that is told."""

from __future__ import annotations

import asyncio
import socket

from proctor.processes.link import Link


async def pair() -> tuple[Link, Link]:
    one, other = socket.socketpair()
    return await Link.over(one), await Link.over(other)


async def test_messages_arrive_whole_and_in_order() -> None:
    here, there = await pair()
    sent = [{"n": n, "text": "\n\u2028é" * n} for n in range(200)] + [{"long": "x" * 2_000_000}]
    for message in sent:
        here.send(message)
    assert [await there.receive() for _ in sent] == sent
    here.close()
    there.close()


async def test_the_end_of_one_is_told_to_the_other_after_what_it_sent() -> None:
    here, there = await pair()
    here.send({"last": True})
    here.close()
    assert [await there.receive(), await there.receive(), await there.receive()] == [{"last": True}, None, None]
    there.close()


async def test_who_speaks_to_nobody_is_not_hurt() -> None:
    here, there = await pair()
    there.send({"never": "read"})
    there.close()
    await asyncio.sleep(0)
    for _ in range(10):
        here.send({"anybody": "there?"})
        await here.flush()
    while await here.receive() is not None:
        pass
    here.close()
    here.send({"too": "late"})


async def test_half_a_message_of_a_process_that_was_killed_is_none() -> None:
    one, other = socket.socketpair()
    here = await Link.over(one)
    other.sendall(b'{"whole": 1}\n{"half":')
    other.close()
    assert await here.receive() == {"whole": 1}
    assert await here.receive() is None
    here.close()
