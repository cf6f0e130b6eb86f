import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from services.kvstore.threads import finished, in_parallel


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    entered, go_on, left = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        go_on.wait(10)
        left.set()

    waiting = asyncio.create_task(finished(asyncio.ensure_future(asyncio.to_thread(work))))
    await asyncio.to_thread(entered.wait)
    waiting.cancel()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert left.is_set()


def _after(seconds: float, result: int, running: set[int]) -> Callable[[], Awaitable[int]]:
    async def call() -> int:
        running.add(result)
        try:
            await asyncio.sleep(seconds)
        finally:
            running.remove(result)
        return result

    return call


async def test_results_come_as_they_are_ready_and_no_more_at_once_than_may() -> None:
    running = set[int]()
    most = 0
    others_came = asyncio.Event()

    async def last() -> int:
        await others_came.wait()
        return 0

    results: list[int] = []
    async for result in in_parallel(
        [last, *(_after(0.001, number, running) for number in range(1, 9))], at_once=3
    ):
        most = max(most, len(running))
        results.append(result)
        if len(results) == 8:
            others_came.set()
    assert sorted(results) == list(range(9))
    assert results[-1] == 0
    assert 0 < most <= 2  # and the first


async def test_one_that_fails_cancels_the_others() -> None:
    running = set[int]()

    async def fail() -> int:
        await asyncio.sleep(0.01)
        raise LookupError

    with pytest.raises(LookupError):
        async for _ in in_parallel([_after(60, 1, running), fail], at_once=2):
            pass
    assert not running


async def test_left_early_it_leaves_nothing_running() -> None:
    running = set[int]()
    calls = [_after(0, 0, running), _after(60, 1, running), _after(60, 2, running)]
    async with aclosing(in_parallel(calls, at_once=2)) as results:
        async for result in results:
            assert result == 0
            break
    assert not running
