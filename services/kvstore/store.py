"""Finds, brings into RAM and lends the blobs of a node: RAM first, then each lower tier in turn.

One event loop owns it. A blob is wanted by many at once and loaded once; what does not verify is
counted, dropped where it lay, and asked of the next tier. Knows no messages and no clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.kvstore.blob import BlobHeader, Damaged, DamageReason
from services.kvstore.ram import RamTier, Reservation, Resident
from services.kvstore.stats import TierStats
from services.kvstore.tier import LowerTier, NoRoom, Tier, TierCost

log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What a blob must carry for a worker to understand it; 16 bytes each."""

    model_digest: bytes
    layout_digest: bytes


class Found(NamedTuple):
    """A blob in RAM and the tier that had it; the receiver is among its users."""

    resident: Resident
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    # Of one `acquire`, so that a long restore leaves disk and network to the others.
    loads_per_acquire: int = 8
    # Of all of them together.
    loads: int = 32
    # How long a load waits for somebody to let go of RAM.
    room_wait_seconds: float = 2.0


class _Load:
    """One blob on its way into RAM, and how many wait for it."""

    def __init__(self, identity: Identity | None) -> None:
        self.identity = identity
        self.waiting = 0
        self.done: asyncio.Future[Found | None] = asyncio.get_running_loop().create_future()


