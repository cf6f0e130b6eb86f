"""Brings new blobs from RAM to one lower tier, behind everybody's back.

What waits is a list of keys and not of blobs: a blob that leaves RAM before its turn is dropped and
counted, and nobody ever waits for this. A tier that is degraded is tried again when it works.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from services.kvstore.blob import Damaged, DamageReason
from services.kvstore.ram import RamTier, Resident
from services.kvstore.tier import KeptTier, Tier

log = logging.getLogger(__name__)

# How soon a degraded tier is looked at again.
RETRY_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBackLimits:
    # More are dropped, the oldest first.
    waiting_blobs: int = 8192
    # At once.
    writes: int = 2


@dataclass(slots=True)
class WriteBackCounts:
    written_blobs: int = 0
    written_bytes: int = 0
    # Left RAM before their turn, or were too many.
    dropped_blobs: int = 0
    # That the tier did not take though it works.
    refused_blobs: int = 0


class WriteBack:
    """`damaged` hears of a blob in RAM that does not verify."""

    def __init__(
        self,
        lower: KeptTier,
        ram: RamTier,
        limits: WriteBackLimits,
        *,
        damaged: Callable[[Resident, DamageReason], None],
    ) -> None:
        self.counts = WriteBackCounts()
        self._lower = lower
        self._ram = ram
        self._limits = limits
        self._damaged = damaged
        self._waiting: dict[bytes, None] = {}
        self._num_writing = 0
        self._work = asyncio.Event()
        self._nothing_left = asyncio.Event()
        self._nothing_left.set()
        self._tasks = [
            asyncio.create_task(self._write_one_by_one(), name=f"write-back {lower.tier.name}")
            for _ in range(limits.writes)
        ]

    @property
    def tier(self) -> Tier:
        return self._lower.tier

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._num_writing

    def may_save(self, key: bytes) -> bool:
        """Whether the blob is on its way to the tier, and there is hope."""
        return key in self._waiting and not self.is_held_up

    def add(self, key: bytes) -> None:
        """The blob of `key` has just come into RAM."""
        if self._lower.has(key):
            return
        if len(self._waiting) >= self._limits.waiting_blobs:
            del self._waiting[next(iter(self._waiting))]
            self.counts.dropped_blobs += 1
        self._waiting[key] = None
        self._nothing_left.clear()
        self._work.set()

    @property
    def is_held_up(self) -> bool:
        """The tier takes nothing now."""
        return self._lower.degraded is not None

    async def finished(self) -> None:
        """Until everything that was added is written, refused or dropped."""
        await self._nothing_left.wait()

    async def close(self) -> None:
        """Give up what waits; let the writes under way end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _write_one_by_one(self) -> None:
        while True:
            await self._work.wait()
            if not self._waiting:
                self._work.clear()
                continue
            if self.is_held_up:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            key = next(iter(self._waiting))
            del self._waiting[key]
            self._num_writing += 1
            try:
                await self._write(key)
            except Exception:  # a bug of the tier; the next blob is another matter
                log.exception("write_back_failed tier=%s key=%s", self.tier.name, key.hex())
                self.counts.refused_blobs += 1
            finally:
                self._num_writing -= 1
                if not self.num_waiting:
                    self._nothing_left.set()

    async def _write(self, key: bytes) -> None:
        resident = self._ram.hold(key)
        if resident is None:
            self.counts.dropped_blobs += 1
            return
        try:
            if await self._lower.store(key, self._ram.arena.view(resident.span)):
                self.counts.written_blobs += 1
                self.counts.written_bytes += resident.header.nbytes
            elif self.is_held_up:
                self._waiting[key] = None  # once more when it works
            else:
                self.counts.refused_blobs += 1
        except Damaged as damage:
            self._damaged(resident, damage.reason)
        finally:
            self._ram.let_go(resident)
