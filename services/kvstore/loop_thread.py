"""An event loop in a thread of its own, for work that must go on while the caller's loop is busy.

Whoever is cancelled while waiting for such work waits for the end of it: it uses memory that is
given back right after.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

# gRPC reports the end of the last calls to their loop a little after the channel is closed.
LINGER_SECONDS = 0.2


class LoopThread:
    """Runs until `close`, which is to be awaited in another loop."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Soon, in the thread; calls keep their order."""
        self._loop.call_soon_threadsafe(callback, *args)

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, done in the thread. Cancelling the caller cancels it."""
        here = asyncio.get_running_loop()
        ended: asyncio.Future[Result] = here.create_future()
        tasks: list[asyncio.Task[Result]] = []

        def report(task: asyncio.Task[Result]) -> None:
            here.call_soon_threadsafe(_settle, ended, task)

        def start() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(report)

        self.call(start)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            if not ended.done():
                self.call(lambda: tasks[0].cancel())
            while not ended.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([ended])
            if not ended.cancelled():
                ended.exception()  # looked at: the caller has no more use for it
            raise

    async def close(self) -> None:
        """After the last `run` has returned."""
        self.call(self._loop.stop)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(asyncio.sleep(LINGER_SECONDS))
        finally:
            self._loop.close()


def _settle(ended: asyncio.Future[Result], task: asyncio.Task[Result]) -> None:
    if task.cancelled():
        ended.cancel()
    elif (error := task.exception()) is not None:
        ended.set_exception(error)
    else:
        ended.set_result(task.result())
