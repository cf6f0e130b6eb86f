"""The other nodes' stores, asked like one tier: who has a blob, and then for the blobs.

A peer that is away or slow is a miss. Knows nothing of what the peers do among themselves.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from services.kvstore.blob import BlobHeader
from services.kvstore.peer_link import PeerLimits, PeerLink
from services.kvstore.tier import Loaded, Rooms, Tier
from services.tls import Tls

# Where each of so many keys was seen last.
MAX_REMEMBERED_KEYS = 65_536
# Where a blob was seen it may be gone, or its peer; then the others are asked once more.
MAX_ROUNDS = 2


class Peers:
    """Call it inside the event loop."""

    tier = Tier.PEER

    def __init__(self, limits: PeerLimits, tls: Tls | None = None) -> None:
        self._limits = limits
        self._tls = tls
        self._links: dict[str, PeerLink] = {}
        self._seen_at: OrderedDict[bytes, str] = OrderedDict()

    @property
    def degraded(self) -> str | None:
        away = [link.address for link in self._links.values() if not link.connected]
        return f"not connected: {', '.join(sorted(away))}" if away else None

    async def set_addresses(self, addresses: Iterable[str]) -> None:
        """These are the other stores from now on."""
        wanted = dict.fromkeys(addresses)
        gone = [self._links.pop(address) for address in list(self._links) if address not in wanted]
        for address in wanted:
            if address not in self._links:
                self._links[address] = PeerLink(address, self._tls)
        for link in gone:
            await link.close()

    def has(self, key: bytes) -> bool:
        return False

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]:
        found = [False] * len(keys)

        async def ask(link: PeerLink) -> None:
            there = await link.contains(keys, self._limits.contains_timeout_seconds)
            for index, has_it in enumerate(there):
                if has_it:
                    found[index] = True
                    self._remember(keys[index], link.address)

        async with asyncio.TaskGroup() as tasks:
            for link in self._links.values():
                if link.connected:
                    tasks.create_task(ask(link))
        return found

    async def load(self, keys: Sequence[bytes], rooms: Rooms) -> AsyncGenerator[Loaded]:
        left = list(keys)
        for _ in range(MAX_ROUNDS):
            # Or seen at a peer that is none any more.
            unknown = [key for key in left if self._seen_at.get(key) not in self._links]
            if unknown:
                await self.contains(unknown)
            for link in list(self._links.values()):
                wanted = [key for key in left if self._seen_at.get(key) == link.address]
                if not wanted:
                    continue
                for key in wanted:
                    del self._seen_at[key]
                async with aclosing(link.fetch(wanted, rooms, self._limits)) as fetching:
                    async for key, outcome in fetching:
                        if outcome is not None:
                            left.remove(key)
                            yield key, outcome
                        if isinstance(outcome, BlobHeader):
                            self._remember(key, link.address)
            if not left:
                return

    async def drop(self, keys: Sequence[bytes]) -> int:
        """What peers keep is theirs."""
        return 0

    async def close(self) -> None:
        await self.set_addresses(())

    def _remember(self, key: bytes, address: str) -> None:
        self._seen_at[key] = address
        self._seen_at.move_to_end(key)
        if len(self._seen_at) > MAX_REMEMBERED_KEYS:
            self._seen_at.popitem(last=False)
