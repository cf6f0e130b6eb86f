"""Waiting for work that must not be left behind: threads, and tasks that stand for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

Result = TypeVar("Result")


async def finished(work: asyncio.Future[Result]) -> Result:
    """The result of `work`; when the caller is cancelled, that is raised only after the end of it.

    A thread cannot be cancelled, and the memory that it works on is given back right after this.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # looked at: the caller has no more use for it
        raise


async def in_parallel(
    calls: Iterable[Callable[[], Awaitable[Result]]], *, at_once: int
) -> AsyncGenerator[Result]:
    """The results as they come. When it is closed, or one of them raises, the others are cancelled
    and it ends after their end."""
    slots = asyncio.Semaphore(at_once)

    async def in_a_slot(call: Callable[[], Awaitable[Result]]) -> Result:
        async with slots:
            return await call()

    tasks = [asyncio.create_task(in_a_slot(call)) for call in calls]
    try:
        for result in asyncio.as_completed(tasks):
            yield await result
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await finished(asyncio.ensure_future(asyncio.wait(tasks)))
        for task in tasks:
            if not task.cancelled():
                task.exception()  # one has raised it; the others' say the same
