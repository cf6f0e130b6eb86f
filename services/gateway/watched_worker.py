"""What a gateway believes of one attention worker: is it there, and is it worth a request?

A worker that fails a stream as unavailable is *away* until it answers again, and a moment longer it
is taken only if there is nobody else. One that is silent in the middle of its streams and cannot be
reached is given up, if there is somebody else. Owns the tasks that find this out; knows no request.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.gateway.worker import Worker

log = logging.getLogger(__name__)

# A worker that refuses at once has the fewest requests under way: every next one would go to it.
AVOIDED_SECONDS = 5.0
# Between two questions to a worker that is away; gRPC itself reconnects as seldom as every 2 s.
AWAY_INTERVAL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SilenceLimits:
    """When a worker is given up; gRPC's keepalive notices a dead connection by itself in 25 s."""

    # Without a word in any of its streams. A long step is silent too, which is why it is asked.
    silent_seconds: float = 10.0
    # So many times in a row no answer to a new connection, each in this time.
    num_probes: int = 3
    probe_seconds: float = 2.0


class WatchedWorker:
    """A worker with the count of this gateway's requests on it."""

    def __init__(
        self,
        worker: Worker,
        limits: SilenceLimits,
        *,
        on_return: Callable[[], None],
        has_other: Callable[["WatchedWorker"], bool],
    ) -> None:
        """`on_return` is called when the worker is not away any more; `has_other` says whether
        somebody else could take its requests."""
        self.worker = worker
        self.num_active = 0
        self.is_retired = False
        self.is_away = False
        self._limits = limits
        self._on_return = on_return
        self._has_other = has_other
        self._avoided_until_s = -math.inf  # on the loop's clock
        self._asking: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def is_avoided(self) -> bool:
        """It was unavailable a moment ago."""
        return asyncio.get_running_loop().time() < self._avoided_until_s

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[Worker]:
        """Around one request; the last one of a retired worker closes it."""
        self.num_active += 1
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen())
        try:
            yield self.worker
        finally:
            self.num_active -= 1
            if self.is_retired and not self.num_active:
                await self.close()

    def failed(self) -> None:
        """A stream of it ended as unavailable."""
        self._avoided_until_s = asyncio.get_running_loop().time() + AVOIDED_SECONDS
        if not self.is_away and not self.is_retired:
            self.is_away = True
            self._asking = asyncio.create_task(self._ask_until_it_answers())

    async def retire(self) -> None:
        """No more requests; those under way finish."""
        self.is_retired = True
        if not self.num_active:
            await self.close()

    async def close(self) -> None:
        tasks = [task for task in (self._asking, self._listening) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.worker.close()

    async def _ask_until_it_answers(self) -> None:
        while not await self.worker.takes_requests():  # noqa: ASYNC110 it cannot tell by itself
            await asyncio.sleep(AWAY_INTERVAL_SECONDS)
        self.is_away = False
        self._on_return()

    async def _listen(self) -> None:
        """While it has requests: if it is silent, look whether it is there."""
        now_s = asyncio.get_running_loop().time
        asked_s = now_s()
        while self.num_active:
            silent_s = now_s() - max(asked_s, self.worker.heard_s)
            if silent_s < self._limits.silent_seconds:
                await asyncio.sleep(self._limits.silent_seconds - silent_s)
                continue
            is_there = await self._is_there()
            asked_s = now_s()
            if not is_there and self._has_other(self):  # else waiting for it is all that is left
                log.warning(
                    "worker_given_up worker=%s requests=%d", self.worker.row.name, self.num_active
                )
                self.failed()
                self.worker.give_up(
                    f"it was silent for {silent_s:.1f} s and then did not answer "
                    f"{self._limits.num_probes} new connections"
                )

    async def _is_there(self) -> bool:
        asked_s = asyncio.get_running_loop().time()
        for _ in range(self._limits.num_probes):
            if await self.worker.can_be_reached(self._limits.probe_seconds):
                return True
        return self.worker.heard_s > asked_s
