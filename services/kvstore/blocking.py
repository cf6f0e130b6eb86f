"""The tiers that block, disk and cold, as the store's loop wants them: each call in a thread.

Each has threads of its own, so that a slow Redis does not stand in front of the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from services.kvstore.blob import BlobHeader
from services.kvstore.disk import DiskConfig, DiskTier
from services.kvstore.threads import finished
from services.kvstore.tier import Room, Tier, TierUsage, VerifyReport

Result = TypeVar("Result")

DISK_THREADS = 4


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

    async def load(self, key: bytes, room: Room) -> BlobHeader | None:
        nbytes = self._disk.nbytes_of(key)
        if nbytes is None:
            return None
        memory = await room(nbytes)
        return await self._threads.run(partial(self._disk.get_into, key, memory))

    async def store(self, key: bytes, blob: memoryview) -> bool:
        return await self._threads.run(partial(self._disk.put, key, blob))

    async def drop(self, keys: Sequence[bytes]) -> int:
        return await self._threads.run(lambda: sum(map(self._disk.delete, keys)))

    async def evict(self, nbytes: int) -> int:
        return await self._threads.run(partial(self._disk.evict, nbytes))

    async def verify(self, *, repair: bool) -> VerifyReport:
        report = await self._threads.run(partial(self._disk.verify, repair=repair))
        damaged = {str(reason): num_blobs for reason, num_blobs in report.damaged.items()}
        return VerifyReport(report.num_blobs, damaged)

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