class TieredStore:
    """Owner of `ram` and of the loads under way. `lower` is ordered, fastest first."""

    def __init__(
        self,
        ram: RamTier,
        lower: Sequence[LowerTier],
        limits: StoreLimits,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.ram = ram
        self.stats = {tier: TierStats() for tier in (Tier.RAM, *(each.tier for each in lower))}
        self.no_room = 0
        self._lower = tuple(lower)
        self._limits = limits
        self._clock = clock
        self._loads: dict[bytes, _Load] = {}
        self._load_slots = asyncio.Semaphore(limits.loads)
        self._tasks: set[asyncio.Task[None]] = set()

    async def locate(self, keys: Sequence[bytes], timeout_seconds: float) -> list[Tier | None]:
        """The fastest tier that has each blob, as far as it answers in time. A hint, no promise."""
        found: list[Tier | None] = [Tier.RAM if key in self.ram else None for key in keys]

        async def ask(lower: LowerTier) -> None:
            indexes = [index for index, tier in enumerate(found) if tier is None]
            there = await lower.contains([keys[index] for index in indexes]) if indexes else []
            for index, has_it in zip(indexes, there, strict=True):
                if has_it:
                    found[index] = min(found[index] or lower.tier, lower.tier)

        try:
            async with asyncio.timeout(timeout_seconds):
                for lower in self._lower:
                    if lower.tier is Tier.DISK:
                        await ask(lower)
                async with asyncio.TaskGroup() as tasks:
                    for lower in self._lower:
                        if lower.tier is not Tier.DISK:
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
        missing = dict.fromkeys(range(len(keys)))
        for index, key in enumerate(keys):
            if (resident := self._use(key)) is not None:
                del missing[index]
                deliver(index, Found(resident, Tier.RAM))
        indexes = iter(list(missing))

        async def load_one_by_one() -> None:
            for index in indexes:
                found = await self.obtain(keys[index], identity)
                del missing[index]
                deliver(index, found)

        try:
            async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as tasks:
                for _ in range(min(self._limits.loads_per_acquire, len(missing))):
                    tasks.create_task(load_one_by_one())
        except TimeoutError:
            for index in list(missing):
                deliver(index, None)

    async def obtain(self, key: bytes, identity: Identity | None) -> Found | None:
        """The blob of `key`, in RAM, the caller among its users; None if no tier has it."""
        if (resident := self._use(key)) is not None:
            return Found(resident, Tier.RAM)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load(identity)
            self._run(self._load(key, load))
        load.waiting += 1
        try:
            return await asyncio.shield(load.done)
        except asyncio.CancelledError:
            if not load.done.done():
                load.waiting -= 1
            elif (found := load.done.result()) is not None:
                self.ram.let_go(found.resident)  # it came at the moment when nobody wanted it
            raise

    def promote(self, keys: Sequence[bytes]) -> None:
        """Bring these into RAM when there is time; nobody waits for them."""
        missing = [key for key in keys if key not in self.ram and key not in self._loads]
        if missing:
            self._run(self._promote(missing))

    def holds(self, key: bytes) -> bool:
        """Whether a worker need not bring this blob."""
        return key in self.ram

    def insert(self, reservation: Reservation, header: BlobHeader) -> None:
        """A worker has filled a reservation with a sealed blob."""
        self.ram.let_go(self.ram.insert(reservation, header))
        self.stats[Tier.RAM].stored(header.nbytes)

    def drop_damaged(self, resident: Resident, reason: str) -> None:
        """A reader found that the copy in RAM does not verify. Others still may use it."""
        self.stats[Tier.RAM].damaged[reason] += 1
        log.warning("damaged_blob tier=RAM reason=%s key=%s", reason, resident.header.key.hex())
        self.ram.drop(resident)

    def costs(self) -> dict[Tier, TierCost]:
        """Of the lower tiers that work and were measured."""
        return {
            lower.tier: cost
            for lower in self._lower
            if lower.degraded is None and (cost := self.stats[lower.tier].cost) is not None
        }

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def check(self) -> None:
        self.ram.check()

    def _use(self, key: bytes) -> Resident | None:
        stats = self.stats[Tier.RAM]
        resident = self.ram.use(key)
        if resident is None:
            stats.misses += 1
        else:
            stats.hit(resident.header)
        return resident

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, key: bytes, load: _Load) -> None:
        found: Found | None = None
        try:
            async with self._load_slots:
                if load.waiting:
                    found = await self._ask_lower_tiers(key, load.identity)
        except Exception:  # a bug; those who wait must not wait for ever
            log.exception("load_failed key=%s", key.hex())
        finally:
            del self._loads[key]
            if found is not None:
                # One use each for those who wait, on top of the load's own.
                found.resident.users += load.waiting
                self.ram.let_go(found.resident)
            load.done.set_result(found)

    async def _ask_lower_tiers(self, key: bytes, identity: Identity | None) -> Found | None:
        for lower in self._lower:
            room = _Room(self.ram, key, self._limits.room_wait_seconds)
            stats = self.stats[lower.tier]
            started = self._clock()
            stats.begin(started)
            header = None
            try:
                header = await lower.load(key, room)
                if header is not None and identity is not None:
                    _require(header, identity)
            except Damaged as damage:
                stats.damaged[damage.reason] += 1
                log.warning(
                    "damaged_blob tier=%s reason=%s key=%s",
                    lower.tier.name,
                    damage.reason,
                    key.hex(),
                )
                header = None
                await lower.drop([key])
            except NoRoom:
                self.no_room += 1
                return None
            finally:
                stats.end(self._clock(), started, header)
                if header is None:
                    room.give_back()
            if header is not None:
                return Found(self.ram.insert(room.take(), header), lower.tier)
        return None

    async def _promote(self, keys: Sequence[bytes]) -> None:
        def let_go(_index: int, found: Found | None) -> None:
            if found is not None:
                self.ram.let_go(found.resident)

        await self.acquire(keys, let_go, timeout_seconds=60, identity=None)


class _Room:
    """At most one reservation, as long as the load needs it to be."""

    def __init__(self, ram: RamTier, key: bytes, wait_seconds: float) -> None:
        self._ram = ram
        self._key = key
        self._wait_seconds = wait_seconds
        self._reservation: Reservation | None = None

    async def __call__(self, nbytes: int) -> memoryview:
        self.give_back()
        try:
            async with asyncio.timeout(self._wait_seconds):
                while (reservation := self._ram.reserve(self._key, nbytes)) is None:
                    await self._ram.wait_for_room()
        except TimeoutError:
            raise NoRoom from None
        self._reservation = reservation
        return self._ram.arena.view(reservation.span)

    def take(self) -> Reservation:
        reservation, self._reservation = self._reservation, None
        assert reservation is not None, "a tier loaded a blob and asked for no room"
        return reservation

    def give_back(self) -> None:
        if self._reservation is not None:
            self._ram.abandon(self.take())


def _require(header: BlobHeader, identity: Identity) -> None:
    if header.model_digest != identity.model_digest:
        raise Damaged(DamageReason.MODEL)
    if header.layout_digest != identity.layout_digest:
        raise Damaged(DamageReason.LAYOUT)
