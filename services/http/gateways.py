"""The gateways of a deployment as a client of theirs: which there are, one after the other, and an
open channel to each. Who they are is for somebody else to say.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import grpc.aio

from services import rpc
from services.tls import Tls

log = logging.getLogger(__name__)

# For how long an answer to who there is is good.
FRESH_SECONDS = 5.0
# Longer than any stream may live on a gateway that drains.
CLOSE_GRACE_SECONDS = 3600.0

Addresses: TypeAlias = Callable[[], Awaitable[Sequence[str]]]


class Gateways:
    def __init__(self, addresses: Addresses, tls: Tls | None = None) -> None:
        self._addresses = addresses
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._known: tuple[str, ...] = ()
        self._known_at = float("-inf")
        self._asking = asyncio.Lock()
        self._turn = 0
        self._closing: set[asyncio.Task[None]] = set()

    async def in_turn(self) -> list[grpc.aio.Channel]:
        """To each of them, another one first every time. Empty: there is none now."""
        await self.refresh()
        self._turn += 1
        first = self._turn % max(1, len(self._known))
        return [self._channel(address) for address in (*self._known[first:], *self._known[:first])]

    def doubt(self) -> None:
        """One of them was not there: who is there is asked anew."""
        self._known_at = float("-inf")

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()
        for task in self._closing:
            task.cancel()

    async def refresh(self) -> None:
        """Ask who there is, if the last answer is not fresh any more."""
        async with self._asking:
            if time.monotonic() - self._known_at < FRESH_SECONDS:
                return
            try:
                self._known = tuple(await self._addresses())
            except Exception as error:  # whoever knows is away: those of before may do
                log.warning("gateways_unknown why=%s", error)
                return
            self._known_at = time.monotonic()
            for address in self._channels.keys() - set(self._known):
                # Streams through it go on until they end; a gateway that drains is not told of.
                closing = self._channels.pop(address).close(CLOSE_GRACE_SECONDS)
                self._closing.add(task := asyncio.create_task(_run(closing)))
                task.add_done_callback(self._closing.discard)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.channel(address, self._tls)
        return self._channels[address]


async def _run(closing: Awaitable[None]) -> None:
    await closing
