"""A block store in this process: real blobs, each verified, and what can go wrong with them."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from services.kvstore.acquisition import Block
from services.kvstore.blob import BlobHeader, BlobKind, Damaged, open_blob, seal_into
from services.kvstore.client import Saved, SaveItem
from services.kvstore.tier import Tier, TierCost

MODEL_DIGEST = b"m" * 16


class MemoryStore:
    """A `BlockStore`. Tests set what is public."""

    def __init__(self, layout_digest: bytes) -> None:
        self.connected = True
        self.blobs: dict[bytes, bytearray] = {}
        self.tier_of: dict[bytes, Tier] = {}  # RAM where none is said
        self.located = Counter[bytes]()
        self.prefetched: list[bytes] = []
        self.known_costs: dict[Tier, TierCost] = {}
        self.delay_s = 0.0  # of each block
        self.gate = asyncio.Event()  # of saving
        self.gate.set()
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.error: Exception | None = None
        self.leases = 0
        self._kinds: dict[bytes, BlobKind] = {}
        self._layout_digest = layout_digest

    async def locate(self, keys: Sequence[bytes]) -> list[Tier | None]:
        await asyncio.sleep(0)
        self.located.update(keys)
        self._fail()
        return [self._tier(key) for key in keys]

    @asynccontextmanager
    async def acquire(
        self,
        keys: Sequence[bytes],
        *,
        deadline_s: float,
        consume: Callable[[int, memoryview], None],
    ) -> AsyncIterator[AsyncIterator[Block]]:
        self.leases += 1
        try:
            yield self._blocks(keys, deadline_s, consume)
        finally:
            self.leases -= 1

    async def prefetch(self, keys: Sequence[bytes]) -> None:
        self.prefetched += keys
        self.tier_of.update(dict.fromkeys(keys, Tier.RAM))

    async def save(self, items: Sequence[SaveItem]) -> Saved:
        await self.gate.wait()
        self._fail()
        present = sum(item.key in self.blobs for item in items)
        for item in items:
            if item.key not in self.blobs:
                blob = await asyncio.to_thread(self._sealed, item)
                self.blobs[item.key] = blob
                self._kinds[item.key] = item.kind
        return Saved(stored=len(items) - present, present=present, dropped=0)

    def costs(self) -> Mapping[Tier, TierCost]:
        return self.known_costs

    def damage(self, key: bytes, draw: random.Random) -> None:
        """Flip a bit, cut the end, or put another blob there."""
        blob = bytearray(self.blobs[key])
        how = draw.choice(("flip", "cut", "swap"))
        if how == "flip" and blob:
            blob[draw.randrange(len(blob))] ^= 1 << draw.randrange(8)
        elif how == "swap" and (others := [other for other in self.blobs if other != key]):
            blob = bytearray(self.blobs[draw.choice(others)])
        else:
            del blob[len(blob) * draw.randrange(100) // 100 :]
        self.blobs[key] = blob

    def bodies(self) -> list[bytes]:
        """Keys, in the order in which they were saved."""
        return [key for key in self.blobs if self._kinds[key] is BlobKind.BODY]

    def tails(self) -> list[bytes]:
        return [key for key in self.blobs if self._kinds[key] is BlobKind.TAIL]

    async def _blocks(
        self, keys: Sequence[bytes], deadline_s: float, consume: Callable[[int, memoryview], None]
    ) -> AsyncIterator[Block]:
        loop = asyncio.get_running_loop()
        for index, key in enumerate(keys):
            if self.delay_s:
                await asyncio.sleep(min(self.delay_s, max(0.0, deadline_s - loop.time())))
            await self.load_gate.wait()
            self._fail()
            tier = self._tier(key)
            if tier is None or loop.time() >= deadline_s:
                yield Block(index)
                continue
            loading = asyncio.ensure_future(asyncio.to_thread(self._load, index, key, consume))
            try:
                is_good = await asyncio.shield(loading)
            except asyncio.CancelledError:
                await asyncio.wait([loading])
                raise
            yield Block(index, tier if is_good else None)

    def _load(self, index: int, key: bytes, consume: Callable[[int, memoryview], None]) -> bool:
        try:
            payload = open_blob(
                memoryview(self.blobs.get(key, b"")),  # gone since: truncated
                key=key,
                model_digest=MODEL_DIGEST,
                layout_digest=self._layout_digest,
            )
        except Damaged:
            self.blobs.pop(key, None)
            return False
        consume(index, payload)
        return True

    def _sealed(self, item: SaveItem) -> bytearray:
        header = BlobHeader(
            kind=item.kind,
            key=item.key,
            model_digest=MODEL_DIGEST,
            layout_digest=self._layout_digest,
            start=item.start,
            end=item.end,
            payload_nbytes=item.nbytes,
        )
        blob = bytearray(header.nbytes)
        seal_into(memoryview(blob), header, item.fill)
        return blob

    def _tier(self, key: bytes) -> Tier | None:
        return self.tier_of.get(key, Tier.RAM) if self.connected and key in self.blobs else None

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error
