"""Finds, brings into RAM and lends the blobs of a node: RAM first, then each lower tier in turn.

One event loop owns it. Every blob that a worker brings goes on to the lower tiers in the
background. Knows no messages and no clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from services.kvstore.arena import Arena
from services.kvstore.blob import BlobHeader, Damaged, check_blob
from services.kvstore.loads import Found, Identity, Loads
from services.kvstore.measure import measured_cost
from services.kvstore.pins import Pins
from services.kvstore.ram import EvictionPolicy, RamTier, Reservation, Resident
from services.kvstore.stats import TierStats
from services.kvstore.threads import finished
from services.kvstore.tier import Below, KeptTier, LowerTier, Tier, TierCost
from services.kvstore.writeback import WriteBack, WriteBackLimits

log = logging.getLogger(__name__)

# What nobody waits for is given up after so long.
PROMOTE_SECONDS = 60.0
# Handed out from RAM before the loop goes on: the worker copies the first while the store looks up
# the next.
BLOBS_PER_BREATH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    # Loaded together: enough to be worth a thread's way there.
    load_blobs: int = 16
    # Groups at once of one `acquire`, so that a long restore leaves disk and network to others.
    loads_per_acquire: int = 2
    # Of all of them together.
    loads: int = 8
    # How long a load waits for somebody to let go of RAM.
    room_wait_seconds: float = 2.0
    # Of each tier.
    write_back: WriteBackLimits = field(default_factory=WriteBackLimits)


class TieredStore:
    """Owner of RAM, of the loads under way and of what waits to be written to the lower tiers.

    The tiers below stay the caller's. What workers bring goes to all of them but the peers, what
    comes up from peers and the cold tier goes to the disk.
    """

    def __init__(
        self,
        arena: Arena,
        policy: EvictionPolicy,
        below: Below,
        pins: Pins,
        limits: StoreLimits,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.ram = RamTier(arena, policy, clock, unsaved=self._unsaved, pinned=self._must_stay)
        self.below = below
        self.pins = pins
        self.stats = {Tier.RAM: TierStats(), **{each.tier: TierStats() for each in below.tiers}}
        self.write_backs = {
            each.tier: WriteBack(each, self.ram, limits.write_back, damaged=self.drop_damaged)
            for each in below.kept
        }
        self.loads = Loads(
            self.ram,
            below.tiers,
            self.stats,
            arrived=self._arrived,
            clock=clock,
            max_loads=limits.loads,
            room_wait_seconds=limits.room_wait_seconds,
        )
        self._limits = limits
        self._tasks: set[asyncio.Task[int]] = set()

    async def locate(self, keys: Sequence[bytes], timeout_seconds: float) -> list[Tier | None]:
        """The fastest tier that has each blob, as far as it answers in time. A hint, no promise."""
        found = [self._where(key) for key in keys]
        indexes = [index for index, tier in enumerate(found) if tier is None]
        unknown = [keys[index] for index in indexes]

        async def ask(lower: LowerTier) -> None:
            try:
                for index, has_it in zip(indexes, await lower.contains(unknown), strict=True):
                    if has_it:
                        found[index] = min(found[index] or lower.tier, lower.tier)
            except Exception:  # a bug of the tier; without an answer the worker would give us up
                log.exception("locate_failed tier=%s keys=%d", lower.tier.name, len(unknown))

        try:
            async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as tasks:
                for lower in self.below.tiers if unknown else ():
                    tasks.create_task(ask(lower))
        except TimeoutError:
            log.info("locate_late timeout_seconds=%.3f keys=%d", timeout_seconds, len(keys))
        return found

    async def acquire(
        self,
        keys: Sequence[bytes],
        deliver: Callable[[int, Found | None], None],
        *,
        timeout_seconds: float,
        identity: Identity | None,
    ) -> None:
        """Call `deliver` once an index, first with what is in RAM, then as the rest comes in.

        None is a miss; at the timeout the rest are misses. Cancelled, it delivers no more.
        """
        missing: dict[int, bytes] = {}
        for index, key in enumerate(keys):
            if index and index % BLOBS_PER_BREATH == 0:
                await asyncio.sleep(0)
            if (resident := self._use(key)) is not None:
                deliver(index, Found(resident, Tier.RAM))
            else:
                missing[index] = key
        indexes = list(missing)
        size = self._limits.load_blobs
        groups = iter([indexes[start : start + size] for start in range(0, len(indexes), size)])

        def deliver_missing(index: int, found: Found | None) -> None:
            del missing[index]
            deliver(index, found)

        async def load_group_by_group() -> None:
            for some in groups:
                group = {index: keys[index] for index in some}
                await self._find(group, deliver_missing, identity)

        try:
            async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as tasks:
                for _ in range(self._limits.loads_per_acquire if missing else 0):
                    tasks.create_task(load_group_by_group())
        except TimeoutError:
            for index in list(missing):
                deliver_missing(index, None)

    async def obtain(self, key: bytes) -> Found | None:
        """The blob of `key`, in RAM, the caller among its users; None if no tier has it."""
        if (resident := self._use(key)) is not None:
            return Found(resident, Tier.RAM)
        result: list[Found | None] = []
        try:
            await self.loads.load({0: key}, lambda _index, found: result.append(found), None)
        except asyncio.CancelledError:
            for found in result:  # it came at the moment when nobody wanted it
                if found is not None:
                    self.ram.let_go(found.resident)
            raise
        return result[0]

    async def bring(self, keys: Sequence[bytes], timeout_seconds: float) -> int:
        """Bring these into RAM, as far as there is time and room; how many are there."""
        num_found = 0

        def let_go(_index: int, found: Found | None) -> None:
            nonlocal num_found
            if found is not None:
                num_found += 1
                self.ram.let_go(found.resident)

        await self.acquire(keys, let_go, timeout_seconds=timeout_seconds, identity=None)
        return num_found

    def promote(self, keys: Sequence[bytes]) -> None:
        """Bring these into RAM when there is time; nobody waits for them."""
        missing = [key for key in keys if key not in self.ram]
        if missing:
            task = asyncio.create_task(self.bring(missing, PROMOTE_SECONDS))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def holds(self, key: bytes) -> bool:
        """Whether a worker need not bring this blob."""
        return self._where(key) is not None

    def insert(self, reservation: Reservation, header: BlobHeader) -> None:
        """A worker has filled a reservation with a sealed blob."""
        self.ram.let_go(self.ram.insert(reservation, header))
        for write_back in self.write_backs.values():
            write_back.add(header.key)

    def drop_damaged(self, resident: Resident, reason: str) -> None:
        """A reader found that the copy in RAM does not verify. Others still may use it."""
        self.stats[Tier.RAM].damaged[reason] += 1
        log.warning("damaged_blob tier=RAM reason=%s key=%s", reason, resident.header.key.hex())
        self.ram.drop(resident)

    async def suspect(self, key: bytes) -> None:
        """Somebody read the copy in RAM and it did not verify: look at it."""
        resident = self.ram.hold(key)
        if resident is None:
            return
        try:
            await self.check_in_ram(resident)
        except Damaged as damage:
            self.drop_damaged(resident, damage.reason)
        finally:
            self.ram.let_go(resident)

    async def check_in_ram(self, resident: Resident) -> None:
        """Verify a blob that the caller uses; raises Damaged."""
        blob = self.ram.arena.view(resident.span)
        work = partial(check_blob, blob, resident.header.key)
        await finished(asyncio.get_running_loop().run_in_executor(None, work))

    def costs(self) -> dict[Tier, TierCost]:
        """Of the lower tiers that work and were measured."""
        return {
            lower.tier: cost
            for lower in self.below.tiers
            if lower.degraded is None and (cost := self.stats[lower.tier].cost) is not None
        }

    async def measure(self, tier: KeptTier) -> None:
        """Find out what loads from the tier cost, unless that is known already."""
        stats = self.stats[tier.tier]
        if stats.cost is None and tier.degraded is None:
            cost = await measured_cost(tier)
            if cost is not None:
                stats.estimate(cost)

    async def flush(self) -> None:
        """Until every blob is in all tiers that take blobs, or was given up and counted. A tier
        that fails meanwhile is waited for."""
        for write_back in self.write_backs.values():
            if not write_back.is_held_up:
                await write_back.finished()

    async def wait_until_saved(self, *, all_but: int) -> None:
        """Until no more than so many blobs wait for the fastest tier that takes them."""
        for write_back in self.write_backs.values():
            if not write_back.is_held_up:
                if write_back.num_waiting > all_but:
                    await write_back.finished()
                return

    async def close(self) -> None:
        """Give up what is under way. The lower tiers stay open: they are the caller's."""
        for write_back in self.write_backs.values():
            await write_back.close()
        for task in self._tasks:
            task.cancel()
        await self.loads.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def check(self) -> None:
        self.ram.check()

    def _where(self, key: bytes) -> Tier | None:
        """The fastest tier that has the blob, as far as that is known without asking anybody."""
        if key in self.ram:
            return Tier.RAM
        return next((lower.tier for lower in self.below.tiers if lower.has(key)), None)

    def _arrived(self, found: Found) -> None:
        if (to_disk := self.write_backs.get(Tier.DISK)) is not None:
            to_disk.add(found.resident.header.key)

    def _must_stay(self, key: bytes) -> bool:
        """A pin keeps a blob on the node, and keeps RAM from nobody when the disk has it."""
        on_disk = self.below.disk is not None and self.below.disk.has(key)
        return key in self.pins and not on_disk

    def _unsaved(self, key: bytes) -> bool:
        return any(write_back.may_save(key) for write_back in self.write_backs.values())

    def _use(self, key: bytes) -> Resident | None:
        stats = self.stats[Tier.RAM]
        resident = self.ram.use(key)
        if resident is None:
            stats.misses += 1
        else:
            stats.hit(resident.header)
        return resident

    async def _find(
        self,
        wanted: dict[int, bytes],
        deliver: Callable[[int, Found | None], None],
        identity: Identity | None,
    ) -> None:
        """Of keys that are counted as misses of RAM already; meanwhile some may have come."""
        for index, key in list(wanted.items()):
            if (resident := self.ram.use(key)) is not None:
                del wanted[index]
                deliver(index, Found(resident, Tier.RAM))
        await self.loads.load(wanted, deliver, identity)
