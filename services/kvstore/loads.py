"""Owns the blobs on their way from a lower tier into RAM: each is loaded once for all who want it.

What does not verify is counted, dropped where it lay, and asked of the next tier. Knows neither who
wants a blob nor what happens to it afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from services.kvstore.blob import BlobHeader, Damaged, DamageReason
from services.kvstore.ram import RamTier, Reservation, Resident
from services.kvstore.stats import TierStats
from services.kvstore.tier import LowerTier, NoRoom, Tier

log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What a blob must carry for a worker to understand it; 16 bytes each."""

    model_digest: bytes
    layout_digest: bytes


class Found(NamedTuple):
    """A blob in RAM and the tier that had it; the receiver is among its users."""

    resident: Resident
    tier: Tier


class _Load:
    """One blob on its way, and how many wait for it."""

    def __init__(self, identity: Identity | None) -> None:
        self.identity = identity
        self.num_waiting = 0
        self.done: asyncio.Future[Found | None] = asyncio.get_running_loop().create_future()


class Loads:
    """`arrived` hears of every blob that came into RAM. `max_loads` at once."""

    def __init__(
        self,
        ram: RamTier,
        lower: Sequence[LowerTier],
        stats: Mapping[Tier, TierStats],
        *,
        arrived: Callable[[Found], None],
        clock: Callable[[], float],
        max_loads: int,
        room_wait_seconds: float,
    ) -> None:
        self.num_without_room = 0
        self._ram = ram
        self._lower = lower
        self._stats = stats
        self._arrived = arrived
        self._clock = clock
        self._room_wait_seconds = room_wait_seconds
        self._slots = asyncio.Semaphore(max_loads)
        self._loads: dict[bytes, _Load] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._loads)

    async def wait_for(self, key: bytes, identity: Identity | None) -> Found | None:
        """The blob of `key`, the caller among its users; None if no tier has it."""
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load(identity)
            task = asyncio.create_task(self._run(key, load), name=f"load {key.hex()[:8]}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        load.num_waiting += 1
        try:
            return await asyncio.shield(load.done)
        except asyncio.CancelledError:
            if not load.done.done():
                load.num_waiting -= 1
            elif (found := load.done.result()) is not None:
                self._ram.let_go(found.resident)  # it came at the moment when nobody wanted it
            raise

    async def close(self) -> None:
        """Give up what is under way: misses."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, key: bytes, load: _Load) -> None:
        found: Found | None = None
        try:
            async with self._slots:
                if load.num_waiting:
                    found = await self._ask_one_after_the_other(key, load.identity)
        except Exception:  # a bug; those who wait must not wait for ever
            log.exception("load_failed key=%s", key.hex())
        finally:
            del self._loads[key]
            if found is not None:
                # One use each for those who wait, on top of the load's own.
                found.resident.users += load.num_waiting
                self._ram.let_go(found.resident)
            load.done.set_result(found)

    async def _ask_one_after_the_other(self, key: bytes, identity: Identity | None) -> Found | None:
        for lower in self._lower:
            room = _Room(self._ram, key, self._room_wait_seconds)
            stats = self._stats[lower.tier]
            started = self._clock()
            stats.begin(started)
            header = None
            try:
                header = await self._load(lower, key, room, identity)
            except NoRoom:
                self.num_without_room += 1
                return None
            finally:
                stats.end(self._clock(), started, header)
                if header is None:
                    room.give_back()
            if header is not None:
                found = Found(self._ram.insert(room.take(), header), lower.tier)
                self._arrived(found)
                return found
        return None

    async def _load(
        self, lower: LowerTier, key: bytes, room: _Room, identity: Identity | None
    ) -> BlobHeader | None:
        try:
            header = await lower.load(key, room)
            if header is not None and identity is not None:
                _require(header, identity)
            return header
        except Damaged as damage:
            self._stats[lower.tier].damaged[damage.reason] += 1
            name, reason = lower.tier.name, damage.reason
            log.warning("damaged_blob tier=%s reason=%s key=%s", name, reason, key.hex())
        await lower.drop([key])
        return None


class _Room:
    """At most one reservation, for as long as a load needs it."""

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
