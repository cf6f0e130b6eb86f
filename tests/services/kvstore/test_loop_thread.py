import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from services.kvstore.loop_thread import LoopThread


@pytest.fixture
async def thread() -> AsyncIterator[LoopThread]:
    thread = LoopThread("test")
    yield thread
    await thread.close()


async def test_work_is_done_in_another_thread(thread: LoopThread) -> None:
    async def identify() -> int:
        return threading.get_ident()

    assert await thread.run(identify()) != threading.get_ident()


async def test_an_error_of_the_work_reaches_whoever_waits(thread: LoopThread) -> None:
    async def fail() -> None:
        raise LookupError("not there")

    with pytest.raises(LookupError, match="not there"):
        await thread.run(fail())


async def test_calls_and_work_keep_their_order(thread: LoopThread) -> None:
    seen: list[int] = []

    async def note(number: int) -> None:
        seen.append(number)

    thread.call(seen.append, 1)
    await thread.run(note(2))
    thread.call(seen.append, 3)
    await thread.run(note(4))
    assert seen == [1, 2, 3, 4]


async def test_work_goes_on_while_the_callers_loop_is_busy(thread: LoopThread) -> None:
    done = threading.Event()

    async def take_turns() -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)
        done.set()

    running = asyncio.create_task(thread.run(take_turns()))
    await asyncio.sleep(0)
    assert done.wait(30)  # this loop stands still all the while, as in a long step
    await running


async def test_whoever_is_cancelled_waits_for_the_end_of_the_work(thread: LoopThread) -> None:
    started, ended = threading.Event(), threading.Event()

    async def use_memory() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            time.sleep(0.1)  # noqa: ASYNC251  in the middle of a copy
            ended.set()

    running = asyncio.create_task(thread.run(use_memory()))
    await asyncio.to_thread(started.wait)
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()  # impatient
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended.is_set()


async def test_work_that_ends_well_although_it_is_cancelled_raises_for_the_caller(
    thread: LoopThread,
) -> None:
    started = threading.Event()

    async def stubborn() -> int:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return 1
        return 0

    running = asyncio.create_task(thread.run(stubborn()))
    await asyncio.to_thread(started.wait)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
