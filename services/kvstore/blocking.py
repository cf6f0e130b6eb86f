"""The tiers that block, disk and cold, as the store's loop wants them: each call in a thread.

Each has threads of its own, so that a slow Redis does not stand in front of the disk.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from services.kvstore.blob import BlobHeader, Damaged, VerifyReport
from services.kvstore.cold import ColdTier
from services.kvstore.disk import DiskConfig, DiskTier
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.threads import finished, in_parallel
from services.kvstore.tier import Loaded, Rooms, Tier, TierUsage

Result = TypeVar("Result")

DISK_THREADS = 4
# That write back, and look whether blobs are there.
COLD_THREADS = 4
# More of them only get into each other's way: half of a read is Python's own work (measured).
COLD_READERS = 2
# By one reader, before its blobs go to RAM.
COLD_READ_TOGETHER = 8


class _Threads:
    """Runs calls one after the other in each of its threads."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, call: Callable[[], Result]) -> Result:
        return await finished(asyncio.get_running_loop().run_in_executor(self._threads, call))

    def close(self) -> None:
        self._threads.shutdown()


class Disk:
    """The disk tier of this node."""

    tier = Tier.DISK

    def __init__(self, disk: DiskTier, config: DiskConfig) -> None:
        self._disk = disk
        self._config = config
        self._threads = _Threads("kv-disk", DISK_THREADS)

    @classmethod
    async def open(cls, config: DiskConfig, is_pinned: Callable[[bytes], bool]) -> Disk:
        """Scans the directory; raises DiskInUse."""
        disk = await asyncio.to_thread(DiskTier, config, is_pinned=is_pinned)
        return cls(disk, config)

    @property
    def degraded(self) -> str | None:
        return self._disk.degraded

    def has(self, key: bytes) -> bool:
        return self._disk.nbytes_of(key) is not None

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return [self.has(key) for key in keys]

    async def load(self, keys: Sequence[bytes], rooms: Rooms) -> AsyncGenerator[Loaded]:
        waiting = deque(keys)
        while waiting:
            ready: list[tuple[bytes, memoryview]] = []
            while waiting:
                key = waiting[0]
                nbytes = self._disk.nbytes_of(key)
                if nbytes is not None:
                    memory = rooms.make(key, nbytes)
                    if memory is None:
                        if ready:
                            break
                        memory = await rooms.wait_for(key, nbytes)
                    ready.append((key, memory))
                waiting.popleft()
            for loaded in await self._threads.run(partial(self._read, ready)):
                yield loaded

    def _read(self, ready: Sequence[tuple[bytes, memoryview]]) -> list[Loaded]:
        """In a thread."""
        loaded: list[Loaded] = []
        for key, memory in ready:
            try:
                loaded.append((key, self._disk.get_into(key, memory)))
            except Damaged as damage:
                loaded.append((key, damage))
        return loaded

    async def store(self, key: bytes, blob: memoryview) -> bool:
        return await self._threads.run(partial(self._disk.put, key, blob))

    async def drop(self, keys: Sequence[bytes]) -> int:
        return await self._threads.run(lambda: sum(map(self._disk.delete, keys)))

    async def evict(self, nbytes: int) -> int:
        return await self._threads.run(partial(self._disk.evict, nbytes))

    async def verify(self, *, repair: bool) -> VerifyReport:
        return await self._threads.run(partial(self._disk.verify, repair=repair))

    async def usage(self) -> TierUsage:
        counts = self._disk.counts
        return TierUsage(
            num_blobs=self._disk.num_blobs,
            used_bytes=self._disk.used_bytes,
            max_bytes=self._config.max_bytes,
            evicted_blobs=counts.evicted_blobs,
            failures=counts.failures,
        )

    async def tick(self) -> None:
        await self._threads.run(self._disk.tick)

    async def close(self) -> None:
        await self._threads.run(self._disk.close)
        self._threads.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdConfig:
    """`max_bytes` of all nodes together."""

    redis: RedisConfig
    max_bytes: int
    ttl_seconds: float


class Cold:
    """The Redis that nodes share: blobs, and the link for other uses of it."""

    tier = Tier.COLD

    def __init__(self, config: ColdConfig, is_pinned: Callable[[bytes], bool]) -> None:
        """Does not wait for Redis, nor fail without it."""
        self.link = RedisLink(config.redis)
        self._config = config
        self._cold = ColdTier(
            self.link,
            max_bytes=config.max_bytes,
            ttl_seconds=config.ttl_seconds,
            is_pinned=is_pinned,
        )
        self._threads = _Threads("kv-cold", COLD_THREADS)
        self._readers = _Threads("kv-cold-reader", COLD_READERS)

    @property
    def degraded(self) -> str | None:
        return self._cold.degraded

    def has(self, key: bytes) -> bool:
        return False

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return await self._threads.run(partial(self._cold.contains, keys))

    async def load(self, keys: Sequence[bytes], rooms: Rooms) -> AsyncGenerator[Loaded]:
        starts = range(0, len(keys), COLD_READ_TOGETHER)
        groups = [keys[start : start + COLD_READ_TOGETHER] for start in starts]
        calls = [partial(self._readers.run, partial(self._read, group)) for group in groups]
        async with aclosing(in_parallel(calls, at_once=COLD_READERS)) as reading:
            async for group in reading:
                for key, outcome, blob in group:
                    if isinstance(outcome, BlobHeader):
                        room = await rooms.wait_for(key, outcome.nbytes)
                        room[:] = blob
                    yield key, outcome

    def _read(
        self, keys: Sequence[bytes]
    ) -> list[tuple[bytes, BlobHeader | Damaged | None, memoryview]]:
        """In a thread. Into memory of its own: RAM is the loop's, and a way there and back for each
        blob takes longer than one more copy."""
        read = []
        for key in keys:
            memory = memoryview(b"")

            def room(nbytes: int) -> memoryview:
                nonlocal memory
                memory = memoryview(bytearray(nbytes))
                return memory

            outcome: BlobHeader | Damaged | None
            try:
                outcome = self._cold.get_into(key, room)
            except Damaged as damage:
                outcome = damage
            read.append((key, outcome, memory))
        return read

    async def store(self, key: bytes, blob: memoryview) -> bool:
        return await self._threads.run(partial(self._cold.put, key, blob))

    async def drop(self, keys: Sequence[bytes]) -> int:
        return await self._threads.run(partial(self._cold.delete, keys))

    async def evict(self, nbytes: int) -> int:
        return await self._threads.run(partial(self._cold.evict, nbytes))

    async def verify(self, *, repair: bool) -> VerifyReport:
        return await self._threads.run(partial(self._cold.verify, repair=repair))

    async def usage(self) -> TierUsage:
        counts = self._cold.counts
        missing = {"part missing": counts.incomplete_blobs} if counts.incomplete_blobs else {}
        return TierUsage(
            num_blobs=self._cold.num_blobs,
            used_bytes=self._cold.used_bytes,
            max_bytes=self._config.max_bytes,
            evicted_blobs=counts.evicted_blobs,
            failures={**counts.failures, **missing},
        )

    async def tick(self) -> None:
        await self._threads.run(self._cold.tick)

    async def close(self) -> None:
        self._readers.close()
        await self._threads.run(self.link.close)
        self._threads.close()
