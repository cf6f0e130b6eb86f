"""What operators and gateways ask of a store: checks, eviction, and whole blobs in and out.

Plain values; knows no messages.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence

from services.kvstore.blob import Damaged, DamageReason, VerifyReport, check_blob, read_header
from services.kvstore.leases import LeaseBook
from services.kvstore.store import PROMOTE_SECONDS, TieredStore
from services.kvstore.threads import finished
from services.kvstore.tier import KeptTier, NoRoom, Tier, TierUsage

# Blobs that were written into a store and exist in its RAM alone.
MAX_UNSAVED = 16
# Blobs that are asked of the lower tiers at once, and then given out one by one.
READ_TOGETHER = 16


class TierIsOff(LookupError):
    """The store has no such tier, or its blobs are not the store's to look after."""


class Admin:
    def __init__(self, store: TieredStore, leases: LeaseBook) -> None:
        self._store = store
        self._leases = leases

    async def usage(self, tier: Tier) -> TierUsage:
        """Raises TierIsOff, as everything here that takes a tier."""
        if tier is not Tier.RAM:
            return await self._kept(tier).usage()
        ram = self._store.ram
        return TierUsage(
            num_blobs=len(ram),
            used_bytes=ram.used_bytes,
            max_bytes=ram.arena.capacity_bytes,
            evicted_blobs=ram.counts.evicted_blobs,
            failures={},
        )

    async def evict(self, tier: Tier, nbytes: int) -> int:
        """Let the least useful blobs go until so many bytes are free; how many were freed."""
        if tier is Tier.RAM:
            return self._store.ram.evict(nbytes)
        return await self._kept(tier).evict(nbytes)

    async def drop(self, tier: Tier, keys: Sequence[bytes]) -> int:
        """Forget these blobs of one tier, pinned or not; how many it had."""
        if tier is Tier.RAM:
            return sum(map(self._store.ram.drop_key, keys))
        return await self._kept(tier).drop(keys)

    async def verify(self, tier: Tier, *, repair: bool) -> VerifyReport:
        """Read every blob of a tier; forget the damaged ones when told to repair."""
        if tier is not Tier.RAM:
            return await self._kept(tier).verify(repair=repair)
        num_blobs, damaged = 0, Counter[DamageReason]()
        for key in self._store.ram:
            resident = self._store.ram.hold(key)
            if resident is None:
                continue
            num_blobs += 1
            try:
                await self._store.check_in_ram(resident)
            except Damaged as damage:
                damaged[damage.reason] += 1
                if repair:
                    self._store.drop_damaged(resident, damage.reason)
            finally:
                self._store.ram.let_go(resident)
        return VerifyReport(num_blobs, damaged)

    def collect(self, ttl_seconds: float | None) -> tuple[int, int]:
        """Drop from RAM what was not used for so long, and end the leases of workers that died;
        how many of both."""
        self._store.pins.forget_expired()
        leases = self._leases.end_those_of_the_dead()
        if ttl_seconds is None:
            return 0, leases
        return self._store.ram.drop_unused_for(ttl_seconds), leases

    async def read(self, keys: Sequence[bytes]) -> AsyncGenerator[memoryview]:
        """The sealed blobs, each valid until the next one is asked for; misses are left out."""
        for start in range(0, len(keys), READ_TOGETHER):
            some = keys[start : start + READ_TOGETHER]
            await self._store.bring(some, PROMOTE_SECONDS)
            for key in some:
                found = await self._store.obtain(key)  # also what RAM had no room for
                if found is None:
                    continue
                try:
                    yield self._store.ram.arena.view(found.resident.span)
                finally:
                    self._store.ram.let_go(found.resident)

    async def write(self, blob: bytearray) -> bool:
        """Take in a sealed blob from outside; False if it was there already.

        Raises Damaged, and NoRoom.
        """
        memory = memoryview(blob)
        header = read_header(memory)
        await finished(
            asyncio.get_running_loop().run_in_executor(None, check_blob, memory, header.key)
        )
        if header.nbytes != len(memory):
            raise Damaged(DamageReason.TRUNCATED)
        if self._store.holds(header.key):
            return False
        # More than RAM holds may come: it must not push itself out before it is on the disk.
        await self._store.wait_until_saved(all_but=MAX_UNSAVED)
        reservation = self._store.ram.reserve(header.key, len(memory))
        if reservation is None:
            raise NoRoom
        self._store.ram.arena.view(reservation.span)[:] = memory
        self._store.insert(reservation, header)
        return True

    def _kept(self, tier: Tier) -> KeptTier:
        for kept in self._store.below.kept:
            if kept.tier is tier:
                return kept
        raise TierIsOff(f"this store has no {tier.name} tier of its own")
