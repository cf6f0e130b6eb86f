"""Waiting for work in threads that must not be left behind."""

from __future__ import annotations

import asyncio
import contextlib
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
